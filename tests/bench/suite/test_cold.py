"""Cold starts of real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.sample_models import conv_model
from twofour.bench.suite import cold
from twofour.compiler.build import build
from twofour.core.errors import UnsupportedError


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "RUNS", 1)


def test_first_result_and_memory_of_a_process(tmp_path: Path) -> None:
    model = conv_model(tmp_path / "m.onnx")
    engine = build(model).save(tmp_path / "m.engine")
    feeds = {"x": np.zeros((1, 4, 8, 8), np.float32)}
    held = np.ones(3 << 27, np.uint8)  # what the parent holds is not the child's
    found = cold.cold_starts(engine, model, feeds, ["onnxruntime", "torch"])
    assert set(found) == {"twofour", "onnxruntime"}, "PyTorch has no program here"
    for each in found.values():
        assert 0.01 < each["first_result_s"] < 60
        assert 5e6 < each["peak_bytes"] < 1e9
    assert found["twofour"]["peak_bytes"] < held.nbytes


def test_a_program_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cold start of twofour failed") as caught:
        cold.cold_starts(tmp_path / "no.engine", tmp_path, {"x": np.zeros(1)}, [])
    assert "InputError: no engine at" in str(caught.value)

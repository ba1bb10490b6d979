"""A detector beside its model: what it chose has no difference, what it chose from has."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.compiler.test_build_detection import detector
from twofour.compiler.build import build
from twofour.evaluate.compare import compare
from twofour.onnx_tools.load import save_model


def test_rows_that_were_chosen_are_not_compared(tmp_path: Path) -> None:
    model = detector("int64[n,3] chosen, float[1,3,48] scores")
    path = save_model(model, tmp_path / "model.onnx")
    images = np.random.default_rng(0).normal(size=(3, 4, 8, 6)).astype(np.float32)
    found = compare(path, build(path, tuning_effort=0), {"x": images})
    (scores,) = found.outputs
    assert scores.name == "scores"
    assert scores.cosine > 0.999999

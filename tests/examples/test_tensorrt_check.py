"""The check for machines with a GPU, on one that is made up: it tells right from wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.fake_tensorrt import plant
from tests.graphs import graph
from twofour.onnx_tools.load import save_model

FILE = Path(__file__).resolve().parents[2] / "examples" / "tensorrt_check.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tensorrt_check", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("body", "code"), [("y = Add (x, x)", 0), ("y = Relu (x)", 1)])
def test_results_are_compared(
    body: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "10.9.0.34")  # it gives 2 x
    path = save_model(graph(f"(float[2,4] x) => (float[2,4] y) {{ {body} }}"), tmp_path / "m.onnx")
    monkeypatch.setattr(sys, "argv", ["tensorrt_check.py", str(path)])
    assert script().main() == code


def test_where_nothing_can_run_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, "10.9.0.34", gpu=None)
    path = save_model(graph("(float[2] x) => (float[2] y) { y = Relu (x) }"), tmp_path / "m.onnx")
    monkeypatch.setattr(sys, "argv", ["tensorrt_check.py", str(path)])
    assert script().main() == 2
    assert "cannot build here" in capsys.readouterr().err

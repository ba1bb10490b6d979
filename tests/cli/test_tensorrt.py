"""Commands on engines of TensorRT, as on a machine that has its GPU; the TensorRT is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.fake_tensorrt import plant
from tests.graphs import graph
from twofour.cli import app
from twofour.onnx_tools.load import save_model

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def called(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """A model of 2 x, its engine, and inputs: the made-up TensorRT computes 2 x."""
    plant(monkeypatch, "10.9.0.34")
    model = save_model(graph("(float[1,8] x) => (float[1,8] y) { y = Add (x, x) }"), tmp_path / "m")
    np.savez(tmp_path / "data.npz", x=X)
    engine = str(tmp_path / "e.engine")
    document = called("build", str(model), "-o", engine, "--target", "tensorrt")
    assert document["target"] == "tensorrt:sm89"
    return str(model), engine, str(tmp_path / "data.npz")


def test_run(files: tuple[str, str, str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X[:1])
    called("run", files[1], "--input", f"x={tmp_path / 'x.npy'}", "--output-dir", str(tmp_path))
    assert (np.load(tmp_path / "y.npy") == 2 * X[:1]).all()


def test_compare(files: tuple[str, str, str]) -> None:
    document = called("compare", files[0], files[1], "--data", files[2])
    (output,) = document["outputs"]
    assert output["max_abs"] == 0


def test_bench(files: tuple[str, str, str]) -> None:
    document = called("bench", files[1], "--duration", "0.05")
    assert document["engine"]["target"] == "tensorrt:sm89"


def test_inspect_and_explain(files: tuple[str, str, str]) -> None:
    document = called("inspect", files[1])
    assert document["runs_here"]
    assert document["plan"]["target"]["tensorrt"]["version"] == "10.9.0.34"
    assert called("explain", files[1])["layers"] == []


@pytest.mark.parametrize("option", [("--trace", "t.json"), ("--roofline",)])
def test_what_looks_into_layers_is_refused(
    option: tuple[str, ...], files: tuple[str, str, str]
) -> None:
    result = CliRunner().invoke(app, ["explain", files[1], *option])
    assert result.exit_code == 2
    assert "tensorrt:sm89" in result.output

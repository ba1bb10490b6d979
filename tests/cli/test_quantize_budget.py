"""`twofour quantize --max-drop`: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.evaluate.networks import network, samples, save, weights
from tests.evaluate.test_compare import outputs
from twofour.cli import app
from twofour.evaluate import budget
from twofour.onnx_tools.inspect import patterns_of
from twofour.onnx_tools.load import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A channel that c0 makes large and c1 makes small again: one scale for all cannot be good."""
    here = tmp_path_factory.mktemp("budget")
    arrays = weights(5)
    arrays["c0"][:2] *= 3000
    arrays["c1"][:, :2] /= 3000
    dense = save(network(arrays), here / "dense.onnx")
    x = samples(48)
    np.savez(here / "data.npz", x=x, labels=outputs(dense, x).argmax(1))
    np.savez(here / "inputs.npz", x=x[:16])
    return here


def quantize(folder: Path, *more: str) -> Result:
    paths = [str(folder / name) for name in ("dense.onnx", "mixed.onnx")]
    command = ["quantize", paths[0], "-o", paths[1], "--method", "minmax", *more]
    return CliRunner().invoke(app, command, env={"COLUMNS": "100"})


def within(folder: Path, *more: str) -> Result:
    data = ("--data", str(folder / "inputs.npz"), "--eval-data", str(folder / "data.npz"))
    return quantize(folder, *data, "--max-drop", "10", *more)


def test_what_is_left_float_is_said(folder: Path) -> None:
    result = within(folder)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "with 1 layer float" in result.stdout
    assert "float: left float by --max-drop\n  c1 (Conv)" in result.stdout


def test_the_document(folder: Path) -> None:
    found = json.loads(within(folder, "--json").stdout)
    assert [each["layer"] for each in found["mixed"]["layers"] if each["is_float"]] == ["c1"]
    assert found["float_layers"] == [
        {"node": "c1", "op": "Conv", "reason": "left float by --max-drop"}
    ]
    assert found["int8_layers"] == 3
    assert found["mixed"]["dense"] - found["mixed"]["mixed"] <= 10
    assert found["mixed"]["dense"] - found["mixed"]["int8"] > 10


def test_no_drop_is_not_less_than_none(folder: Path) -> None:
    result = json.loads(within(folder, "--tensor", "c[0-9]*=float", "--json").stdout)["mixed"]
    assert str(result["drop"]) == "0.0"


def test_patterns_are_kept(folder: Path) -> None:
    pruned = ["prune", str(folder / "dense.onnx"), "-o", str(folder / "sparse.onnx")]
    assert CliRunner().invoke(app, pruned).exit_code == 0
    command = ["quantize", str(folder / "sparse.onnx"), "-o", str(folder / "less.onnx")]
    data = ["--data", str(folder / "data.npz"), "--max-drop", "10", "--method", "minmax"]
    found = CliRunner().invoke(app, [*command, *data, "--json"])
    assert any(each["is_float"] for each in json.loads(found.stdout)["mixed"]["layers"])
    before, after = (load_model(folder / name) for name in ("sparse.onnx", "less.onnx"))
    assert patterns_of(after) == patterns_of(before)
    assert set(patterns_of(after).values()) == {"2:4"}


def test_beyond_the_budget_nothing_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "float_switches", lambda model, floats: ())
    (folder / "mixed.onnx").unlink(missing_ok=True)
    result = within(folder)
    assert result.exit_code == 1
    assert "no choice of float layers holds --max-drop 10" in result.output
    assert not (folder / "mixed.onnx").exists()


def test_options_of_no_use_are_refused(folder: Path) -> None:
    result = quantize(folder, "--data", str(folder / "data.npz"), "--metric", "top1")
    assert result.exit_code != 0
    assert "--metric is of no use without --max-drop" in result.output

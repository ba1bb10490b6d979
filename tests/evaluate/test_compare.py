"""A model against its engine, from Python and from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner, Result

from tests.evaluate.networks import network, quantized, samples, save, weights
from twofour.cli import app
from twofour.compiler.build import build
from twofour.core.errors import GateError, InputError
from twofour.evaluate import CompareOptions, compare

COUNT = 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """f.onnx with f.engine (batch 1) and f4.engine (batch 4), q.onnx with q.engine, data.npz."""
    here = tmp_path_factory.mktemp("compare")
    model = save(network(weights()), here / "f.onnx")
    source = quantized(model, here / "q.onnx")
    build(model, tuning_effort=0).save(here / "f.engine")
    shape = {"x": (4, *samples(1).shape[1:])}
    build(model, tuning_effort=0, shapes=shape).save(here / "f4.engine")
    build(source, tuning_effort=0).save(here / "q.engine")
    x = samples(COUNT)
    np.savez(here / "data.npz", x=x, labels=outputs(model, x).argmax(1))
    np.savez(here / "unlabelled.npz", x=x)
    return here


def outputs(model: Path, x: np.ndarray) -> np.ndarray:
    found: np.ndarray = onnxruntime.InferenceSession(model).run(None, {"x": x})[0]
    return found


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        app, ["compare", *map(str, arguments)], env={"COLUMNS": "100"}, catch_exceptions=False
    )


@pytest.mark.parametrize("engine", ["f.engine", "f4.engine"])
def test_a_float_engine_equals_its_model_up_to_rounding(folder: Path, engine: str) -> None:
    """21 samples are no multiple of 4: the last batch is filled up, and that is not counted."""
    found = compare(folder / "f.onnx", folder / engine, folder / "data.npz")
    (y,) = found.outputs
    assert (found.samples, y.name, y.shape) == (COUNT, "y", (5,))
    assert y.sqnr_db > 100
    assert found.scores is None


def test_figures_are_those_of_all_outputs_at_once(folder: Path) -> None:
    options = CompareOptions(metric="top1")
    found = compare(folder / "f.onnx", folder / "q.engine", folder / "data.npz", options)
    (y,) = found.outputs
    x = samples(COUNT)
    expected, rounded = outputs(folder / "f.onnx", x), outputs(folder / "q.onnx", x)
    # The engine equals the Q/DQ file up to single steps, so its distance from the model does too.
    noise = ((expected - rounded).astype(np.float64) ** 2).sum()
    sqnr_db = 10 * math.log10((expected.astype(np.float64) ** 2).sum() / noise)
    assert y.sqnr_db == pytest.approx(sqnr_db, abs=1.0)
    assert found.scores is not None
    assert found.scores.reference == 100.0  # the labels are the model's own
    assert found.scores.drop == 100.0 - found.scores.engine


def test_a_limit(folder: Path) -> None:
    wrong = (np.load(folder / "data.npz")["labels"] + 1) % 5
    data = {"x": samples(COUNT), "labels": wrong}
    found = compare(folder / "f.onnx", folder / "f.engine", data, CompareOptions(metric="top1"))
    assert found.scores is not None
    assert (found.scores.reference, found.scores.drop) == (0.0, 0.0)
    found.require(0.0)
    with pytest.raises(GateError, match="top1 drops by 0, more than -1"):
        found.require(-1.0)
    with pytest.raises(InputError, match="a limit needs a metric"):
        compare(folder / "f.onnx", folder / "f.engine", data).require(1.0)


def test_samples_limits_the_data(folder: Path) -> None:
    options = CompareOptions(samples=6)
    assert (
        compare(folder / "f.onnx", folder / "f4.engine", folder / "data.npz", options).samples == 6
    )


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "f.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    other = save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="outputs: expected scores; got y"):
        compare(other, folder / "f.engine", folder / "data.npz")


def test_data_of_another_type_or_shape_is_refused(folder: Path) -> None:
    for x in (samples(3).astype(np.float64), samples(3)[:, :, :5]):
        with pytest.raises(InputError, match="does not fit the model's inputs"):
            compare(folder / "f.onnx", folder / "f.engine", {"x": x})


def test_the_command(folder: Path) -> None:
    data = folder / "data.npz"
    result = invoke(folder / "f.onnx", folder / "q.engine", "--data", data, "--metric", "top1")
    assert result.exit_code == 0
    assert "21 samples" in result.stdout
    assert "top1: model 100.0000 %, engine " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_exit_codes(folder: Path) -> None:
    files = folder / "f.onnx", folder / "q.engine", "--data", folder / "data.npz"
    assert invoke(*files, "--metric", "top1", "--max-drop", "100").exit_code == 0
    shut = invoke(*files, "--metric", "top1", "--max-drop", "-101")
    assert (shut.exit_code, "more than -101" in shut.stderr) == (1, True)
    assert invoke(*files, "--max-drop", "1").exit_code == 2
    assert invoke(*files, "--metric", "top9").exit_code == 2
    unlabelled = invoke(*files[:3], folder / "unlabelled.npz", "--metric", "top1")
    assert (unlabelled.exit_code, "needs labels" in unlabelled.stderr) == (2, True)


def test_json_is_one_document_even_if_the_limit_breaks(folder: Path) -> None:
    files = folder / "f.onnx", folder / "f.engine"
    options = "--data", folder / "data.npz", "--metric", "top1", "--max-drop", "-1", "--json"
    result = invoke(*files, *options)
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (document["passed"], document["max_drop"]) == (False, -1.0)
    assert document["scores"]["drop"] == 0.0
    assert document["outputs"][0]["name"] == "y"

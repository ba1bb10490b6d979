"""Every tensor of a fused engine against the model's of the same name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from typer.testing import CliRunner

from tests.evaluate.networks import CHANNELS, network, quantized, samples, save, weights
from twofour.cli import app
from twofour.compiler.build import build
from twofour.core.data import as_data
from twofour.core.progress import silent
from twofour.engine import Engine
from twofour.evaluate import CompareOptions, Layers, compare
from twofour.evaluate.feeding import engine_forms
from twofour.evaluate.judge import Task
from twofour.evaluate.layers import LayerDifference, compare_layers, marked, tensors_of
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.quantize import quantize
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session

COUNT = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """f.onnx; coarse.onnx and its engine, where the scale of c1.relu is 20 times too large."""
    here = tmp_path_factory.mktemp("layers")
    model = save(network(weights()), here / "f.onnx")
    source = quantized(model, here / "coarse.onnx", "c1.relu")
    shape = {"x": (3, *samples(1).shape[1:])}
    build(source, tuning_effort=0, shapes=shape).save(here / "coarse.engine")
    np.savez(here / "data.npz", x=samples(COUNT))
    return here


def layers_of(folder: Path) -> Layers:
    files = folder / "f.onnx", folder / "coarse.engine", folder / "data.npz"
    found = compare(*files, CompareOptions(layers=True)).layers
    assert found is not None
    return found


def test_the_spoiled_tensor_is_where_it_is_lost(folder: Path) -> None:
    found = layers_of(folder)
    assert [row.value for row in found.rows] == ["x", "c0.relu", "c1.relu", "c2.relu", "flat", "y"]
    by_name = {row.value: row for row in found.rows}
    assert by_name["c1.relu"].layer == "c1"
    assert by_name["c1.relu"].reads == ("c0.relu",)
    assert by_name["c1.relu"].lost_db == max(row.lost_db or 0.0 for row in found.rows)
    assert by_name["c1.relu"].lost_db > 10
    assert by_name["x"].lost_db is None  # the input is exact
    assert found.rows[min(marked(found.rows, most=1))].value == "c1.relu"


def test_energies_are_summed_over_all_samples(folder: Path) -> None:
    """Against one run of both files with all tensors as outputs; 7 samples, 3 at a time."""
    x = samples(COUNT)
    values = []
    for name, tensor in (("f.onnx", "c1.relu"), ("coarse.onnx", "c1.relu_dequantized")):
        model = onnx.load(folder / name)
        model.graph.output.append(helper.make_tensor_value_info(tensor, 1, None))
        session = onnxruntime.InferenceSession(model.SerializeToString())
        values.append(session.run([tensor], {"x": x})[0].astype(np.float64))
    expected, got = values
    sqnr_db = 10 * math.log10((expected**2).sum() / ((expected - got) ** 2).sum())
    (row,) = (row for row in layers_of(folder).rows if row.value == "c1.relu")
    # Scale 20 times too large: a value that the engine rounds another way is a large difference.
    assert row.sqnr_db == pytest.approx(sqnr_db, abs=0.5)
    assert row.reference_max_abs == pytest.approx(np.abs(expected).max(), rel=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 3 * CHANNELS * 36 * 2])
def test_small_chunks_change_nothing(folder: Path, chunk_bytes: int) -> None:
    engine = Engine.load(folder / "coarse.engine")
    reference = Reference(load_model(folder / "f.onnx"), tensors_of(engine.plan))
    task = Task(as_data({"x": samples(COUNT)}, ["x"]), *engine_forms(engine.plan))
    with Session(engine) as session:
        found = compare_layers(session, reference, task, silent, chunk_bytes)
    assert found == layers_of(folder)


def test_a_normalization_that_is_folded_keeps_its_meaning(tmp_path: Path) -> None:
    """The quantized file names a folded convolution's result after the BatchNormalization."""
    model = network(weights())
    rng = np.random.default_rng(3)
    parameters = [rng.uniform(0.5, 4, CHANNELS).astype(np.float32) for _ in range(4)]
    names = ["gamma", "beta", "mean", "variance"]
    for name, array in zip(names, parameters, strict=True):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    norm = helper.make_node("BatchNormalization", ["c0.y", *names], ["c0.bn"], "c0.bn")
    relu = next(node for node in model.graph.node if node.name == "c0.act")
    relu.input[0] = "c0.bn"
    model.graph.node.insert(1, norm)
    path = save(model, tmp_path / "bn.onnx")
    source = quantize(load_model(path), {"x": samples(16)})
    assert "c0.y" not in {value.name for node in source.graph for value in node.outputs}
    engine = build(source, tuning_effort=0)
    found = compare(path, engine, {"x": samples(4)}, CompareOptions(layers=True)).layers
    assert found is not None
    assert found.without == ()
    assert min(row.sqnr_db for row in found.rows) > 20


def test_what_the_model_does_not_have_is_listed(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "f.onnx")
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "renamed" if name == "c1.relu" else name
    other = save(model, tmp_path / "other.onnx")
    files = other, folder / "coarse.engine", folder / "data.npz"
    found = compare(*files, CompareOptions(layers=True)).layers
    assert found is not None
    assert [row.value for row in found.rows] == ["x", "c0.relu", "c2.relu", "flat", "y"]
    (reason,) = found.without
    assert "c1.relu" in reason
    assert "no tensor of this name" in reason


def test_marks_are_few_and_large() -> None:
    lost = [None, 4.0, 9.0, 2.9, -5.0, 3.0]
    rows = [LayerDifference("v", "l", "o", "int8", 1, 1, 1, 1, (), each) for each in lost]
    assert marked(rows) == {1, 2, 5}
    assert marked(rows, most=1) == {2}


def test_the_command(folder: Path) -> None:
    files = [str(folder / name) for name in ("f.onnx", "coarse.engine")]
    command = ["compare", *files, "--data", str(folder / "data.npz"), "--layers"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "100"}, catch_exceptions=False)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "- c1.relu loses " in result.stdout
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [row["value"] for row in document["layers"]["rows"]][1:3] == ["c0.relu", "c1.relu"]

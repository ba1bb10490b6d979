"""2:4 weights in INT8 take 0.625 to 0.75 of the bytes of dense ones: of real engines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.cli.structure import GOLDEN, merged, structure
from tests.sample_models import conv_model
from twofour.bench.sizes import compare, saved, size_of
from twofour.cli import app
from twofour.compiler.build import build
from twofour.core.errors import InputError
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize

CHANNELS, WIDTH = 128, 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """f32.onnx of two layers; dense.engine and sparse.engine in INT8, f32.engine."""
    folder = tmp_path_factory.mktemp("sizes")
    random = np.random.default_rng(0)
    nodes, weights = [], []
    for name, source, result in (("first", "x", "h"), ("second", "r", "y")):
        weight = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 16
        weights.append(numpy_helper.from_array(weight, f"w_{name}"))
        nodes.append(helper.make_node("MatMul", [source, f"w_{name}"], [result], name=name))
    nodes.insert(1, helper.make_node("Relu", ["h"], ["r"], name="relu"))
    shape = [CHANNELS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "f32.onnx")
    data = {"x": random.standard_normal(shape).astype(np.float32)}
    pruned, _ = prune(load_model(folder / "f32.onnx"))
    save_model(quantize(load_model(folder / "f32.onnx"), data), folder / "int8.onnx")
    save_model(quantize(pruned, data), folder / "less.onnx")
    options = {"tuning_effort": 0, "race": False}
    build(folder / "f32.onnx", **options).save(folder / "f32.engine")
    build(folder / "int8.onnx", **options).save(folder / "dense.engine")
    build(folder / "less.onnx", sparsity="force", **options).save(folder / "sparse.engine")
    return folder


def test_sparse_int8_takes_less_than_dense(folder: Path) -> None:
    names = ("sparse.engine", "dense.engine", "f32.engine", "f32.onnx")
    sizes = [size_of(folder / name) for name in names]
    sparse, dense, float32, file = (size.weight_bytes for size in sizes)
    assert file == 2 * 4 * WIDTH * WIDTH
    assert file <= float32 < 1.1 * file
    assert 2 * WIDTH * WIDTH <= dense < 1.1 * 2 * WIDTH * WIDTH
    found = saved(sizes[0], sizes[1])
    assert found is not None
    assert (found.layers, found.sparse_bytes, found.dense_bytes) == (2, sparse, dense)
    assert 0.625 <= found.weights_alone <= 0.75
    assert found.weights_alone < found.ratio < found.weights_alone + 0.03
    assert [size.weights for size in sizes] == [
        "2:4 int8",
        "dense int8",
        "dense float32",
        "dense float32",
    ]
    for size, name in zip(sizes, names, strict=True):
        assert size.file_bytes == (folder / name).stat().st_size


def test_each_layer(folder: Path) -> None:
    rows = compare(
        [size_of(folder / name) for name in ("sparse.engine", "dense.engine", "f32.onnx")]
    )
    assert len(rows) == 2
    for row in rows:
        sparse, dense, file = row.weight_bytes
        assert row.elements == WIDTH * WIDTH
        assert row.tactic.startswith("2:4")
        assert sparse < 0.8 * dense < 0.8 * 1.1 * WIDTH * WIDTH
        assert file == 4 * WIDTH * WIDTH


def test_dense_beside_dense_saves_nothing(folder: Path) -> None:
    dense, float32 = size_of(folder / "dense.engine"), size_of(folder / "f32.engine")
    assert saved(dense, float32) is None
    assert saved(dense, dense) is None
    assert saved(size_of(folder / "sparse.engine"), float32) is None


def test_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    conv_model(tmp_path / "conv.onnx", scale=0.2)
    with pytest.raises(InputError, match=r"conv\.onnx is no other form of sparse\.engine"):
        compare([size_of(folder / "sparse.engine"), size_of(tmp_path / "conv.onnx")])


def test_explain_shows_it(folder: Path) -> None:
    others = [f"--beside={folder / name}" for name in ("dense.engine", "f32.engine", "f32.onnx")]
    arguments = ["explain", str(folder / "sparse.engine"), *others]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "2 layers are 2:4 int8, and dense int8 in dense.engine" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["schema"] == "twofour.explain.sizes/1"
    golden = json.loads((GOLDEN / "explain.sizes.json").read_text())
    assert merged(golden, structure(found)) == golden
    (gain,) = found["sparse_int8"]
    assert gain["beside"] == "dense.engine"
    assert 0.625 <= gain["weights_alone"] <= 0.75
    alone = CliRunner().invoke(app, ["explain", str(folder / "sparse.engine"), "--sizes"])
    assert alone.exit_code == 0
    assert "sparse.engine" in alone.stdout

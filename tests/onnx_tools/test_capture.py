"""Captured sums against those of the rows that numpy takes from the same inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.compiler.engines import reference
from twofour.core.data import as_data
from twofour.core.errors import InputError, UnsupportedError
from twofour.onnx_tools import capture as module
from twofour.onnx_tools import runner
from twofour.onnx_tools.capture import (
    Reading,
    Samples,
    capture,
    gram,
    reading_of,
    squares,
    why_unreadable,
)
from twofour.onnx_tools.weights import layer_weights

RANDOM = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model(body: str, **arrays: np.ndarray) -> ir.Model:
    text = f'<ir_version: 9, opset_import: ["": 17]> g {body}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    found = ir.from_proto(proto)
    for index, node in enumerate(found.graph):
        node.name = f"n{index}"
    return found


def readings(found: ir.Model) -> list[Reading]:
    return [reading_of(layer, weight) for layer, weight in layer_weights(found)]


def sums(found: ir.Model, data: object, statistic=gram, **options) -> list[np.ndarray]:
    names = [value.name for value in found.graph.inputs]
    wanted = readings(found)
    got = capture(found, wanted, statistic, Samples(as_data(data, names), **options))
    return [got[each] for each in wanted]


def outputs_of(found: ir.Model, weight: np.ndarray, layer_sum: np.ndarray, y: np.ndarray) -> None:
    """The sum of y^2 of each output channel is that of w G w^T: whatever the layer's form.

    Args:
        weight: [N, C, ...].
        layer_sum: [groups, K, K].
        y: [..., N] of the layer without bias.
    """
    rows = np.moveaxis(weight, 1, -1).reshape(len(layer_sum), -1, layer_sum.shape[-1])
    got = np.einsum("gnk,gkl,gnl->gn", rows, layer_sum, rows).ravel()
    want = np.square(y.astype(np.float64)).reshape(-1, y.shape[-1]).sum(0)
    assert np.allclose(got, want, rtol=1e-4)


CONVS = [
    ((6, 4, 9), (8, 4, 3), "pads = [1, 1]"),
    ((6, 4, 9), (8, 4, 4), "strides = [3], dilations = [2], pads = [0, 5]"),
    ((3, 4, 8, 7), (8, 4, 3, 3), "pads = [1, 1, 1, 1]"),
    ((3, 4, 8, 7), (8, 4, 1, 1), "strides = [2, 2]"),
    ((3, 8, 8, 7), (12, 4, 3, 2), "group = 2, pads = [1, 0, 2, 1], strides = [2, 1]"),
    ((3, 4, 8, 7), (8, 4, 3, 2), 'auto_pad = "SAME_UPPER", strides = [2, 2]'),
    ((3, 4, 8, 7), (8, 4, 3, 2), 'auto_pad = "SAME_LOWER", strides = [2, 1]'),
    ((3, 4, 8, 7), (8, 4, 3, 2), 'auto_pad = "VALID"'),
    ((2, 4, 5, 6, 4), (8, 4, 2, 3, 1), "pads = [1, 0, 0, 0, 1, 2]"),
]


@pytest.mark.parametrize(("x", "w", "attributes"), CONVS)
@pytest.mark.parametrize("piece_bytes", [1, 4000, 2**26])
def test_the_rows_of_a_convolution(
    x: tuple, w: tuple, attributes: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    dims, weight, array = ",".join(["b", *map(str, x[1:])]), floats(*w), floats(*x)
    open_dims = ",".join(f"d{i}" for i in range(len(x)))
    found = model(
        f"(float[{dims}] x) => (float[{open_dims}] y) {{ y = Conv <{attributes}> (x, w) }}",
        w=weight,
    )
    (got,) = sums(found, {"x": array})
    y = reference(found, {"x": array})["y"]
    outputs_of(found, weight, got, np.moveaxis(y, 1, -1))
    (norms,) = sums(found, {"x": array}, squares)
    assert np.allclose(norms, np.diagonal(got, axis1=1, axis2=2), rtol=1e-5)


def test_the_rows_of_gemm_and_matmul() -> None:
    body = """(float[b,8] x, float[b,2,3,8] z) => (y1, y2, y3, y4) {
        y1 = Gemm (x, a)  y2 = Gemm <transB = 1> (x, c)
        u = Transpose (x) y3 = Gemm <transA = 1> (u, a)  y4 = MatMul (z, a)
    }"""
    a, c = floats(8, 6), floats(6, 8)
    found, data = model(body, a=a, c=c), {"x": floats(7, 8), "z": floats(7, 2, 3, 8)}
    got, y = sums(found, data), reference(found, data)
    for weight, each, name in zip((a.T, c, a.T, a.T), got, ("y1", "y2", "y3", "y4"), strict=True):
        outputs_of(found, weight, each, y[name])
    wanted = readings(found)
    assert wanted[0] == wanted[1]
    assert len(set(wanted)) == 3


def test_one_gram_matrix_for_layers_that_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "(float[b,8] x) => (q, k, v) { q = MatMul (x, a) k = MatMul (x, c) v = MatMul (x, d) }"
    found = model(body, a=floats(8, 4), c=floats(8, 4), d=floats(8, 4))
    counted: list[int] = []

    def counting(rows: np.ndarray) -> np.ndarray:
        counted.append(rows.shape[1])
        return gram(rows)

    sums(found, {"x": floats(5, 8)}, counting)
    assert counted == [5]


def test_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "(float[b,4,6,6] x) => (y) { r = Relu (x) y = Conv (r, w) }"
    found, x = model(body, w=floats(8, 4, 3, 3)), floats(70, 4, 6, 6)
    (whole,) = sums(found, {"x": x})
    (first,) = sums(found, {"x": x[:50]})
    (limited,) = sums(found, {"x": x}, limit=50)
    assert np.array_equal(first, limited)
    monkeypatch.setattr(runner, "MAX_BATCH", 7)
    assert np.allclose(sums(found, {"x": x})[0], whole, rtol=1e-5)
    told: list[tuple[int, int | None]] = []
    capture(
        found,
        readings(found),
        gram,
        Samples(as_data({"x": x[:20]}, ["x"])),
        lambda done, total, what: told.append((done, total)),
    )
    assert told == [(7, 20), (14, 20), (20, 20)]


def test_only_what_the_readings_need_is_run() -> None:
    """The rest of this model would fail on the data."""
    body = """(float[b,8] x, float[b,8] bad) => (y) {
        r = Relu (x) m = MatMul (r, a) s = Reshape (bad, shape) y = Add (m, s) }"""
    found = model(body, a=floats(8, 6), shape=np.array([1, 5, 77], np.int64))
    data = {"x": floats(4, 8), "bad": floats(4, 8)}
    (got,) = sums(found, data)
    rows = np.maximum(data["x"], 0)
    assert np.allclose(got[0], rows.T @ rows, rtol=1e-5)
    assert len(found.graph) == 4
    assert [value.name for value in found.graph.outputs] == ["y"]


def test_bad_data_is_refused() -> None:
    body = "(float[b,8] x) => (y) { l = Log (x) y = MatMul (l, a) }"
    found = model(body, a=floats(8, 6))
    x = np.ones((4, 8), np.float32)
    x[2, 3] = 0
    with pytest.raises(InputError, match=r"(?s)tensor 'l' is not finite.*samples 0 to 3"):
        sums(found, {"x": x})
    with pytest.raises(InputError, match="does not fit"):
        sums(found, {"x": x[:, :5]})
    with pytest.raises(InputError, match="holds no samples"):
        sums(found, {"x": x[:0]})
    foreign = model("(float[b,8] x) => (y) { l = Unheard (x) y = MatMul (l, a) }", a=floats(8, 6))
    with pytest.raises(UnsupportedError, match="cannot load the model for calibration"):
        sums(foreign, {"x": x})


def test_a_layer_that_no_row_reaches_has_no_sum() -> None:
    body = """(float[b,8] x) => (y) {
        none = Slice (x, zero, zero, zero) y = MatMul (none, a) }"""
    found = model(body, a=floats(8, 6), zero=np.array([0], np.int64))
    names = ["x"]
    got = capture(found, readings(found), gram, Samples(as_data({"x": floats(3, 8)}, names)))
    assert got == {}


def test_what_cannot_be_captured_says_why() -> None:
    body = """(float[b,8] x, bool c) => (y, m, k, j) {
        y = If (c) <
            then_branch = t () => (float[b,6] p) { p = MatMul (x, a) },
            else_branch = e () => (float[b,6] q) { q = MatMul (x, a) }
        >
        m = MatMul (x, batched)  k = MatMul (fixed, a)
        d = DequantizeLinear (int8s, scale)  j = MatMul (x, d)
    }"""
    found = model(
        body,
        a=floats(8, 6),
        batched=floats(2, 8, 6),
        fixed=floats(3, 8),
        int8s=np.ones((8, 6), np.int8),
        scale=np.float32(0.5),
    )
    reasons = [why_unreadable(found, layer, weight) for layer, weight in layer_weights(found)]
    assert sum("body of If, Loop or Scan" in reason for reason in reasons) == 2
    rest = [reason for reason in reasons if "body of" not in reason]
    assert rest == [
        "its weight has 3 dimensions, expected one matrix",
        "its input is constant",
        "its weight is stored as int8, expected floats",
    ]

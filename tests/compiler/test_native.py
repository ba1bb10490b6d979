"""Nodes read as native operators: their constants as kernels want them, and each refusal."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import graph
from twofour.compiler import native_fused
from twofour.compiler.native import ConvOp, MapOp, NativeOp, PoolOp, extent
from twofour.compiler.ops import Variant
from twofour.compiler.passes import pipeline
from twofour.compiler.schedule import read
from twofour.core.functions import Activation
from twofour.core.numerics import MAX_K, Window

X = "(float[2,16,6,6] x)"
QX = "(int8[2,16,6,6] x)"
SCALES = "<float s = {0.5}, int8 z = {3}, float t = {0.25}, uint8 u = {7}>"


def weights(*shape: int, dtype=np.float32) -> np.ndarray:
    random = np.random.default_rng(0)
    if dtype == np.int8:
        return random.integers(-127, 128, shape).astype(np.int8)
    return random.normal(size=shape).astype(dtype)


def read_one(body: str, op_type: str, **constants: np.ndarray) -> NativeOp | str:
    """The first node of that type after the passes, read."""
    fused = pipeline.run_passes(graph(body, **constants)).model
    node = next(n for n in fused.graph if n.op_type == op_type)
    return read(node)


def q_conv(
    tail: str, y: str = "uint8[2,8,6,6] y", inputs: str = QX, scales: str = SCALES, **extra
) -> dict:
    """Conv on int8 x with int8 weights, and what comes after `c`, its float result."""
    body = (
        f"{inputs} => ({y}) {scales}"
        "{ f = DequantizeLinear (x, s, z) w = DequantizeLinear <axis = 0> (k, ks)"
        " c = Conv <pads = [1,1,1,1]> (f, w, b) " + tail + "}"
    )
    ks = np.linspace(0.01, 0.02, 8).astype(np.float32)
    b = np.arange(8, dtype=np.float32)
    return {"body": body, "k": weights(8, 16, 3, 3, dtype=np.int8), "ks": ks, "b": b, **extra}


def test_integer_convolution() -> None:
    """Scales divided by y_scale; zero points as stored, plus 128; that of y is in the bias."""
    given = q_conv("r = Relu (c) y = QuantizeLinear (r, t, u)")
    op = read_one(op_type="QConvRelu", **given)
    assert isinstance(op, ConvOp)
    assert (op.kind, op.x, op.y, op.r, op.add, op.groups) == ("conv", "x", "y", "", "", 1)
    assert op.window == Window((3, 3), pads=(1, 1, 1, 1))
    assert (op.w == given["k"]).all()
    assert op.x_zero == 131
    e = op.epilogue
    assert (e.activation, e.zero_point, e.unsigned) == (Activation("Clip", 7.0), 0, True)
    assert e.bias.tolist() == (given["b"] / 0.25 + 7).tolist()
    exact = 0.5 * given["ks"].astype(np.float64) / 0.25
    assert (e.scale == exact.astype(np.float32)).all()


def test_integer_convolution_with_float_output() -> None:
    op = read_one(op_type="QConvF", **q_conv("y = Identity (c)", "float[2,8,6,6] y"))
    assert isinstance(op, ConvOp)
    assert op.epilogue.zero_point is None
    assert op.epilogue.scale.dtype == np.float32
    assert op.epilogue.bias.tolist() == list(range(8))


def test_integer_residual() -> None:
    tail = "q = DequantizeLinear (r, rs, z) a = Add (c, q) y = QuantizeLinear (a, t, u)"
    inputs = "(int8[2,16,6,6] x, int8[2,8,6,6] r)"
    op = read_one(op_type="QConvAdd", **q_conv(tail, inputs=inputs, rs=np.array(0.75, np.float32)))
    assert isinstance(op, ConvOp)
    assert (op.r, op.add) == ("r", "int8")
    assert op.epilogue.residual_scale == 3.0
    plain = read_one(op_type="QConv", **q_conv("y = QuantizeLinear (c, t, u)"))
    assert isinstance(plain, ConvOp)
    assert (op.epilogue.bias == plain.epilogue.bias - 3.0 * 131).all()  # its zero point


def test_float_residual_of_an_integer_convolution() -> None:
    tail = "a = Add (c, r) y = QuantizeLinear (a, t, u)"
    inputs = "(int8[2,16,6,6] x, float[2,8,6,6] r)"
    op = read_one(op_type="QConvAddFloat", **q_conv(tail, inputs=inputs))
    assert isinstance(op, ConvOp)
    assert (op.r, op.add) == ("r", "float32")
    assert op.epilogue.residual_scale == 4.0


def test_float_product_of_any_rank() -> None:
    for shape, dims in (("[3,8]", (3, 1, 1, 8)), ("[2,3,8]", (6, 1, 1, 8))):
        body = f"(float{shape} x) => (float{shape} y) {{ y = MatMul (x, w) }}"
        op = read_one(body, "Gemm", w=weights(8, 8))
        assert isinstance(op, ConvOp)
        assert op.w.shape == (8, 8, 1, 1)
        assert op.epilogue.scale.tolist() == [1] * 8
        assert extent(tuple(int(d) for d in shape[1:-1].split(","))) == dims


def test_quantizers_and_pools() -> None:
    quantize = read_one(f"{X} => (int8[2,16,6,6] y) {SCALES} {{ y = QuantizeLinear (x, s, z) }}",
                        "QuantizeLinear")  # fmt: skip
    assert isinstance(quantize, MapOp)
    assert (quantize.op, quantize.constants.y_scale, quantize.constants.y_zero) == (
        "convert", 0.5, 131)  # fmt: skip
    back = read_one(f"{QX} => (float[2,16,6,6] y) {SCALES} {{ y = DequantizeLinear (x, s, z) }}",
                    "DequantizeLinear")  # fmt: skip
    assert isinstance(back, MapOp)
    assert (back.constants.x_scale, back.constants.x_zero) == (0.5, 131)
    body = (
        f"{QX} => (uint8[2,16,1,1] y) {SCALES} {{ f = DequantizeLinear (x, s, z)"
        " g = GlobalAveragePool (f) y = QuantizeLinear (g, t, u) }"
    )
    mean = read_one(body, "QGlobalAveragePool")
    assert isinstance(mean, PoolOp)
    assert (mean.op, mean.scale, mean.x_zero, mean.y_zero) == ("mean", 2.0, 131, 7)
    body = (
        f"{X} => (float[2,16,3,3] y) {{ y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) }}"
    )
    maximum = read_one(body, "MaxPool")
    assert isinstance(maximum, PoolOp)
    assert maximum.window == Window((2, 2), (2, 2))


@pytest.mark.parametrize(
    ("shape", "to", "free"),
    [
        ("[2,16,1,1]", [2, 16], True),
        ("[2,16,1,1]", [0, -1], True),
        ("[2,3,16]", [6, 16], True),
        ("[2,16,6,6]", [2, 576], False),
        ("[2,16,1]", [2, 16, 1, 1], False),
        ("[2,5,1]", [2, 5], False),
        ("[16]", [1, 16], True),
        ("[16]", [16, 1], False),
        ("[1]", [], False),
    ],
)
def test_only_reshapes_that_keep_the_channels_last_are_free(shape, to, free) -> None:
    value = np.array(to, np.int64)
    out = "float[]" if not to else "float" + "[" + ",".join("d" for _ in to) + "]"
    body = f"(float{shape} x) => ({out.replace('[]', '')} y) {{ y = Reshape (x, to) }}"
    op = read_one(body, "Reshape", to=value)
    assert isinstance(op, NativeOp)
    assert (op.kind, op.x, op.y) == ("alias" if free else "nd", "x", "y")


REFUSALS = {
    "no kernel": (f"{X} => (float[2,16,6,6] y) {{ y = Sin (x) }}", "Sin", {},
                  "no native kernel for Sin"),
    "3-D": ("(float[1,4,8,8,8] x) => (float[1,4,6,6,6] y) { y = Conv (x, w) }", "Conv",
            {"w": weights(4, 4, 3, 3, 3)}, "no native kernel for Conv"),
    "4-D product": ("(float[1,2,3,8] x) => (float[1,2,3,5] y) { y = MatMul (x, w) }", "Gemm",
                    {"w": weights(8, 5)}, "at most 3 dimensions"),
    "constant residual": (f"{X} => (float[2,16,6,6] y) {{ c = Conv (x, w) y = Add (c, k) }}",
                          "ConvAdd", {"w": weights(16, 16, 1, 1), "k": weights(2, 16, 6, 6)},
                          "operand k is a constant"),
    "ceil": (f"{X} => (float[2,16,3,3] y)"
             "{ y = MaxPool <kernel_shape = [2,2], strides = [2,2], ceil_mode = 1> (x) }",
             "MaxPool", {}, "ceil_mode"),
    "auto_pad": (f"{X} => (float[2,16,6,6] y)"
                 '{ y = MaxPool <kernel_shape = [2,2], auto_pad = "SAME_UPPER"> (x) }',
                 "MaxPool", {}, "auto_pad"),
    "1-D pool": ("(float[1,4,8] x) => (float[1,4,4] y)"
                 "{ y = MaxPool <kernel_shape = [2], strides = [2]> (x) }",
                 "MaxPool", {}, "pooling is 2-D"),
    "indices": (f"{X} => (float[2,16,3,3] y, int64[2,16,3,3] i)"
                "{ y, i = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) }",
                "MaxPool", {}, "indices"),
    "double": ("(double[2,16,6,6] x) => (double[2,16,6,6] y) { y = Relu (x) }", "Relu", {},
               "float32"),
    "int32": ("(int32[2,16,6,6] x) => (float[2,16,6,6] y) <float s = {0.5}, int32 z = {0}>"
              "{ y = DequantizeLinear (x, s, z) }", "DequantizeLinear", {}, "dequantizes INT32"),
    "per channel": (f"{X} => (int8[2,16,6,6] y) {{ y = QuantizeLinear <axis = 1> (x, s, z) }}",
                    "QuantizeLinear", {"s": np.ones(16, np.float32), "z": np.zeros(16, np.int8)},
                    "per channel"),
    "moving scale": ("(float[2,16,6,6] x, float s) => (uint8[2,16,6,6] y) <uint8 z = {0}>"
                     "{ y = QuantizeLinear (x, s, z) }", "QuantizeLinear", {},
                     "s is not a constant"),
    "empty": ("(float[0,16,6,6] x) => (float[0,16,6,6] y) { y = Conv (x, w) }", "Conv",
              {"w": weights(16, 16, 1, 1)}, "x is empty"),
    "unknown shape": ("(float[n,16] x) => (float[n,16] y) { y = Relu (x) }", "Relu", {},
                      "the shape of x is not known"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "op_type", "constants", "reason"), REFUSALS.values(), ids=REFUSALS
)
def test_refused_with_the_reason(body, op_type, constants, reason) -> None:
    found = read_one(body, op_type, **constants)
    assert isinstance(found, str)
    assert reason in found


def test_sums_that_could_overflow_are_refused() -> None:
    given = q_conv("y = QuantizeLinear (c, t, u)")
    body = given["body"].replace("[2,16,6,6] x", f"[1,{MAX_K + 1},1,1] x")
    given["body"] = body.replace("[1,1,1,1]", "[0,0,0,0]").replace("[2,8,6,6]", "[1,8,1,1]")
    given["k"] = np.ones((8, MAX_K + 1, 1, 1), np.int8)
    found = read_one(op_type="QConv", **given)
    assert isinstance(found, str)
    assert f"{MAX_K + 1} products" in found


def test_every_reader_stands_for_a_fused_operator() -> None:
    assert {str(Variant(base)) for base in native_fused.READERS} == set(native_fused.READERS)

"""Quantization at run time: the file computes its definition, on ONNX Runtime and on OpenVINO."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import openvino as ov
import pytest

from tests.graphs import graph, run
from tests.onnx_tools.networks import option_a, sparse
from twofour.core.dynamic import quantize_rows
from twofour.core.errors import GateError, InputError
from twofour.core.numerics import integer_matmul
from twofour.core.patterns import is_pattern
from twofour.core.rounding import quantize_weight
from twofour.onnx_tools.dynamic import quantize_dynamic, quantize_dynamic_with_report
from twofour.onnx_tools.eligible import NothingToQuantizeError, count_integer
from twofour.onnx_tools.inspect import inspect
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.promises import check, promise
from twofour.onnx_tools.weights import layer_weights

RNG = np.random.default_rng(8)
K, N = 40, 24
W = RNG.normal(size=(K, N)).astype(np.float32)
B = RNG.normal(size=N).astype(np.float32)
HEAD = f"(float[2,3,{K}] x) => (float[2,3,{N}] y)"
EPS = float(np.finfo(np.float32).eps)


def rows() -> np.ndarray:
    """Rows of very different sizes, one of zeros."""
    x = RNG.normal(size=(2, 3, K)) * np.exp(RNG.normal(0, 3, (2, 3, 1)))
    x[1, 1] = 0
    return x.astype(np.float32)


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What the definition gives for x @ w, in the file's order of operations."""
    w8, scale = quantize_weight(w, 1)
    q = quantize_rows(x.reshape(-1, w.shape[0]))
    sums = integer_matmul(q.bytes, w8.T, 128).astype(np.float32)
    return (sums * q.scale * scale).reshape(*x.shape[:-1], w.shape[1])


def optimized(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """ONNX Runtime with all its fusions."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(data, options).run(None, {"x": x})[0]


def openvino(model: ir.Model, x: np.ndarray) -> np.ndarray:
    core = ov.Core()
    read = core.read_model(ir.serde.serialize_model(model).SerializeToString())
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[0]


def linear(opset: int = 18, w: np.ndarray = W) -> ir.Model:
    return graph(f"{HEAD} {{ p = MatMul (x, w) y = Add (p, b) }}", opset, w=w, b=B)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_a_product_is_its_definition_everywhere(opset: int) -> None:
    made, x = quantize_dynamic(linear(opset)), rows()
    assert count_integer(made) == 1
    want = product(x, W) + B
    np.testing.assert_array_equal(run(made, {"x": x})[0], want)
    np.testing.assert_array_equal(optimized(made, x), want)
    # OpenVINO multiplies by the two scales in another order, and sums in float32 (exactly).
    bound = 4 * EPS * (np.abs(want) + np.abs(B))
    assert (np.abs(openvino(made, x) - want) <= bound).all()


def test_it_is_near_the_float_model() -> None:
    x = rows()
    want, got = run(linear(), {"x": x})[0], run(quantize_dynamic(linear()), {"x": x})[0]
    # Half a step of x and half a step of w for each of K products.
    steps = np.abs(x).max(-1, keepdims=True) * np.abs(W).max(0) * K * (0.5 / 127) * 2.1
    assert (np.abs(got - want) <= steps + 1e-5).all()
    assert (got != want).any()


@pytest.mark.parametrize(
    ("alpha", "beta", "flip", "bias"),
    [(1, 1, 0, True), (0.5, 2, 1, True), (-2, 1, 1, False), (0, 0.5, 0, True)],
)
def test_gemm(alpha: float, beta: float, flip: int, bias: bool) -> None:
    attributes = f"alpha = {float(alpha)}, beta = {float(beta)}, transB = {flip}"
    inputs = "x, w, b" if bias else "x, w"
    body = f"(float[6,{K}] x) => (float[6,{N}] y) {{ y = Gemm <{attributes}> ({inputs}) }}"
    constants = {"w": W.T.copy() if flip else W} | ({"b": B} if bias else {})
    made, x = quantize_dynamic(graph(body, **constants)), rows().reshape(6, K)
    want = np.float32(alpha) * product(x, W) + np.float32(beta) * (B if bias else 0)
    np.testing.assert_allclose(run(made, {"x": x})[0], want, rtol=4 * EPS, atol=4 * EPS)


def test_a_bias_that_is_computed_is_added() -> None:
    body = (
        f"(float[6,{K}] x, float[{N}] c) => (float[6,{N}] y) {{ y = Gemm <beta = 2.0> (x, w, c) }}"
    )
    made, x = quantize_dynamic(graph(body, w=W)), rows().reshape(6, K)
    (got,) = run(made, {"x": x, "c": B})
    np.testing.assert_allclose(got, product(x, W) + 2 * B, rtol=4 * EPS, atol=4 * EPS)


def test_what_several_read_is_rounded_once() -> None:
    products = "p = MatMul (x, w) q = MatMul (x, v) r = MatMul (x, w)"
    body = f"{HEAD} {{ {products} s = Add (p, q) y = Add (s, r) }}"
    made = quantize_dynamic(graph(body, w=W, v=W[::-1].copy()))
    count = [node.op_type for node in made.graph]
    assert (count.count("Round"), count.count("MatMulInteger")) == (1, 3)
    assert sum(value.dtype == ir.DataType.INT8 for value in made.graph.initializers.values()) == 2
    assert not {"w", "v"} & set(made.graph.initializers)


def test_names_are_kept() -> None:
    made = quantize_dynamic(linear())
    assert {node.name for node in made.graph if node.op_type == "MatMulInteger"} == {"p"}
    assert [value.name for value in made.graph.outputs] == ["y"]
    only = graph(f"{HEAD} {{ y = MatMul (x, w) }}", w=W)
    assert [value.name for value in quantize_dynamic(only).graph.outputs] == ["y"]


def test_what_stays_float_is_told() -> None:
    made = quantize_dynamic_with_report(option_a())
    assert {each.op for each in made.float_layers} == {"Conv"}
    assert all("only matrix products" in each.reason for each in made.float_layers)
    body = f"{HEAD} {{ p = MatMul (x, w) q = MatMul (x, v) y = Add (p, q) }}"
    two = graph(body, w=W, v=W[::-1].copy())
    kept = quantize_dynamic_with_report(two, QuantizeOptions(exclude=("q",))).float_layers
    assert [(each.node, each.reason) for each in kept] == [("q", "excluded by name")]


def test_zeros_and_promises_are_kept() -> None:
    w = sparse(W.T.copy()).T.copy()
    model = linear(w=w)
    promise(model, {"w": "2:4"})
    made = quantize_dynamic(model)
    ((layer, weight),) = layer_weights(made)
    assert layer.name == "p"
    assert weight.values.dtype == np.int8
    assert is_pattern(weight.values, "2:4")
    (entry,) = check(made).entries
    assert (entry.pattern, entry.layers, entry.broken) == ("2:4", ("p",), "")
    promise(model, {"w": "2:4"})
    model.graph.initializers["w"].const_value = ir.tensor(W, name="w")
    with pytest.raises(GateError, match="breaks the promised"):
        quantize_dynamic(model)


@pytest.mark.parametrize("opset", [13, 18])
def test_a_weight_of_integers_with_a_zero_point_is_found(opset: int) -> None:
    w8 = RNG.integers(0, 256, (8, 6)).astype(np.uint8)
    body = "(uint8[3,8] x) => (int32[3,6] y) { y = MatMulInteger (x, w, a, z) }"
    model = graph(body, opset, w=w8, a=np.uint8(3), z=np.uint8(7))
    ((_, weight),) = layer_weights(model)
    np.testing.assert_array_equal(weight.values, (w8.astype(int) - 7).T)
    assert (weight.as_stored(weight.values) == w8.astype(int) - 7).all()


def test_inspect_tells_them() -> None:
    found = inspect(quantize_dynamic(linear()))
    assert found.quantized_layers == 1
    assert [weight.dynamic for weight in found.weights] == [True]
    assert inspect(linear()).quantized_layers == 0


def test_refusals() -> None:
    made = quantize_dynamic(linear())
    with pytest.raises(NothingToQuantizeError, match="quantized already"):
        quantize_dynamic(made)
    conv = "(float[1,4,8,8] x) => (float[1,4,6,6] y) { y = Conv (x, w) }"
    with pytest.raises(NothingToQuantizeError, match="nothing to quantize") as error:
        quantize_dynamic(graph(conv, w=np.ones((4, 4, 3, 3), np.float32)))
    assert "only matrix products" in str(error.value.reasons)
    for shape in ((0, 6), (8, 0)):
        empty = graph(f"(float[3,{shape[0]}] x) => (float[3,{shape[1]}] y) {{ y = MatMul (x, w) }}",
                      w=np.zeros(shape, np.float32))  # fmt: skip
        with pytest.raises(NothingToQuantizeError) as error:
            quantize_dynamic(empty)
        assert "its weight is empty" in str(error.value.reasons)
    with pytest.raises(InputError, match="not finite"):
        quantize_dynamic(linear(w=np.where(W > 2, np.nan, W).astype(np.float32)))
    with pytest.raises(InputError, match="matches no node"):
        quantize_dynamic(linear(), QuantizeOptions(exclude=("nobody",)))

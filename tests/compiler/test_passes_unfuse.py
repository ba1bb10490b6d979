"""Operators of ONNX Runtime as standard ones: equal results, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import apply, check, graph, op_types, refusal, run
from twofour.compiler.importer import import_graph
from twofour.compiler.passes import (
    unfuse_conv,
    unfuse_gelu,
    unfuse_gemm,
    unfuse_norm,
    unfuse_qlinear,
)
from twofour.compiler.passes.pipeline import run_passes

RANDOM = np.random.default_rng(5)
# Sums of at most 72 products around 1, in another order.
SUMS = 2e-5


def w(*shape: int) -> np.ndarray:
    return (RANDOM.normal(size=shape) / 3).astype(np.float32)


CONV = "(float[1,8,6,6] x, float[1,8,6,6] z) => (float[1,8,6,6] y)"


@pytest.mark.parametrize(
    ("name", "attributes", "inputs", "after"),
    [
        ("relu", 'activation = "Relu"', "x, k, b", ["Conv", "Relu"]),
        ("residual", 'activation = "Relu"', "x, k, b, z", ["Conv", "Add", "Relu"]),
        ("", 'activation = "Relu"', "x, k, , z", ["Conv", "Add", "Relu"]),
        ("", 'activation = "LeakyRelu", activation_params = [0.2]', "x, k", ["Conv", "LeakyRelu"]),
        ("clip", 'activation = "Clip", activation_params = [0.0, 6.0]', "x, k", ["Conv", "Clip"]),
        ("", 'activation = "HardSigmoid", activation_params = [0.2, 0.4]', "x, k",
         ["Conv", "HardSigmoid"]),
        ("", 'activation = "Tanh"', "x, k", ["Conv", "Tanh"]),
    ],
)  # fmt: skip
def test_convolutions(golden, name, attributes, inputs, after) -> None:
    body = f"{CONV} {{ y = com.microsoft.FusedConv <pads = [1,1,1,1], {attributes}> ({inputs}) }}"
    model = graph(body, k=w(8, 8, 3, 3), b=w(8))
    assert op_types(check(unfuse_conv, golden if name else None, model, name, SUMS)) == after


def test_an_unknown_activation_is_left_alone() -> None:
    body = f'{CONV} {{ y = com.microsoft.FusedConv <activation = "Elu"> (x, k) }}'
    model = graph(body, k=w(8, 8, 1, 1))
    assert "its activation is 'Elu'" in refusal(unfuse_conv, model)


@pytest.mark.parametrize(
    ("name", "node", "after"),
    [
        ("gemm", 'FusedGemm <transB = 1, alpha = 0.5, activation = "Relu"> (x, w, c)',
         ["Gemm", "Relu"]),
        ("", 'FusedGemm <transB = 1, activation = "LeakyRelu", activation_alpha = 0.3> (x, w)',
         ["Gemm", "LeakyRelu"]),
        ("matmul", "FusedMatMul <transB = 1, alpha = 0.25> (x, w)", ["Transpose", "MatMul", "Mul"]),
        ("", "FusedMatMul (x, v)", ["MatMul"]),
        ("", "FusedMatMul <transA = 1> (x, r)", ["Transpose", "MatMul"]),
    ],
)  # fmt: skip
def test_products(golden, name, node, after) -> None:
    ends = "[8,3]" if "transA" in node else "[4,5]"
    model = graph(f"(float[4,8] x) => (float{ends} y) {{ y = com.microsoft.{node} }}",
                  w=w(5, 8), v=w(8, 5), c=w(5), r=w(4, 3))  # fmt: skip
    assert op_types(check(unfuse_gemm, golden if name else None, model, name, SUMS)) == after


def test_a_product_of_batches_moves_the_first_axis() -> None:
    body = "(float[2,3,4] x, float[3,4,5] z) => (float[3,2,5] y)"
    model = graph(f"{body} {{ y = com.microsoft.FusedMatMul <transBatchA = 1> (x, z) }}")
    check(unfuse_gemm, None, model, bound=SUMS)


def test_a_product_of_an_operand_of_unknown_rank_is_left_alone() -> None:
    model = graph("(float[4,8] x) => (float[4,4] y) { y = com.microsoft.FusedMatMul <transB=1>"
                  " (x, x) }")  # fmt: skip
    model.graph.inputs[0].shape = None
    answer = unfuse_gemm.rule(model.graph[0])
    assert "no known number of dimensions" in answer.reason


@pytest.mark.parametrize(
    ("name", "node", "bound"),
    [
        ("gelu", "Gelu (x)", 1e-6),
        ("bias", "BiasGelu (x, b)", 1e-6),
        ("fast", "FastGelu (x, b)", 1e-6),
        ("", "FastGelu (x)", 1e-6),
        ("quick", "QuickGelu (x)", 1e-6),
        ("", "QuickGelu <alpha = 1.0> (x)", 1e-6),
    ],
)
def test_activations(golden, name, node, bound) -> None:
    model = graph(f"(float[4,8] x) => (float[4,8] y) {{ y = com.microsoft.{node} }}", b=w(8))
    check(unfuse_gelu, golden if name else None, model, name, bound)


def test_activations_become_native() -> None:
    model = graph("(float[4,8] x) => (float[4,8] y) { m = MatMul (x, k)"
                  " y = com.microsoft.BiasGelu (m, b) }", k=w(8, 8), b=w(8))  # fmt: skip
    assert "GeluTanh" not in op_types(model := run_passes(import_graph(model)).model)
    assert op_types(model) == ["GemmGelu"]


def test_activations_of_halves_are_left_alone() -> None:
    model = graph("(float16[4,8] x) => (float16[4,8] y) { y = com.microsoft.Gelu (x) }")
    assert "expected float32" in refusal(unfuse_gelu, model)


NORM = "(float[2,3,8] x, float[2,3,8] z) => (float[2,3,8] y)"


@pytest.mark.parametrize(
    ("name", "node", "after"),
    [
        ("skip", "SkipLayerNormalization <epsilon = 0.001> (x, z, g, b, c)",
         ["Add", "Add", "LayerNormalization"]),
        ("", "SkipLayerNormalization (x, z, g)", ["Add", "LayerNormalization"]),
        ("simplified", "SkipSimplifiedLayerNormalization <epsilon = 0.001> (x, z, g)",
         ["Add", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]),
    ],
)  # fmt: skip
def test_normalizations(golden, name, node, after) -> None:
    model = graph(f"{NORM} {{ y = com.microsoft.{node} }}", g=w(8), b=w(8), c=w(8))
    assert op_types(check(unfuse_norm, golden if name else None, model, name, 1e-5)) == after


def test_the_sum_of_a_normalization_may_be_read() -> None:
    body = NORM.replace("y)", "y, float[2,3,8] s)")
    node = "y, m, d, s = com.microsoft.SkipLayerNormalization (x, z, g)"
    check(unfuse_norm, None, graph(f"{body} {{ {node} }}", g=w(8)), bound=1e-5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("(float16[2,8] x) => (float16[2,8] y) { y = com.microsoft.SkipLayerNormalization"
         " (x, x, h) }", "expected float32"),
        ("(float[2,8] x) => (float[2,8] y, float[2,1] m)"
         " { y, m = com.microsoft.SkipLayerNormalization (x, x, g) }", "reads its mean"),
    ],
)  # fmt: skip
def test_normalizations_that_are_left_alone(body, reason) -> None:
    assert reason in refusal(unfuse_norm, graph(body, g=w(8), h=w(8).astype(np.float16)))


@pytest.mark.parametrize("op", ["LayerNormalization", "SimplifiedLayerNormalization"])
@pytest.mark.parametrize("opset", [12, 17])
def test_normalizations_in_the_domain_of_an_older_opset(op, opset) -> None:
    """As ONNX Runtime's optimizer writes them."""
    inputs = "x, g" if op.startswith("Simplified") else "x, g, b"
    biases = {} if op.startswith("Simplified") else {"b": w(8)}
    text = f"(float[2,3,8] x) => (float[2,3,8] y) {{ y = {op} <epsilon = 0.01> ({inputs}) }}"
    model = graph(text, 17, g=w(8), **biases)
    model.graph.opset_imports[""] = opset
    feeds = {"x": w(2, 3, 8)}
    imported = import_graph(model)
    assert op not in op_types(imported) or op == "LayerNormalization"
    np.testing.assert_allclose(run(imported, feeds)[0], run(model, feeds)[0], atol=1e-5)


QUANTIZED = {
    "conv": ("(uint8[1,4,5,5] x) => (uint8[1,3,5,5] y)",
             "QLinearConv <pads = [1,1,1,1]> (x, sx, zx, k, sk, zk, sy, zy, b)"),
    "matmul": ("(uint8[2,4] x) => (uint8[2,3] y)",
               "QLinearMatMul (x, sx, zx, m, sm, zm, sy, zy)"),
    "add": ("(uint8[2,4] x, uint8[2,4] z) => (uint8[2,4] y)",
            "com.microsoft.QLinearAdd (x, sx, zx, z, sy, zx, sy, zy)"),
    "mul": ("(uint8[2,4] x, uint8[2,4] z) => (uint8[2,4] y)",
            "com.microsoft.QLinearMul (x, sx, zx, z, sy, zx, sy, zy)"),
    "sigmoid": ("(uint8[2,4] x) => (uint8[2,4] y)",
                "com.microsoft.QLinearSigmoid (x, sx, zx, sq, zq)"),
    "leaky": ("(uint8[2,4] x) => (uint8[2,4] y)",
              "com.microsoft.QLinearLeakyRelu <alpha = 0.3> (x, sx, zx, sy, zy)"),
    "pool": ("(uint8[1,4,5,5] x) => (uint8[1,4,1,1] y)",
             "com.microsoft.QLinearGlobalAveragePool (x, sx, zx, sy, zy)"),
    "concat": ("(uint8[2,4] x, uint8[2,4] z) => (uint8[2,8] y)",
               "com.microsoft.QLinearConcat <axis = 1> (sy, zy, x, sx, zx, z, sy, zx)"),
}  # fmt: skip
NUMBERS = {
    "sx": np.float32(0.05), "zx": np.uint8(128), "sy": np.float32(0.0973), "zy": np.uint8(100),
    "k": RANDOM.integers(-127, 128, (3, 4, 3, 3)).astype(np.int8), "zk": np.int8(0),
    "sk": np.array([0.01, 0.02, 0.015], np.float32), "b": np.array([100, -900, 3], np.int32),
    "m": RANDOM.integers(-127, 128, (4, 3)).astype(np.int8), "zm": np.zeros(3, np.int8),
    "sm": np.array([0.01, 0.02, 0.015], np.float32),
    "sq": np.float32(1 / 256), "zq": np.uint8(0),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_operators_on_quantized_tensors(golden, name) -> None:
    """The float form may move a result that lies between two steps by one."""
    ends, node = QUANTIZED[name]
    model = graph(f"{ends} {{ y = {node} }}", **NUMBERS)
    after = check(unfuse_qlinear, golden if name in ("conv", "matmul", "add") else None, model,
                  name, bound=255)  # fmt: skip
    feeds = {v.name: RANDOM.integers(0, 256, v.shape.numpy()).astype(np.uint8)
             for v in model.graph.inputs}  # fmt: skip
    (want,), (got,) = run(model, feeds), run(after, feeds)
    moved = np.abs(want.astype(int) - got)
    assert moved.max() <= 1
    assert (moved > 0).mean() <= 0.1


def test_quantizers_of_onnxruntime() -> None:
    model = graph("(float[2,4] x) => (float[2,4] y) { q = com.microsoft.QuantizeLinear (x, sx, zx)"
                  " y = com.microsoft.DequantizeLinear (q, sx, zx) }", **NUMBERS)  # fmt: skip
    after = check(unfuse_qlinear, None, model)
    assert {node.domain for node in after.graph} == {""}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("(uint8[2,4] x, float s) => (uint8[2,3] y)"
         "{ y = QLinearMatMul (x, s, zx, m, sm, zm, sy, zy) }", "computed at run time"),
        ("(uint8[1,5,5,4] x) => (uint8[1,1,1,4] y) { y = com.microsoft.QLinearGlobalAveragePool"
         " <channels_last = 1> (x, sx, zx, sy, zy) }", "channels come last"),
        ("(uint8[2,4] x) => (uint8[2,3] y) { y = QLinearMatMul (x, sr, zr, m, sm, zm, sy, zy) }",
         "has 2 scales; expected one"),
    ],
)  # fmt: skip
def test_operators_on_quantized_tensors_that_are_left_alone(body, reason) -> None:
    rows = {"sr": np.array([0.1, 0.2], np.float32), "zr": np.zeros(2, np.uint8)}
    model = graph(body, **NUMBERS, **rows)
    after, refusals = apply(unfuse_qlinear, model)
    assert op_types(after) == op_types(model)
    assert reason in refusals[0].reason


def test_what_they_hide_from_shape_inference_is_known() -> None:
    body = f'{CONV} {{ a = com.microsoft.FusedConv <activation = "Relu"> (x, k)'
    model = graph(body + " s = Shape (a) r = Reshape (z, s) y = Add (a, r) }", k=w(8, 8, 1, 1))
    assert op_types(import_graph(model)) == ["Conv", "Relu", "Add"]


def test_onnxruntime_tells_the_shapes_that_onnx_does_not_know() -> None:
    body = "(float[2,8] x) => (float[a,b,c] y) { e = com.microsoft.ExpandDims (x, at) y = Sin (e) }"
    imported = import_graph(graph(body, at=np.array(1, np.int32)))
    assert [node.outputs[0].shape for node in imported.graph] == [ir.Shape([2, 1, 8])] * 2

"""The passes that give one spelling: quantizers, convolutions, products."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import apply, check, graph, op_types, refusal, run
from twofour.compiler import ops
from twofour.compiler.passes import canonical_conv, canonical_gemm, canonical_quantize

W4 = np.random.default_rng(3).normal(size=(2, 3, 3, 3)).astype(np.float32)


# canonical_quantize


def test_quantizers_get_scalar_parameters_and_zero_points(golden):
    model = graph("""(float[2,3] x) => (float[2,3] y) <float[1] s = {0.1}> {
        q = QuantizeLinear (x, s)
        y = DequantizeLinear <axis = 0> (q, s) }""")
    check(canonical_quantize, golden, model, "scalar")


def test_a_negative_axis_becomes_positive(golden):
    model = graph(
        """(float[2,3] x) => (float[2,3] y) <int8[2,3] w, float[3] s = {1, 2, 3}> {
        f = DequantizeLinear <axis = -1> (w, s)
        y = Add (x, f) }""",
        w=np.arange(6, dtype=np.int8).reshape(2, 3),
    )
    check(canonical_quantize, golden, model, "axis")


def test_output_dtype_gives_the_zero_point_its_type():
    model = graph(
        """(float[2] x) => (int8[2] y) <float s = {0.1}> {
        y = QuantizeLinear <output_dtype = 3> (x, s) }""",
        opset=21,
    )
    answer = canonical_quantize.rule(model.graph[0])
    assert answer.nodes[0].inputs[2].dtype == ir.DataType.INT8


def test_int32_biases_are_left_alone():
    model = graph("""(float[2] x) => (float[2] y) <int32[2] b = {1, 2}, float[1] s = {0.1}> {
        f = DequantizeLinear (b, s)
        y = Add (x, f) }""")
    assert canonical_quantize.rule(model.graph[0]) is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "(float[2] x, float s) => (int8[2] y) <int8 z = {0}> { y = QuantizeLinear (x, s, z) }",
            "its scale or zero point is computed at run time",
        ),
        (
            "(float[2] x, int8 z) => (int8[2] y) <float s = {1}> { y = QuantizeLinear (x, s, z) }",
            "its scale or zero point is computed at run time",
        ),
        (
            "(float16[2] x) => (int8[2] y) <float16 s = {1}, int8 z = {0}>"
            " { y = QuantizeLinear (x, s, z) }",
            "its scale is float16; expected float32",
        ),
        (
            "(int8[2,4] x) => (float[2,4] y) <float[2,2] s = {1, 1, 1, 1}>"
            " { y = DequantizeLinear <axis = 1, block_size = 2> (x, s) }",
            "it is quantized in blocks; expected per tensor or per axis",
        ),
    ],
)
def test_quantizers_that_stay(body, reason):
    assert refusal(canonical_quantize, graph(body, opset=21)) == reason


def test_a_negative_axis_of_an_unknown_tensor_stays():
    model = graph("""(int8[2,2] x) => (float[2,2] y) <float[2] s = {1, 2}> {
        y = DequantizeLinear <axis = -1> (x, s) }""")
    model.graph.inputs[0].shape = None
    answer = canonical_quantize.rule(model.graph[0])
    assert answer.reason == "'x' has no known number of dimensions, its axis is -1"


# canonical_conv


def test_conv_gets_all_attributes_and_a_bias(golden):
    model = graph(
        "(float[1,3,5,5] x) => (float[1,2,3,3] y) <float[2,3,3,3] w> { y = Conv (x, w) }", w=W4
    )
    check(canonical_conv, golden, model, "defaults")


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad_becomes_explicit(mode, stride):
    size = {"VALID": (9 - 4) // stride + 1}.get(mode, -(-9 // stride))
    model = graph(
        f"(float[1,3,9,9] x) => (float[1,2,{size},{size}] y) <float[2,3,4,4] w>"
        f'{{ y = Conv <auto_pad = "{mode}", strides = [{stride}, {stride}]>'
        " (x, w) }",
        w=np.random.default_rng(4).normal(size=(2, 3, 4, 4)).astype(np.float32),
    )
    after, refusals = apply(canonical_conv, model)
    assert not refusals
    assert "auto_pad" not in after.graph[0].attributes
    assert np.array_equal(run(model)[0], run(after)[0])


def test_an_int32_bias_becomes_float(golden):
    model = graph(
        """(float[1,3,5,5] x) => (float[1,2,3,3] y)
        <float[2,3,3,3] w, int32[2] b = {100, -7}, float[2] s = {0.5, 0.25}, int32[2] z = {0, 0}> {
        bias = DequantizeLinear <axis = 0> (b, s, z)
        y = Conv (x, w, bias) }""",
        w=W4,
    )
    after = check(canonical_conv, golden, model, "bias")
    bias = ops.parse_op(after.graph[0]).inputs["bias"]
    assert bias.const_value.numpy().tolist() == [50.0, -1.75]


def test_an_int32_bias_needs_no_zero_point():
    model = graph(
        """(float[1,3,5,5] x) => (float[1,2,3,3] y)
        <float[2,3,3,3] w, int32[2] b = {100, -7}, float s = {0.5}> {
        bias = DequantizeLinear (b, s)
        y = Conv (x, w, bias) }""",
        w=W4,
    )
    after, _ = apply(canonical_conv, model)
    bias = ops.parse_op(after.graph[0]).inputs["bias"]
    assert bias.const_value.numpy().tolist() == [50.0, -3.5]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "(float[1,3,5] x) => (float[1,2,3] y) <float[2,3,3] w> { y = Conv (x, w) }",
            "it convolves over 1 axes; expected 2",
        ),
        (
            "(float[n,3,5,5] x) => (float[n,2,3,3] y) <float[2,3,3,3] w> { y = Conv (x, w) }",
            "the shape of its input or result is not known",
        ),
        (
            "(float16[1,3,5,5] x) => (float16[1,2,3,3] y) <float16[2,3,3,3] w> { y = Conv (x, w) }",
            "its input is FLOAT16; expected float32",
        ),
        (
            "(float[1,3,5,5] x, float[2,3,3,3] w) => (float[1,2,3,3] y) { y = Conv (x, w) }",
            "its weight 'w' is not a float32 constant",
        ),
        (
            "(float[1,3,5,5] x, float[2] b) => (float[1,2,3,3] y) <float[2,3,3,3] w>"
            " { y = Conv (x, w, b) }",
            "its bias 'b' is not a float32 constant",
        ),
    ],
)
def test_convolutions_that_stay(body, reason):
    weights = {}
    if "<float[2,3,3] w>" in body:
        weights = {"w": W4[..., 0]}
    elif "<float16" in body:
        weights = {"w": W4.astype(np.float16)}
    elif "<float" in body:
        weights = {"w": W4}
    assert refusal(canonical_conv, graph(body, **weights)) == reason


# canonical_gemm


def gemm(attributes, a="4,3", b="3,2", c="", dequantized=False):
    """Gemm(a, b, c) with the weight b as f32 or as dequantized int8."""
    random = np.random.default_rng(3)
    shape = tuple(int(n) for n in b.split(","))
    declared = (
        f"float[{b}] b" if not dequantized else f"int8[{b}] q, float s = {{0.5}}, int8 z = {{0}}"
    )
    bias = f", float[{c}] c" if c else ""
    weights = {}
    if c:
        size = tuple(int(n) for n in c.split(","))
        weights["c"] = random.normal(size=size).astype(np.float32)
    if dequantized:
        weights["q"] = random.integers(-127, 128, shape).astype(np.int8)
    else:
        weights["b"] = random.normal(size=shape).astype(np.float32)
    return graph(
        f"(float[{a}] a) => (float[4,2] y) <{declared}{bias}> {{"
        f" {'b = DequantizeLinear (q, s, z)' if dequantized else ''}"
        f" y = Gemm <{attributes}> (a, b{', c' if c else ''}) }}",
        **weights,
    )


# K = 3 products below 16 and a bias: each order of the sums is off by at most 4 * 16 * 2**-23.
GEMM_BOUND = 4 * 16 * 2.0**-23


def test_gemm_is_transposed_and_scaled(golden):
    model = gemm("alpha = 2.0, beta = 0.5, transA = 1", a="3,4", c="1,2")
    check(canonical_gemm, golden, model, bound=GEMM_BOUND)


@pytest.mark.parametrize("attributes", ["alpha = 1.0", "transB = 1", "alpha = 0.5, transB = 1"])
@pytest.mark.parametrize("dequantized", [False, True])
@pytest.mark.parametrize("c", ["", "2", "1", "1,2", "1,1"])
def test_every_spelling_of_gemm(attributes, dequantized, c):
    b = "2,3" if "transB" in attributes else "3,2"
    model = gemm(attributes, b=b, c=c, dequantized=dequantized)
    after, refusals = apply(canonical_gemm, model)
    assert not refusals
    assert op_types(after) == ["DequantizeLinear"] * dequantized + ["Gemm"]
    assert ops.parse_op(after.graph[-1]).inputs["w"].shape == (2, 3)
    # Int8 weights times 0.5: products below 512.
    bound = GEMM_BOUND * (32 if dequantized else 1)
    assert np.abs(run(model)[0] - run(after)[0]).max() <= bound


def test_matmul_of_a_dequantized_transpose(golden):
    model = graph(
        """(float[2,4,3] x) => (float[2,4,2] y)
        <int8[2,3] q, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}> {
        w = DequantizeLinear <axis = 0> (q, s, z)
        t = Transpose <perm = [1, 0]> (w)
        y = MatMul (x, t) }""",
        q=np.array([[1, -2, 3], [127, -127, 0]], np.int8),
    )
    check(canonical_gemm, golden, model, "matmul", bound=3 * 128 * 4 * 2.0**-23)


def test_matmul_of_a_dequantized_matrix_keeps_its_axis(golden):
    model = graph(
        """(float[4,3] x) => (float[4,2] y)
        <int8[3,2] q, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}> {
        w = DequantizeLinear <axis = 1> (q, s, z)
        y = MatMul (x, w) }""",
        q=np.array([[1, -2], [127, -127], [0, 3]], np.int8),
    )
    after = check(canonical_gemm, golden, model, "axis", bound=3 * 128 * 4 * 2.0**-23)
    assert after.graph[0].attributes["axis"].as_int() == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "(float[4,3] a, float[3,2] b) => (float[4,2] y) { y = MatMul (a, b) }",
            "its right operand 'b' is not a constant matrix",
        ),
        (
            "(float[3] a) => (float[2] y) <float[3,2] b = {1, 2, 3, 4, 5, 6}>"
            " { y = MatMul (a, b) }",
            "its input is FLOAT 3; expected float32 rank >= 2",
        ),
        (
            "(float[2,3] a) => (float[2,2] y)"
            " <float[3,2] b = {1, 2, 3, 4, 5, 6}, float[2,1] c = {1, 2}> { y = Gemm (a, b, c) }",
            "its bias 'c' has shape 2x1; expected 2",
        ),
        (
            "(float[2,3] a, float[2] c) => (float[2,2] y) <float[3,2] b = {1, 2, 3, 4, 5, 6}>"
            " { y = Gemm (a, b, c) }",
            "its bias 'c' is not a float32 constant",
        ),
    ],
)
def test_products_that_stay(body, reason):
    assert refusal(canonical_gemm, graph(body)) == reason


def test_a_negative_alpha_stays_with_a_quantized_weight():
    reason = refusal(canonical_gemm, gemm("alpha = -1.0", dequantized=True))
    assert reason == "alpha is -1.0; expected > 0 with a quantized weight"

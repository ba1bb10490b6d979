"""The passes that compute constants: weights, biases, normalization."""

import numpy as np
import pytest

from tests.graphs import apply, check, graph, op_types, refusal
from twofour.compiler import ops
from twofour.compiler.passes import (
    canonical_conv,
    canonical_gemm,
    fold_batchnorm,
    fold_bias,
    fold_dequantize,
    fold_weight_quantize,
)

RNG = np.random.default_rng(4)
W4 = RNG.normal(size=(2, 3, 1, 1)).astype(np.float32)
Q4 = RNG.integers(-127, 128, (2, 3, 1, 1)).astype(np.int8)
MATRIX = RNG.normal(size=(3, 2)).astype(np.float32)


def conv(rest, outputs="float[1,2,4,4] y", constants="", inputs="", **weights):
    """A canonical Conv 3 -> 2 whose result is t, and what follows."""
    comma = ", " if constants else ""
    model = graph(
        f"(float[1,3,4,4] x{inputs}) => ({outputs})"
        f" <float[2,3,1,1] w, float[2] b = {{1, -2}}{comma}{constants}>"
        f" {{ t = Conv (x, w, b)\n {rest} }}",
        **{"w": W4, **weights},
    )
    return apply(canonical_conv, model)[0]


# fold_weight_quantize


def test_a_constant_is_quantized(golden):
    model = graph("""(float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {0.25, -0.75, 3, -100}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}> {
        q = QuantizeLinear <axis = 0> (w, s, z)
        f = DequantizeLinear <axis = 0> (q, s, z)
        y = MatMul (x, f) }""")
    after = check(fold_weight_quantize, golden, model)
    # Half to even: 0.5 -> 0, -1.5 -> -2; saturated: -400 -> -128.
    assert after.graph[0].inputs[0].const_value.numpy().tolist() == [[0, -2], [12, -128]]


@pytest.mark.parametrize(
    ("inputs", "parameters", "reason"),
    [
        (
            ", float s",
            "int8 z = {0}",
            "the weight 'w' is quantized with a scale computed at run time",
        ),
        ("", "float s = {1}, int16 z = {0}", "the weight 'w' becomes int16; expected int8"),
    ],
)
def test_weights_that_stay(inputs, parameters, reason):
    model = graph(
        f"(float[2] x{inputs}) => (float[2] y) <float[2] w = {{1, 2}}, {parameters}> {{"
        " q = QuantizeLinear (w, s, z)\n f = DequantizeLinear (q, s, z)\n y = Add (x, f) }",
        opset=21,
    )
    assert refusal(fold_weight_quantize, model) == reason


def test_activations_are_not_quantized_now():
    model = graph("""(float[2] x) => (int8[2] y) <float s = {1}, int8 z = {0}> {
        y = QuantizeLinear (x, s, z) }""")
    assert fold_weight_quantize.rule(model.graph[0]) is None


# fold_bias

# Three products and two sums below 32: at most 5 roundings of 2**-24 each, in either order.
BIAS_BOUND = 2 * 5 * 32 * 2.0**-24


@pytest.mark.parametrize(
    ("shape", "constant"),
    [("2,1,1", "{1, 2}"), ("1,2,1,1", "{1, 2}"), ("1", "{3}"), ("1,1,1,1", "{3}")],
)
def test_a_constant_is_added_to_the_bias_of_a_conv(shape, constant):
    model = conv("y = Add (t, c)", constants=f"float[{shape}] c = {constant}")
    after, refusals = apply(fold_bias, model)
    assert op_types(after) == ["Conv"]
    assert not refusals


def test_bias_text(golden):
    model = conv("y = Add (c, t)", constants="float[2,1,1] c = {10, 20}")
    check(fold_bias, golden, model, "conv", BIAS_BOUND)


def test_matmul_and_add_are_a_gemm(golden):
    model = graph(
        """(float[2,4,3] x) => (float[2,4,2] y) <float[3,2] w, float[2] c = {10, 20}> {
        t = MatMul (x, w)
        y = Add (t, c) }""",
        w=MATRIX,
    )
    check(fold_bias, golden, apply(canonical_gemm, model)[0], "gemm", BIAS_BOUND)


@pytest.mark.parametrize(
    ("rest", "constants", "outputs", "reason"),
    [
        (
            "y = Add (t, c)",
            "float[4] c = {1, 2, 3, 4}",
            "float[1,2,4,4] y",
            "the constant of shape (4,) is not one number per output channel",
        ),
        (
            "y = Add (t, c)",
            "float[1,1,1,1,1] c = {1}",
            "float[1,1,2,4,4] y",
            "adding a constant of shape (1, 1, 1, 1, 1) changes the shape of 't'",
        ),
        (
            "y = Add (t, c)\n z = Neg (t)",
            "float[2,1,1] c = {1, 2}",
            "float[1,2,4,4] y, float[1,2,4,4] z",
            "its result has 2 readers: 'y', 'z'",
        ),
        (
            "y = Add (t, c)",
            "float[2,1,1] c = {1, 2}",
            "float[1,2,4,4] y, float[1,2,4,4] t",
            "its result 't' is an output of the model",
        ),
    ],
)
def test_constants_that_stay(rest, constants, outputs, reason):
    assert refusal(fold_bias, conv(rest, outputs, constants)) == reason


def test_a_residual_is_no_bias():
    model = conv("y = Add (t, r)", inputs=", float[1,2,4,4] r")
    assert [fold_bias.rule(node) for node in model.graph] == [None, None]


# fold_batchnorm

STATISTICS = (
    "float[2] g = {2, -3}, float[2] o = {1, 5}, float[2] m = {0.5, -1}, float[2] v = {4, 0.25}"
)
NORM = "y = BatchNormalization <epsilon = 0.01> (t, g, o, m, v)"
# Factors below 6, terms below 6 * 32, 4 products and 3 sums: 8 roundings on either side.
NORM_BOUND = 2 * 8 * 6 * 32 * 2.0**-24


def test_normalization_scales_a_float_weight(golden):
    check(fold_batchnorm, golden, conv(NORM, constants=STATISTICS), "conv", NORM_BOUND)


def quantized_conv(q, weight_attributes="axis = 0", parameters=None, statistics=STATISTICS):
    """A canonical Conv with a dequantized weight, normalized."""
    parameters = parameters or f"{q.dtype}[2] z = {{0, 0}}, float[2] s = {{0.5, 0.25}}"
    model = graph(
        f"(float[1,3,4,4] x) => (float[1,2,4,4] y) <{q.dtype}[2,3,1,1] q, {parameters},"
        f" {statistics}> {{ w = DequantizeLinear <{weight_attributes}> (q, s, z)\n"
        f" t = Conv (x, w)\n {NORM} }}",
        q=q,
    )
    return apply(canonical_conv, model)[0]


def test_normalization_scales_the_scale_of_a_quantized_weight(golden):
    # Weights below 64 instead of 3.
    check(fold_batchnorm, golden, quantized_conv(Q4), "quantized", NORM_BOUND * 64)


def test_a_channel_switched_off_keeps_a_positive_scale():
    statistics = STATISTICS.replace("{2, -3}", "{0, -3}")
    after, refusals = apply(fold_batchnorm, quantized_conv(Q4, statistics=statistics))
    assert not refusals
    w = after.graph[0]
    assert (w.inputs[0].const_value.numpy()[0] == 0).all()
    assert (w.inputs[1].const_value.numpy() > 0).all()


def test_normalization_after_a_gemm(golden):
    model = graph(
        f"(float[4,3] x) => (float[4,2] y) <float[3,2] w, {STATISTICS}>"
        f" {{ t = MatMul (x, w)\n {NORM} }}",
        w=MATRIX,
    )
    check(fold_batchnorm, golden, apply(canonical_gemm, model)[0], "gemm", NORM_BOUND)


def test_normalization_of_something_else_stays():
    model = graph(f"(float[1,2,4,4] t) => (float[1,2,4,4] y) <{STATISTICS}> {{ {NORM} }}")
    assert fold_batchnorm.rule(model.graph[0]) is None


@pytest.mark.parametrize(
    ("rest", "outputs", "inputs", "reason"),
    [
        (
            NORM.replace("0.01", "0.01, training_mode = 0").replace("(t, g", "(t, k"),
            "float[1,2,4,4] y",
            ", float[2] k",
            "its parameters are not float32 constants, or it is in training mode",
        ),
        (
            NORM.replace("0.01", "0.01, training_mode = 1").replace("y =", "y, m2, v2 ="),
            "float[1,2,4,4] y",
            "",
            "its parameters are not float32 constants, or it is in training mode",
        ),
        (
            NORM + "\n z = Neg (t)",
            "float[1,2,4,4] y, float[1,2,4,4] z",
            "",
            "its result has 2 readers: 'y', 'z'",
        ),
    ],
)
def test_normalizations_that_stay(rest, outputs, inputs, reason):
    assert refusal(fold_batchnorm, conv(rest, outputs, STATISTICS, inputs)) == reason


def test_a_normalization_of_rows_is_not_one_of_channels():
    model = graph(
        f"(float[5,2,3] x) => (float[5,2,2] y) <float[3,2] w, {STATISTICS}>"
        f" {{ t = MatMul (x, w)\n {NORM} }}",
        w=MATRIX,
    )
    reason = refusal(fold_batchnorm, apply(canonical_gemm, model)[0])
    assert reason == "it does not normalize the output channels of 't'"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            quantized_conv(Q4.view(np.uint8)),
            "its quantized weight 'w' is not int8 with zero point 0",
        ),
        (
            quantized_conv(Q4, parameters="int8[2] z = {0, 1}, float[2] s = {1, 2}"),
            "its quantized weight 'w' is not int8 with zero point 0",
        ),
        (
            quantized_conv(Q4, "axis = 1", "int8[3] z = {0, 0, 0}, float[3] s = {1, 2, 3}"),
            "its weight 'w' is not quantized per output channel",
        ),
        (
            quantized_conv(np.where(Q4 == Q4[1].min(), np.int8(-128), Q4)),
            "its weight 'w' holds -128 in a channel whose sign changes",
        ),
    ],
)
def test_quantized_weights_that_stay(model, reason):
    assert refusal(fold_batchnorm, model) == reason


# fold_dequantize


@pytest.mark.parametrize(
    ("name", "attributes", "parameters"),
    [
        ("tensor", "axis = 1", "float s = {0.5}, int8 z = {3}"),
        ("axis", "axis = 1", "float[3] s = {0.5, 1, 2}, int8[3] z = {1, 2, 3}"),
    ],
)
def test_a_constant_is_dequantized(golden, name, attributes, parameters):
    model = graph(
        f"(float[2,3] x) => (float[2,3] y) <int8[2,3] q, {parameters}> {{"
        f" f = DequantizeLinear <{attributes}> (q, s, z)\n y = Add (x, f) }}",
        q=np.arange(-3, 3, dtype=np.int8).reshape(2, 3),
    )
    check(fold_dequantize, golden, model, name)


def test_activations_are_not_folded():
    model = graph("""(int8[2] x) => (float[2] y) <float s = {1}, int8 z = {0}> {
        y = DequantizeLinear (x, s, z) }""")
    assert fold_dequantize.rule(model.graph[0]) is None


def test_other_readers_of_constants_are_another_pattern():
    model = graph("(int8[2] x) => (int8[2] y) <int8[2] c = {1, 2}> { y = Add (c, x) }")
    assert fold_dequantize.rule(model.graph[0]) is None


@pytest.mark.parametrize(
    ("inputs", "attributes", "parameters"),
    [
        (", float s", "axis = 1", "int8 z = {0}"),
        (", int8 z", "axis = 1", "float s = {1}"),
        ("", "axis = 1, block_size = 2", "float[1,1] s = {1}, int8[1,1] z = {0}"),
    ],
)
def test_constants_with_unknown_parameters_stay(inputs, attributes, parameters):
    model = graph(
        f"(float[1,2] x{inputs}) => (float[1,2] y) <int8[1,2] q = {{1, 2}}, {parameters}> {{"
        f" f = DequantizeLinear <{attributes}> (q, s, z)\n y = Add (x, f) }}",
        opset=21,
    )
    reason = refusal(fold_dequantize, model)
    assert reason == "the constant 'q' has a scale in blocks or computed at run time"


def test_the_folded_operators_are_still_fused_operators():
    after, _ = apply(fold_batchnorm, conv(NORM, constants=STATISTICS))
    assert ops.parse_op(after.graph[0]).name == "t"

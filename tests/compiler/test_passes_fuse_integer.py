"""The passes that make integer Conv, Gemm and Add."""

import numpy as np
import pytest

from tests.graphs import apply, check, graph, op_types, refusal
from twofour.compiler import ops
from twofour.compiler.passes import (
    canonical_conv,
    canonical_gemm,
    fuse_epilogue,
    fuse_integer,
    fuse_integer_add,
)

RNG = np.random.default_rng(5)
Q4 = RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
Q2 = RNG.integers(-127, 128, (4, 3)).astype(np.int8)
CONV = "Conv <pads = [1, 1, 1, 1], strides = [2, 2]>"
PARAMS = "float s = {0.05}, int8 z = {3}, float s2 = {0.07}, int8 z2 = {-6}"


def steps(model, *rules):
    """The model after rules that must not refuse anything."""
    for rule in rules:
        model, refusals = apply(rule, model)
        assert not refusals
    return model


# fuse_integer


def integer(rest="y = QuantizeLinear (c, s2, z2)", outputs="int8[1,4,4,4] y", **kinds):
    """A canonical Conv c between quantizers, with its epilogue."""
    kinds = {"x": "int8", "w": Q4, "scale": "float[4] ws = {0.01, 0.02, 0.03, 0.04}", **kinds}
    zero = kinds.get("zero", "int8[4] wz = {0, 0, 0, 0}")
    w = kinds["w"]
    inputs = kinds.get("inputs", ", int8[1,4,4,4] q, float[1,4,4,4] f")
    x_params = kinds.get("x_params", f"float xs = {{0.1}}, {kinds['x']} xz = {{7}}")
    model = graph(
        f"({kinds['x']}[1,3,8,8] x{inputs}) => ({outputs})"
        f" <{PARAMS}, {x_params}, {zero}, {kinds['scale']}, {w.dtype}[4,3,3,3] wq,"
        f" float[4] b = {{0.1, -0.2, 0.3, -0.4}}> {{"
        f" xd = DequantizeLinear <axis = 1> (x, xs, xz)\n"
        f" wd = DequantizeLinear <axis = {kinds.get('axis', 0)}> (wq, ws, wz)\n"
        f" r = DequantizeLinear (q, s, z)\n c = {CONV} (xd, wd, b)\n {rest} }}",
        opset=21,
        wq=w,
    )
    model = apply(fuse_epilogue, steps(model, canonical_conv))[0]
    for node in [node for node in model.graph if not node.outputs[0].uses()]:
        if not node.outputs[0].is_graph_output():
            model.graph.remove(node)
    return model


QUANTIZED = "y = QuantizeLinear (a, s2, z2)"
EPILOGUES = [
    ("QConv", "y = QuantizeLinear (c, s2, z2)", "int8"),
    ("QConvRelu", "a = Relu (c)\n" + QUANTIZED, "int8"),
    ("QConvAdd", "a = Add (c, r)\n" + QUANTIZED, "int8"),
    ("QConvAddRelu", "e = Add (c, r)\n a = Relu (e)\n" + QUANTIZED, "int8"),
    ("QConvAddFloatRelu", "e = Add (f, c)\n a = Relu (e)\n" + QUANTIZED, "int8"),
    ("QConvF", "y = Identity (c)", "float"),
    ("QConvAddReluF", "e = Add (c, r)\n a = Relu (e)\n y = Identity (a)", "float"),
    ("QConvAddFloatF", "e = Add (c, f)\n y = Identity (e)", "float"),
    ("QConvHardSwishAdd", "e = HardSwish (c)\n a = Add (e, r)\n" + QUANTIZED, "int8"),
    ("QConvHardSwishAddFloat", "e = HardSwish (c)\n a = Add (e, f)\n" + QUANTIZED, "int8"),
    ("QConvHardSwishAddF", "e = HardSwish (c)\n a = Add (e, r)\n y = Identity (a)", "float"),
]


@pytest.mark.parametrize(("op_type", "rest", "output"), EPILOGUES, ids=[e[0] for e in EPILOGUES])
@pytest.mark.parametrize("x", ["int8", "uint8"])
def test_a_conv_between_quantizers(golden, op_type, rest, output, x):
    model = integer(rest, f"{output}[1,4,4,4] y", x=x)
    after = check(fuse_integer, golden if x == "int8" else None, model, op_type)
    assert op_type in op_types(after)


def test_a_gemm_between_quantizers(golden):
    model = graph(
        f"""(uint8[2,5,3] x) => (int8[2,5,4] y)
        <{PARAMS}, uint8 xz = {{7}}, float ws = {{0.01}}, int8 wz = {{0}}, int8[4,3] wq> {{
        xd = DequantizeLinear (x, s, xz)
        wd = DequantizeLinear (wq, ws, wz)
        t = Transpose (wd)
        c = MatMul (xd, t)
        y = QuantizeLinear (c, s2, z2) }}""",
        wq=Q2,
    )
    check(fuse_integer, golden, steps(model, canonical_gemm), "gemm")


def test_a_shifted_weight_becomes_int8(golden):
    shifted = (Q4.astype(np.int16) + 128).astype(np.uint8)
    model = integer(w=shifted, zero="uint8 wz = {128}", scale="float ws = {0.01}")
    after = check(fuse_integer, golden, model, "shifted")
    op = ops.parse_op(after.graph[-1])
    assert np.array_equal(op.inputs["w"].const_value.numpy(), Q4)
    assert op.inputs["w_scale"].const_value.numpy().tolist() == [np.float32(0.01)] * 4


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (
            {"x": "int16"},
            "DequantizeLinear 'xd' quantizes to int16; expected int8 or uint8",
        ),
        (
            {"x_params": "float[3] xs = {1, 2, 3}, int8[3] xz = {0, 0, 0}"},
            "DequantizeLinear 'xd' is per channel; activations are quantized per tensor",
        ),
        (
            {"w": Q4.view(np.uint8), "zero": "uint8[4] wz = {3, 3, 3, 3}"},
            "the weight 'wd' is quantized with zero point 3; less that, it spans"
            f" {int(Q4.view(np.uint8).min()) - 3}..{int(Q4.view(np.uint8).max()) - 3};"
            " expected int8 with zero point 0",
        ),
        (
            {
                "axis": 1,
                "scale": "float[3] ws = {1, 2, 3}",
                "zero": "int8[3] wz = {0, 0, 0}",
            },
            "the weight 'wd' is quantized along axis 1; expected 0",
        ),
        (
            {"scale": "float[4] ws = {1, 2, 0, 4}"},
            "the weight 'wd' has a scale that is not finite and positive",
        ),
        (
            {"w": Q4.astype(np.int16), "zero": "int16[4] wz = {0, 0, 0, 0}"},
            "the weight 'wd' is not a dequantized int8 or uint8 constant",
        ),
    ],
)
def test_convolutions_that_stay_float(kinds, reason):
    assert refusal(fuse_integer, integer(**kinds)) == reason


def test_a_float_conv_says_everything_that_is_missing():
    model = graph(
        f"(float[1,3,8,8] x) => (float[1,4,4,4] y) <float[4,3,3,3] w> {{ y = {CONV} (x, w) }}",
        w=Q4.astype(np.float32),
    )
    assert refusal(fuse_integer, steps(model, canonical_conv)) == (
        "'x' is float: it is an input of the model; the weight 'w' is float"
    )


def test_a_float_producer_is_named():
    model = graph(
        f"(float[1,3,8,8] x) => (float[1,4,4,4] y) <float[4,3,3,3] w>"
        f" {{ n = Neg (x)\n y = {CONV} (n, w) }}",
        w=Q4.astype(np.float32),
    )
    assert refusal(fuse_integer, steps(model, canonical_conv)).startswith(
        "'n' is float: it comes from Neg 'n'; "
    )


@pytest.mark.parametrize(
    ("rest", "outputs", "note"),
    [
        (
            "y = QuantizeLinear (c, s2, z2)\n n = Neg (c)",
            "int8[1,4,4,4] y, float[1,4,4,4] n",
            "the result is stored as float: its result has 2 readers: 'y', 'n'",
        ),
        (
            "y = QuantizeLinear (c, s2, z2)",
            "int8[1,4,4,4] y, float[1,4,4,4] c",
            "the result is stored as float: its result 'c' is an output of the model",
        ),
    ],
)
def test_a_result_read_as_float_too_is_stored_as_float(rest, outputs, note):
    after, refusals = apply(fuse_integer, integer(rest, outputs))
    assert op_types(after)[0] == "QConvF"
    assert [(r.node, r.reason) for r in refusals] == [("c", note)]


# fuse_integer_add


def add(rest, outputs="int8[1,4] y", shapes=("1,4", "1,4"), a="DequantizeLinear (p, s, z)"):
    return graph(
        f"(uint8[{shapes[0]}] p, int8[{shapes[1]}] q) => ({outputs})"
        f" <float s = {{0.05}}, uint8 z = {{3}}, float s2 = {{0.07}}, int8 z2 = {{-6}}>"
        f" {{ a = {a}\n b = DequantizeLinear (q, s2, z2)\n {rest} }}"
    )


@pytest.mark.parametrize(
    ("op_type", "rest"),
    [
        ("QAdd", "t = Add (a, b)\n y = QuantizeLinear (t, s2, z2)"),
        ("QAddRelu", "t = Add (b, a)\n r = Relu (t)\n y = QuantizeLinear (r, s2, z2)"),
    ],
)
def test_an_add_between_quantizers(golden, op_type, rest):
    after = check(fuse_integer_add, golden, add(rest), op_type)
    assert op_types(after) == [op_type]


QUANTIZED_SUM = "t = Add (a, b)\n y = QuantizeLinear (t, s2, z2)"


@pytest.mark.parametrize(
    ("rest", "outputs", "shapes", "a", "reason"),
    [
        (
            QUANTIZED_SUM,
            "int8[1,4] y",
            ("1,4", "1,4"),
            "Cast <to = 1> (p)",
            "'a' is float: it comes from Cast 'a'",
        ),
        (
            QUANTIZED_SUM,
            "int8[2,4] y",
            ("2,4", "1,4"),
            "DequantizeLinear (p, s, z)",
            "its operands have shapes 2x4 and 1x4; expected equal ones",
        ),
        (
            "t = Add (a, b)\n y = Relu (t)",
            "float[1,4] y",
            ("1,4", "1,4"),
            "DequantizeLinear (p, s, z)",
            "its result 'y' is an output of the model",
        ),
        (
            "t = Add (a, b)\n y = Neg (t)",
            "float[1,4] y",
            ("1,4", "1,4"),
            "DequantizeLinear (p, s, z)",
            "its result is read as float by Neg 'y'",
        ),
    ],
)
def test_adds_that_stay(rest, outputs, shapes, a, reason):
    assert refusal(fuse_integer_add, add(rest, outputs, shapes, a)) == reason


def test_a_float_add_is_another_pattern():
    model = graph("(float[4] a, float[4] b) => (float[4] y) { y = Add (a, b) }")
    assert fuse_integer_add.rule(model.graph[0]) is None

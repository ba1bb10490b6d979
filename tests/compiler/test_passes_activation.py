"""Spellings of activations become one, and layers take them; with the reasons for refusals."""

import math
import re

import numpy as np
import pytest
import torch

from tests.graphs import apply, check, graph, op_types, refusal
from twofour.compiler.importer import import_graph
from twofour.compiler.passes import (
    canonical_activation,
    canonical_conv,
    canonical_gemm,
    fuse_epilogue,
    fuse_integer,
    fuse_integer_activation,
    fuse_integer_add,
    pipeline,
)
from twofour.onnx_tools.load import load_model

NUMBERS = {
    **{"zero": 0, "one": 1, "two": 2, "three": 3, "six": 6, "half": 0.5, "sixth": 0.1666667},
    **{"root": math.sqrt(2), "less": math.sqrt(0.5), "turn": math.sqrt(2 / math.pi)},
    "cubic": 0.044715,
}


def numbers(nodes):
    """The constants that the nodes read."""
    words = set(re.findall(r"\w+", nodes))
    return ", ".join(f"float {k} = {{{v}}}" for k, v in NUMBERS.items() if k in words)


def model_of(nodes, opset=18, inputs="", outputs=""):
    """y = f(x)."""
    return graph(
        f"(float[2,3] x{inputs}) => (float[2,3] y{outputs}) <{numbers(nodes)}> {{ {nodes} }}",
        opset,
    )


SPELLINGS = {
    "clip_relu": ("y = Clip (x, zero)", ["Relu"]),
    "clip_upper": ("y = Clip (x, , six)", ["Clip"]),
    "max": ("y = Max (x, zero)", ["Relu"]),
    "max_min": ("a = Max (zero, x)\n y = Min (a, six)", ["Clip"]),
    "relu_min": ("a = Relu (x)\n y = Min (a, six)", ["Clip"]),
    "clip_clip": ("a = Clip (x, zero, six)\n y = Clip (a, one, three)", ["Clip"]),
    "clip_relu6": ("a = Clip (x, zero, six)\n y = Relu (a)", ["Clip"]),
    "hard_sigmoid": (
        "a = Add (x, three)\n b = Clip (a, zero, six)\n y = Div (b, six)",
        ["HardSigmoid"],
    ),
    "hard_swish": (
        "a = HardSigmoid <alpha = 0.16666667> (x)\n y = Mul (a, x)",
        ["HardSwish"],
    ),
    "hard_swish_mul": (
        "a = Add (x, three)\n b = Clip (a, zero, six)\n c = Mul (x, b)\n y = Div (c, six)",
        ["HardSwish"],
    ),
    "hard_swish_gate": (
        "a = Add (three, x)\n b = Clip (a, zero, six)\n c = Mul (b, sixth)\n y = Mul (x, c)",
        ["HardSwish"],
    ),
    "silu": ("a = Sigmoid (x)\n y = Mul (a, x)", ["Silu"]),
    "gelu": (
        "a = Div (x, root)\n b = Erf (a)\n c = Add (b, one)\n d = Mul (x, c)\n y = Mul (d, half)",
        ["Gelu"],
    ),
    "gelu_first": (
        "h = Mul (x, half)\n a = Mul (less, x)\n b = Erf (a)\n c = Add (one, b)\n y = Mul (h, c)",
        ["Gelu"],
    ),
    "gelu_gate": (
        "a = Div (x, root)\n b = Erf (a)\n c = Add (one, b)\n d = Mul (half, c)\n y = Mul (x, d)",
        ["Gelu"],
    ),
    "gelu_half": (
        "h = Div (x, two)\n a = Div (x, root)\n b = Erf (a)\n c = Add (one, b)\n y = Mul (c, h)",
        ["Gelu"],
    ),
    "gelu_tanh": (
        "a = Pow (x, three)\n b = Mul (cubic, a)\n c = Add (x, b)\n d = Mul (turn, c)\n"
        " e = Tanh (d)\n f = Add (e, one)\n g = Mul (half, f)\n y = Mul (x, g)",
        ["GeluTanh"],
    ),
    "gelu_tanh_cube": (
        "s = Mul (x, x)\n a = Mul (s, x)\n b = Mul (a, cubic)\n c = Add (b, x)\n"
        " d = Mul (c, turn)\n e = Tanh (d)\n f = Add (one, e)\n h = Mul (x, half)\n y = Mul (h, f)",
        ["GeluTanh"],
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(golden, name):
    """Float32 results of the same formula in another order: a few steps of a value below 16."""
    nodes, kept = SPELLINGS[name]
    after = check(canonical_activation, golden, model_of(nodes), name, bound=16 * 2.0**-23)
    assert op_types(after) == kept


@pytest.mark.parametrize(("form", "kept"), [("none", "Gelu"), ("tanh", "GeluTanh")])
def test_gelu_of_opset_20(form, kept):
    model = model_of(f'y = Gelu <approximate = "{form}"> (x)', opset=20)
    after = check(canonical_activation, None, model, bound=16 * 2.0**-23)
    assert [(node.domain, node.op_type) for node in after.graph] == [("twofour", kept)]


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        (torch.nn.GELU(), "Gelu"),
        (torch.nn.GELU("tanh"), "GeluTanh"),
        (torch.nn.SiLU(), "Silu"),
        (torch.nn.Hardswish(), "HardSwish"),
        (torch.nn.Hardsigmoid(), "HardSigmoid"),
        (torch.nn.ReLU6(), "Clip"),
        (torch.nn.Hardtanh(-2.0, 3.0), "Clip"),
    ],
    ids=str,
)
def test_what_torch_exports(layer, kept, dynamo, tmp_path):
    path = tmp_path / "m.onnx"
    x = torch.zeros(2, 3)
    torch.onnx.export(layer.eval(), (x,), path, dynamo=dynamo, opset_version=18 if dynamo else 17)
    fused = pipeline.run_passes(import_graph(load_model(path)))
    assert op_types(fused.model) == [kept]


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Clip (x, zero, six)",
        "y = Relu (x)",
        "y = HardSwish (x)",
        "a = Sigmoid (x)\n b = Neg (x)\n y = Mul (a, b)",
        "a = Add (x, three)\n b = Clip (a, zero, six)\n c = Neg (x)\n d = Mul (c, b)\n"
        " y = Div (d, six)",
        "y = Max (x, x)",
        "y = Mul (x, x)",
        "a = Erf (x)\n b = Add (a, one)\n c = Mul (x, b)\n y = Mul (c, half)",
        "a = Div (x, root)\n b = Erf (a)\n c = Add (b, two)\n d = Mul (x, c)\n y = Mul (d, half)",
        "a = HardSigmoid <alpha = 0.2> (x)\n y = Mul (a, x)",
        "a = Tanh (x)\n c = Add (a, one)\n d = Mul (x, c)\n y = Mul (d, half)",
    ],
)
def test_other_nodes_stay(nodes):
    model = model_of(nodes)
    assert [canonical_activation.rule(node) for node in model.graph] == [None] * len(model.graph)


@pytest.mark.parametrize(
    ("nodes", "options", "reason"),
    [
        ("y = Clip (x, z)", {"inputs": ", float z"}, "its bound 'z' is not one constant number"),
        ("y = Clip (x, six, one)", {}, "it clips to [6, 1]; expected low <= high"),
        (
            "a = Div (x, root)\n b = Erf (a)\n c = Add (b, one)\n y = Mul (x, c)",
            {},
            "it is Gelu times 2; expected once",
        ),
        (
            "a = Add (x, three)\n b = Clip (a, zero, six)\n y = Mul (x, b)",
            {},
            "it is HardSwish times 6; expected once",
        ),
        (
            "a = Clip (x, zero, six)\n y = Relu (a)",
            {"outputs": ", float[2,3] a"},
            "its result 'a' is an output of the model",
        ),
    ],
)
def test_refusals(nodes, options, reason):
    refusals = apply(canonical_activation, model_of(nodes, **options))[1]
    assert [r.reason for r in refusals] == [reason]


def test_doubles_stay():
    model = graph("(double[2,3] x) => (double[2,3] y) <double zero = {0}> { y = Max (x, zero) }")
    assert refusal(canonical_activation, model) == "its input is DOUBLE; expected float32"


def test_a_constant_with_more_axes_spreads_the_result():
    model = graph(
        "(float[2,3] x) => (float[1,2,3] y) <float[1,1,1] six = {6}, float three = {3},"
        " float zero = {0}, float up = {6}> {"
        " a = Add (x, three) b = Clip (a, zero, up) c = Mul (x, b) y = Div (c, six) }"
    )
    reasons = [r.reason for r in apply(canonical_activation, model)[1]]
    assert "its constants spread 2x3 to 1x2x3" in reasons


# layers take them

W4 = np.random.default_rng(5).normal(size=(4, 3, 3, 3)).astype(np.float32)
ACTIVATIONS = {
    "Clip": "y = Clip (c, zero, six)",
    "HardSwish": "y = HardSwish (c)",
    "HardSigmoid": "y = HardSigmoid <alpha = 0.16666667> (c)",
    "Sigmoid": "y = Sigmoid (c)",
    "Silu": "a = Sigmoid (c)\n y = Mul (a, c)",
    "Gelu": "a = Div (c, root)\n b = Erf (a)\n e = Add (b, one)\n d = Mul (c, e)\n"
    " y = Mul (d, half)",
    "Tanh": "y = Tanh (c)",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_conv_takes_them(name):
    model = graph(
        f"(float[1,3,8,8] x) => (float[1,4,6,6] y) <{numbers(ACTIVATIONS[name])}>"
        f" {{ c = Conv (x, w) {ACTIVATIONS[name]} }}",
        w=W4,
    )
    model = apply(canonical_activation, apply(canonical_conv, model)[0])[0]
    after = check(fuse_epilogue, None, model, bound=64 * 2.0**-23)
    assert op_types(after) == [f"Conv{name}"]


def test_a_gemm_takes_them_behind_a_residual():
    model = graph(
        "(float[2,5,3] x, float[2,5,4] r) => (float[2,5,4] y) <float[3,4] w> {"
        " c = MatMul (x, w) a = Add (r, c) y = HardSwish (a) }",
        w=W4[:, :, 0, 0].T,
    )
    after = apply(fuse_epilogue, apply(canonical_gemm, model)[0])[0]
    assert op_types(after) == ["GemmAddHardSwish"]


def test_activations_that_stay_behind_their_conv():
    body = "(float[1,3,8,8] x) => (float[1,4,6,6] y) <float six = {6}, float one = {1}>"
    model = graph(f"{body} {{ c = Conv (x, w) y = HardSigmoid (c) }}", w=W4)
    reason = "not fused into 'c': its alpha and beta are 0.2 and 0.5; expected 1/6 and 1/2"
    assert refusal(fuse_epilogue, apply(canonical_conv, model)[0]) == reason
    model = graph(f"{body} {{ c = Conv (x, w) y = Clip (c, six, one) }}", w=W4)
    reason = "not fused into 'c': it clips to [6, 1]; expected low <= high"
    assert refusal(fuse_epilogue, apply(canonical_conv, model)[0]) == reason
    model = graph(f"{body} {{ c = Conv (x, w) d = Tanh (c) y = Relu (d) }}", w=W4)
    after, refusals = apply(fuse_epilogue, apply(canonical_conv, model)[0])
    assert op_types(after) == ["ConvTanh", "Relu"]
    assert [r.reason for r in refusals] == ["'c' has a Tanh already"]


# between quantizers

Q = (
    "float s = {0.05}, int8 z = {-9}, float t = {0.03}, int8 u = {20},"
    " float lo = {-0.7}, float hi = {1}"
)


@pytest.mark.parametrize(
    ("name", "act"),
    [("Clip", "Clip (c, lo, hi)"), ("HardSwish", "HardSwish (c)"), ("Sigmoid", "Sigmoid (c)")],
)
@pytest.mark.parametrize("float_out", [False, True])
def test_an_integer_conv_keeps_them(name, act, float_out):
    """One step of y where the float graph rounds in other places."""
    tail = "y = Identity (a)" if float_out else "y = QuantizeLinear (a, t, u)"
    model = graph(
        f"(int8[1,3,8,8] x) => ({'float' if float_out else 'int8'}[1,4,6,6] y)"
        f" <{Q}, float ws = {{0.01}}> {{ f = DequantizeLinear (x, s, z)"
        f" g = DequantizeLinear (w, ws) c = Conv (f, g) a = {act} {tail} }}",
        w=np.random.default_rng(3).integers(-128, 128, (4, 3, 3, 3)).astype(np.int8),
    )
    model = apply(fuse_epilogue, apply(canonical_conv, model)[0])[0]
    after = check(fuse_integer, None, model, bound=1e-4 if float_out else 1)
    assert op_types(after)[0] == f"QConv{name}{'F' * float_out}"


@pytest.mark.parametrize(
    ("op", "tail"),
    [
        ("QActivationHardSwish", "y = QuantizeLinear (a, t, u)"),
        ("QActivationHardSwishF", "y = Abs (a)"),
    ],
)
def test_an_activation_between_quantizers(golden, op, tail):
    model = graph(
        f"(int8[2,5] x) => ({'float' if 'Abs' in tail else 'int8'}[2,5] y) <{Q}> {{"
        f" f = DequantizeLinear (x, s, z) a = HardSwish (f) {tail} }}"
    )
    after = check(fuse_integer_activation, golden, model, op)
    assert op_types(after)[0] == op


def test_activations_of_other_tensors_stay():
    model = graph(
        "(int8[2,5] x, float[2,5] e, float s) => (float[2,5] y, float[2,5] d) <int8 z = {0}> {"
        " f = DequantizeLinear (x, s, z) y = Tanh (f) d = Tanh (e) }"
    )
    what = "DequantizeLinear 'f' has a scale or zero point that is computed at run time"
    assert refusal(fuse_integer_activation, model) == what
    model = graph(
        f"(int8[2,5] x) => (float[2,5] y) <{Q}> {{"
        " f = DequantizeLinear (x, s, z) y = HardSigmoid (f) }"
    )
    what = "its alpha and beta are 0.2 and 0.5; expected 1/6 and 1/2"
    assert refusal(fuse_integer_activation, model) == what


def test_an_integer_add_takes_them():
    model = graph(
        f"(int8[2,5] x, int8[2,5] v) => (int8[2,5] y) <{Q}> {{ f = DequantizeLinear (x, s, z)"
        " g = DequantizeLinear (v, t, u) c = Add (f, g) a = Clip (c, lo, hi)"
        " y = QuantizeLinear (a, t, u) }"
    )
    after = check(fuse_integer_add, None, model)
    assert op_types(after) == ["QAddClip"]

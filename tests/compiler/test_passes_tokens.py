"""The passes for sequences of tokens: normalization, tokens of an image, joined projections."""

import numpy as np
import pytest

from tests.graphs import apply, check, graph, op_types, refusal
from twofour.compiler.passes import (
    canonical_gather,
    canonical_gemm,
    fold_bias,
    fuse_attention,
    fuse_integer,
    fuse_integer_norm,
    fuse_layer_norm,
    fuse_tokens,
    merge_projections,
)

RNG = np.random.default_rng(11)
ROWS = "float[2,3,8]"


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


GAMMA, BETA = normal(8), normal(8)
# Sums of 8 in another order, normalized |x| < 3, |gamma| < 3.
BOUND = 8 * 3 * 3 * 2.0**-22

# fuse_layer_norm

DECOMPOSED = (
    "m = ReduceMean (x, last)\n d = Sub (x, m)\n e = {square}\n v = ReduceMean (e, last)\n"
    " w = Add (v, eps)\n r = Sqrt (w)\n n = Div (d, r)\n g = Mul (n, gamma)\n y = Add (g, beta)"
)


def norm(body, outputs=f"{ROWS} y", **constants):
    given = {
        "gamma": GAMMA,
        "beta": BETA,
        "last": np.array([-1]),
        "eps": np.float32(1e-3),
        "two": np.float32(2),
        **constants,
    }
    used = {name: value for name, value in given.items() if name in body}
    return graph(f"({ROWS} x) => ({outputs}) {{ {body} }}", **used)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("standard", "y = LayerNormalization <axis = -1, epsilon = 0.001> (x, gamma, beta)"),
        ("positive_axis", "y = LayerNormalization <axis = 2> (x, gamma, beta)"),
        ("no_beta", "y = LayerNormalization (x, gamma)"),
        ("pow", DECOMPOSED.format(square="Pow (d, two)")),
        ("mul", DECOMPOSED.format(square="Mul (d, d)")),
    ],
)
def test_layer_norm(golden, name, body):
    after = check(fuse_layer_norm, golden, norm(body), name, bound=BOUND)
    assert op_types(after) == ["LayerNorm"]
    epsilon = next(iter(after.graph)).attributes["epsilon"].as_float()
    assert epsilon == np.float32(1e-3 if "0.001" in body or "eps" in body else 1e-5)


def test_layer_norm_without_scale_or_in_two_differences():
    body = DECOMPOSED.format(square="Mul (d2, d2)").replace(" e =", " d2 = Sub (x, m)\n e =")
    check(fuse_layer_norm, None, norm(body), bound=BOUND)
    plain = DECOMPOSED.format(square="Mul (d, d)").replace("n = Div", "y = Div").split(" g = ")[0]
    after = check(fuse_layer_norm, None, norm(plain), bound=BOUND)
    assert op_types(after) == ["LayerNorm"]


@pytest.mark.parametrize(
    ("reason", "node", "constants"),
    [
        (
            "from axis 1 of 2x3x8",
            "y = LayerNormalization <axis = 1> (x, gamma, beta)",
            {"gamma": normal(3, 8), "beta": normal(3, 8)},
        ),
        (
            "'gamma' is not a float32 constant of 8",
            "y = LayerNormalization (x, gamma, beta)",
            {"gamma": normal(1, 8)},
        ),
        (
            "mean or inverse deviation is read",
            "y, mean = LayerNormalization (x, gamma, beta)",
            {},
        ),
    ],
)
def test_layer_norm_refusals(reason, node, constants):
    outputs = f"{ROWS} y, float[2,3,1] mean" if "mean" in node else f"{ROWS} y"
    assert reason in refusal(fuse_layer_norm, norm(node, outputs, **constants))


@pytest.mark.parametrize(
    "square",
    ["Pow (d, three)", "Mul (d, x)"],
)
def test_what_is_no_variance_is_left_alone(square):
    body = DECOMPOSED.format(square=square)
    after, refusals = apply(fuse_layer_norm, norm(body, three=np.float32(3)))
    assert not refusals
    assert "LayerNorm" not in op_types(after)


# fuse_integer_norm

QUANTIZED = "n = LayerNormalization (x, gamma, beta)\n q = QuantizeLinear (n, s, z)\n{rest}"
QUANTIZER = {"s": np.array(0.02, np.float32), "z": np.array(-3, np.int8)}


@pytest.mark.parametrize(
    ("op_type", "rest", "outputs"),
    [
        ("QLayerNorm", "", "int8[2,3,8] q"),
        ("LayerNormQ", " y = Add (n, x)", f"int8[2,3,8] q, {ROWS} y"),
    ],
)
def test_layer_norm_to_bytes(golden, op_type, rest, outputs):
    before, _ = apply(fuse_layer_norm, norm(QUANTIZED.format(rest=rest), outputs, **QUANTIZER))
    after = check(fuse_integer_norm, golden, before, op_type, bound=0.0)
    assert op_types(after)[0] == op_type
    assert "QuantizeLinear" not in op_types(after)


def test_layer_norm_per_channel_is_refused():
    scales = {"s": np.full(8, 0.02, np.float32), "z": np.zeros(8, np.int8)}
    body = QUANTIZED.format(rest="").replace("QuantizeLinear", "QuantizeLinear <axis = 2>")
    before, _ = apply(fuse_layer_norm, norm(body, "int8[2,3,8] q", **scales))
    assert "per channel" in refusal(fuse_integer_norm, before)


# fuse_tokens


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("reshape", "r = Reshape (x, flat)\n y = Transpose <perm = [0, 2, 1]> (r)"),
        ("transpose", "t = Transpose <perm = [0, 2, 3, 1]> (x)\n y = Reshape (t, tokens)"),
    ],
)
def test_tokens(golden, name, body):
    sizes = {"flat": np.array([2, 3, -1]), "tokens": np.array([2, -1, 3])}
    used = {key: value for key, value in sizes.items() if key in body}
    before = graph(f"(float[2,3,4,5] x) => (float[2,20,3] y) {{ {body} }}", **used)
    after = check(fuse_tokens, golden, before, name)
    assert op_types(after) == ["Tokens"]


@pytest.mark.parametrize(
    "body",
    [
        "y = Reshape (x, tokens)",
        "t = Transpose <perm = [0, 3, 2, 1]> (x)\n y = Reshape (t, tokens)",  # column by column
        "t = Transpose <perm = [0, 2, 1, 3]> (x)\n y = Reshape (t, tokens)",
    ],
)
def test_other_moves_are_no_tokens(body):
    before = graph(
        f"(float[2,3,4,5] x) => (float[2,20,3] y) {{ {body} }}", tokens=np.array([2, 20, 3])
    )
    after, refusals = apply(fuse_tokens, before)
    assert op_types(after) == op_types(before)
    assert not refusals


# merge_projections

SPLIT = "".join(
    f"{x}s = Reshape ({x}, split)\n {x}h = Transpose <perm = [0, 2, {order}]> ({x}s)\n "
    for x, order in (("q", "1, 3"), ("k", "3, 1"), ("v", "1, 3"))
)
ATTENTION = (
    "s = MatMul (qh, kh)\n p = Softmax <axis = -1> (s)\n o = MatMul (p, vh)\n"
    " t = Transpose <perm = [0, 2, 1, 3]> (o)\n y = Reshape (t, join)"
)
JOIN = {"split": np.array([2, 3, 2, 4]), "join": np.array([2, 3, 8])}
WEIGHTS = {name: normal(8, 8) for name in ("wq", "wk", "wv")}
BIASES = {name: normal(8) for name in ("bq", "bk", "bv")}


def projections(rest="", outputs=f"{ROWS} y", source=("x", "x", "x")):
    body = "".join(
        f"{n}m = MatMul ({x}, w{n})\n {n} = Add ({n}m, b{n})\n "
        for n, x in zip("qkv", source, strict=True)
    )
    body += SPLIT + ATTENTION + rest
    before = graph(f"({ROWS} x, {ROWS} z) => ({outputs}) {{ {body} }}", **WEIGHTS, **BIASES, **JOIN)
    for step in (canonical_gemm, fold_bias, fuse_attention):
        before = apply(step, before)[0]
    return before


def test_projections_of_one_input_are_joined(golden):
    after = check(merge_projections, golden, projections(), "float", bound=BOUND)
    assert op_types(after) == ["Gemm", "Split", "Attention"]
    product = next(iter(after.graph))
    assert product.name == "qm+km+vm"
    assert product.inputs[1].shape.numpy() == (24, 8)


def test_keys_and_values_of_another_sequence_are_joined():
    after = check(merge_projections, None, projections(source=("x", "z", "z")), bound=BOUND)
    assert sorted(op_types(after)) == ["Attention", "Gemm", "Gemm", "Split"]


def test_a_projection_that_others_read_stays_alone():
    before = projections("\n r = Relu (k)", f"{ROWS} y, {ROWS} r")
    after = check(merge_projections, None, before, bound=BOUND)
    assert sorted(op_types(after)) == ["Attention", "Gemm", "Gemm", "Relu", "Split"]


def test_products_that_no_attention_reads_stay_alone():
    body = "a = MatMul (x, wq)\n b = MatMul (x, wk)\n y = Mul (a, b)"
    before = graph(f"({ROWS} x) => ({ROWS} y) {{ {body} }}", wq=WEIGHTS["wq"], wk=WEIGHTS["wk"])
    before, _ = apply(canonical_gemm, before)
    after, refusals = apply(merge_projections, before)
    assert op_types(after) == ["Gemm", "Gemm", "Mul"]
    assert not refusals


def quantized_projections(zeros=(0, 0, 0)):
    """Integer products, as fuse_integer leaves them, with scales of their own."""
    names = "qkv"
    params = ", ".join(
        f"float s{n} = {{{0.05 + 0.01 * i}}}, int8 z{n} = {{{zero}}}"
        for i, (n, zero) in enumerate(zip(names, zeros, strict=True))
    )
    body = "xd = DequantizeLinear (x, sx, zx)\n "
    for n in names:
        body += (
            f"{n}w = DequantizeLinear <axis = 1> (w{n}, s{n}w)\n {n}m = MatMul (xd, {n}w)\n"
            f" {n}f = Add ({n}m, b{n})\n {n}8 = QuantizeLinear ({n}f, s{n}, z{n})\n"
            f" {n} = DequantizeLinear ({n}8, s{n}, z{n})\n "
        )
    body += SPLIT + ATTENTION.replace(
        "o = MatMul (p, vh)",
        "p8 = QuantizeLinear (p, sp, zx)\n pd = DequantizeLinear (p8, sp, zx)\n"
        " o = MatMul (pd, vh)",
    )
    weights = {f"w{n}": RNG.integers(-127, 128, (8, 8)).astype(np.int8) for n in names}
    scales = {f"s{n}w": RNG.uniform(0.001, 0.01, 8).astype(np.float32) for n in names}
    before = graph(
        f"(int8[2,3,8] x) => ({ROWS} y)"
        f" <float sx = {{0.03}}, float sp = {{0.00787}}, int8 zx = {{0}}, {params}> {{ {body} }}",
        **weights, **scales, **BIASES, **JOIN,
    )  # fmt: skip
    for step in (canonical_gemm, fold_bias, fuse_attention, fuse_integer):
        before = apply(step, before)[0]
    return before


def test_integer_projections_keep_their_scales(golden):
    before = quantized_projections()
    assert op_types(before) == ["QGemm"] * 3 + ["QAttentionF"]
    after = check(merge_projections, golden, before, "integer", bound=0.0)
    assert op_types(after) == ["QGemm", "Split", "QAttentionF"]
    product = next(iter(after.graph))
    y_scale = product.inputs[6].const_value.numpy()
    assert np.array_equal(y_scale, np.repeat(np.float32([0.05, 0.06, 0.07]), 8))


def test_integer_projections_of_other_zero_points_are_refused():
    reason = refusal(merge_projections, quantized_projections((3, 0, 0)))
    assert "differ in type or zero point: 'qm' 3, 'km' 0, 'vm' 0" in reason


# canonical_gather


def test_gather_of_positions(golden):
    """A mask read at (sequence, key), as newer exporters spell it."""
    places = np.array([[[0, 2], [1, 0]], [[-1, 1], [0, -3]]])
    before = graph("(float[2,3,4] x) => (float[2,2,4] y) { y = GatherND (x, i) }", i=places)
    after = check(canonical_gather, golden, before, "nd")
    assert op_types(after) == ["Reshape", "Gather"]


@pytest.mark.parametrize(
    ("op", "shape", "index"),
    [
        ("GatherElements <axis = 1>", [1, 3], np.array([[4, 0, -1]])),
        ("Gather <axis = 1>", [2, 2], np.array([4, -5])),
        ("Expand", [3, 2, 5], np.array([3, 1, 1])),
    ],
)
def test_constants_at_constant_places(op, shape, index):
    dims = ",".join(map(str, shape))
    body = f"(float[{dims}] x) => (float[{dims}] y) {{ g = {op} (c, i)\n y = Add (x, g) }}"
    after = check(canonical_gather, None, graph(body, c=normal(2, 5), i=index))
    assert op_types(after) == ["Add"]


@pytest.mark.parametrize(
    ("reason", "op", "inputs", "shape"),
    [
        ("indices are computed", "GatherND (x, i)", "float[2,3] x, int64[2,2] i", "2"),
        ("batch axes", "GatherND <batch_dims = 1> (x, j)", "float[2,3] x", "2"),
    ],
)
def test_gather_refusals(reason, op, inputs, shape):
    constants = {"j": np.array([[1], [2]])} if "j" in op else {}
    before = graph(f"({inputs}) => (float[{shape}] y) {{ y = {op} }}", **constants)
    assert reason in refusal(canonical_gather, before)

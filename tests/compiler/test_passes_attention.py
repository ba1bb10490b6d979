"""The pass that finds attention, in the spellings of exporters, with and without quantizers."""

import numpy as np
import pytest

from tests.graphs import apply, check, graph, op_types, refusal, run
from twofour.compiler.passes import (
    canonical_gemm,
    canonical_quantize,
    fold_bias,
    fuse_attention,
    split_projections,
)

B, S, H, D = 2, 3, 2, 4  # sequences, tokens, heads, channels of a head
C = H * D
SIZES = {
    "split": np.array([B, S, H, D]),
    "join": np.array([B, S, C]),
    "heads": np.array([B * H, S, D]),
    "back": np.array([B, H, D, S]),
    "unjoined": np.array([B, H, S, D]),
    "half": np.float32(0.5),
    "two": np.float32(2),
    "low": np.float32(-np.inf),
    "zero": np.float32(0),
}
# Sums of D products and of S shares in another order, every |value| below 8.
BOUND = 4 * 8 * 8 * 2.0**-22
TYPE = f"float[{B},{S},{C}]"
QKV = f"{TYPE} a, {TYPE} b, {TYPE} c"
SPLIT = "".join(
    f"{x}s = Reshape ({source}, split)\n {x} = Transpose <perm = [0, 2, 1, 3]> ({x}s)\n "
    for x, source in (("q", "a"), ("k", "b"), ("v", "c"))
)
KT = "kt = Transpose <perm = [0, 1, 3, 2]> (k)\n "
SCORES = "s = MatMul (q, kt)\n t = Mul (s, half)\n "
JOIN = "o = MatMul (p, v)\n u = Transpose <perm = [0, 2, 1, 3]> (o)\n y = Reshape (u, join)"
SOFTMAX = "p = Softmax <axis = -1> (t)\n "
MASKED = SPLIT + KT + SCORES + "m = Add (t, mask)\n p = Softmax <axis = -1> (m)\n " + JOIN


def model(body, inputs=QKV, outputs=f"{TYPE} y", **constants):
    used = {name: value for name, value in SIZES.items() if name in body}
    return graph(f"({inputs}) => ({outputs}) {{ {body} }}", **used, **constants)


def attention(fused):
    """The one fused node."""
    (node,) = [node for node in fused.graph if node.domain == "twofour"]
    return node


SPELLINGS = {
    "plain": SPLIT + KT + SCORES + SOFTMAX + JOIN,
    # The newer exporter: k moved in 3 dimensions, q and k scaled each by the root.
    "roots": SPLIT
    + "kr = Reshape (k, heads)\n kp = Transpose <perm = [0, 2, 1]> (kr)\n"
    + " kb = Reshape (kp, back)\n qh = Mul (q, half)\n kt = Div (kb, two)\n"
    + " t = MatMul (qh, kt)\n "
    + SOFTMAX
    + JOIN,
    # k is transposed at once, the scores are divided.
    "divided": SPLIT.replace(
        "k = Transpose <perm = [0, 2, 1, 3]>", "kt = Transpose <perm = [0, 2, 3, 1]>"
    )
    + "s = MatMul (q, kt)\n t = Div (s, two)\n "
    + SOFTMAX
    + JOIN,
    # Products of 3 dimensions: heads and sequences in one axis.
    "joined": SPLIT
    + "".join(f"{x}j = Reshape ({x}, heads)\n " for x in "qkv")
    + "kt = Transpose <perm = [0, 2, 1]> (kj)\n t = MatMul (qj, kt)\n "
    + SOFTMAX
    + "oj = MatMul (p, vj)\n o = Reshape (oj, unjoined)\n"
    + " u = Transpose <perm = [0, 2, 1, 3]> (o)\n y = Reshape (u, join)",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_exporters(golden, name):
    after = check(fuse_attention, golden, model(SPELLINGS[name]), name, bound=BOUND)
    assert op_types(after) == ["Attention"]
    scale = {"plain": 0.5, "roots": 0.25, "divided": 0.5, "joined": 1.0}[name]
    assert attention(after).attributes["scale"].as_float() == scale
    assert attention(after).attributes["heads"].as_int() == H


def test_a_joint_projection_is_read_in_slices(golden):
    """One tensor of q, k and v, moved to an axis of its own, as vision transformers have it."""
    body = (
        "r = Reshape (a, parts)\n t5 = Transpose <perm = [2, 0, 3, 1, 4]> (r)\n"
        " q1, k1, v1 = Split <axis = 0, num_outputs = 3> (t5)\n"
        " q = Squeeze (q1, first)\n k = Squeeze (k1, first)\n v = Squeeze (v1, first)\n "
    )
    before = model(
        body + KT + SCORES + SOFTMAX + JOIN,
        f"float[{B},{S},{3 * C}] a",
        parts=np.array([B, S, 3, H, D]),
        first=np.array([0]),
    )
    after = check(fuse_attention, golden, before, "slices", bound=BOUND)
    assert op_types(after) == ["Slice", "Slice", "Slice", "Attention"]


def test_gathered_parts_of_a_joint_projection():
    body = (
        "r = Reshape (a, parts)\n t5 = Transpose <perm = [2, 0, 3, 1, 4]> (r)\n"
        " q = Gather <axis = 0> (t5, i0)\n k = Gather <axis = 0> (t5, i1)\n"
        " v = Gather <axis = 0> (t5, i2)\n "
    )
    before = model(
        body + KT + SCORES + SOFTMAX + JOIN,
        f"float[{B},{S},{3 * C}] a",
        parts=np.array([B, S, 3, H, D]),
        i0=np.array(0),
        i1=np.array(1),
        i2=np.array(2),
    )
    after = check(fuse_attention, None, before, bound=BOUND)
    assert op_types(after) == ["Slice", "Slice", "Slice", "Attention"]


def test_rows_of_all_sequences_in_one_axis(golden):
    """Projections of [B * S, C], as a Gemm needs them."""
    flat = f"float[{B * S},{C}]"
    before = model(
        (SPELLINGS["plain"]).replace("join", "rows"),
        f"{flat} a, {flat} b, {flat} c",
        f"{flat} y",
        rows=np.array([B * S, C]),
    )
    after = check(fuse_attention, golden, before, "rows", bound=BOUND)
    assert op_types(after) == ["Reshape"] * 3 + ["Attention", "Reshape"]


MASKS = {
    "keys": (f"float[{B},1,1,{S}] mask", MASKED, {}),
    "given_first": (f"float[{B},1,1,{S}] mask", MASKED.replace("(t, mask)", "(mask, t)"), {}),
    "choice": (
        f"bool[{B},1,{S},{S}] seen",
        MASKED.replace("m = Add (t, mask)", "m = Where (seen, t, low)"),
        {},
    ),
    "other_choice": (
        f"bool[{B},1,{S},{S}] hidden",
        MASKED.replace("m = Add (t, mask)", "m = Where (hidden, low, t)"),
        {"low": np.float32(-1e10)},
    ),
}


def feeds(fused):
    """Random inputs of any type; each query sees its own key."""
    random = np.random.default_rng(1)
    found = {}
    for value in fused.graph.inputs:
        shape = value.shape.numpy()
        found[value.name] = random.normal(size=shape).astype(np.float32)
        if value.dtype.numpy() == np.bool_:
            on = random.random(shape) < 0.5
            found[value.name] = (on | np.eye(S, dtype=bool)) ^ (value.name == "hidden")
    return found


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    added, body, constants = MASKS[name]
    sizes = {**SIZES, **constants}
    used = {key: value for key, value in sizes.items() if key in body}
    before = graph(f"({QKV}, {added}) => ({TYPE} y) {{ {body} }}", **used)
    after, refusals = apply(fuse_attention, before)
    assert not refusals
    assert op_types(after)[-1] == "AttentionMask"
    assert set(op_types(after)[:-1]) <= {"Where"}
    (want,), (got,) = (run(each, feeds(before)) for each in (before, after))
    assert np.abs(want - got).max() <= BOUND


CONSTANT_MASKS = {
    "causal": (np.triu(np.full((S, S), -np.inf), 1), "AttentionCausal"),
    "causal_finite": (np.triu(np.full((1, 1, S, S), -3.4e38), 1), "AttentionCausal"),
    "zeros": (np.zeros((1, 1, S, S)), "Attention"),
    "other": (np.tril(np.full((S, S), -1.0)), "AttentionMask"),
    "last_key": (np.array([[0.0, 0.0, -np.inf]] * S), "AttentionMask"),
}


@pytest.mark.parametrize("name", CONSTANT_MASKS)
def test_constant_masks(name):
    mask, op_type = CONSTANT_MASKS[name]
    after = check(fuse_attention, None, model(MASKED, mask=mask.astype(np.float32)), bound=BOUND)
    assert op_types(after) == [op_type]


def test_zeros_in_place_of_nan():
    """What exporters write around a softmax whose mask may hide every key."""
    guard = "p1 = Softmax <axis = -1> (m)\n n = IsNaN (p1)\n p = Where (n, zero, p1)\n "
    body = MASKED.replace("p = Softmax <axis = -1> (m)\n ", guard)
    before = model(body, f"{QKV}, float[{B},1,{S},{S}] mask")
    after, refusals = apply(fuse_attention, before)
    assert not refusals
    assert op_types(after) == ["AttentionMask"]
    given = feeds(before)
    given["mask"][0, 0, 1] = -np.inf
    (want,), (got,) = (run(each, given) for each in (before, after))
    assert not want[0, 1].any()
    assert np.abs(want - got).max() <= BOUND


PARAMETERS = "float s1 = {0.04}, float s2 = {0.03}, int8 z = {0}, int8 z1 = {5}"


def quantized(p=True, y=True, q=True, sp=0.00787):
    """Attention with quantizers where the moves leave them: at its ends, around the softmax."""
    bytes_in = SPLIT
    for x, zero in (("q", "z1"), ("k", "z"), ("v", "z")):
        if q or x != "q":
            bytes_in = bytes_in.replace(f"{x} = Transpose", f"{x}8 = Transpose")
            bytes_in += f"{x} = DequantizeLinear ({x}8, s1, {zero})\n "
    softmax = "p0 = Softmax <axis = -1> (t)\n p8 = QuantizeLinear (p0, sp, z)\n"
    softmax += " p = DequantizeLinear (p8, sp, z)\n "
    join = JOIN.replace("o = MatMul (p, v)", "o0 = MatMul (p, v)\n o = QuantizeLinear (o0, s2, z)")
    kind = TYPE.replace("float", "int8")
    first = kind if q else TYPE
    body = bytes_in + KT + SCORES + (softmax if p else SOFTMAX) + (join if y else JOIN)
    used = {name: value for name, value in SIZES.items() if name in body}
    return graph(
        f"({first} a, {kind} b, {kind} c) => ({kind if y else TYPE} y)"
        f" <{PARAMETERS}, float sp = {{{sp}}}> {{ {body} }}",
        **used,
    )


# What rounding p does to y: half a step for each key, times |v| <= 128 * 0.04.
P_BOUND = 0.00787 / 2 * S * 128 * 0.04


@pytest.mark.parametrize("y", [True, False])
def test_quantized_attention(golden, y):
    bound = P_BOUND / 0.03 + 1 if y else P_BOUND
    after = check(fuse_attention, golden, quantized(y=y), "bytes" if y else "bytes_float", bound)
    assert op_types(after) == ["QAttention" if y else "QAttentionF"]


@pytest.mark.parametrize(
    ("scale", "highest"), [(1 / 127, ""), (1 / 128, ""), (0.0077, "0.9779"), (1 / 255, "0.498")]
)
def test_a_softmax_that_saturates_below_1_is_refused(scale, highest):
    before = quantized(sp=scale)
    if highest:
        reason = refusal(fuse_attention, before)
        assert f"saturates at {highest}" in reason
    else:
        assert op_types(apply(fuse_attention, before)[0]) == ["QAttention"]


@pytest.mark.parametrize("y", [True, False])
def test_a_softmax_in_float_keeps_attention_in_float(y):
    after, (note,) = apply(fuse_attention, quantized(p=False, y=y))
    assert note.reason == "it stays float: the softmax is not quantized"
    assert op_types(after) == ["DequantizeLinear"] * 3 + ["Attention"] + ["QuantizeLinear"] * y
    (want,), (got,) = run(quantized(p=False, y=y)), run(after)
    off = np.abs(want.astype(np.float64) - got)
    assert off.max() <= (1 if y else BOUND)
    assert np.mean(off > BOUND) < 0.05


REFUSALS = {
    "not over the last axis": SPELLINGS["plain"].replace(
        "Softmax <axis = -1>", "Softmax <axis = 2>"
    ),
    "two masks": MASKED.replace("m = Add (t, mask)", "m0 = Add (t, mask)\n m = Add (m0, mask)"),
    "scaled after the mask": MASKED.replace(
        "m = Add (t, mask)", "m0 = Add (t, mask)\n m = Mul (m0, two)"
    ),
    "do not lie side by side": SPELLINGS["plain"]
    .replace("q = Transpose <perm = [0, 2, 1, 3]> (qs)", "q = Relu (ks)")
    .replace("qs = Reshape (a, split)\n", "")
    .replace("q = Relu (ks)", "q = Reshape (a, unjoined)"),
    "is not moved back to rows": SPELLINGS["plain"].replace(
        "perm = [0, 2, 1, 3]> (o)", "perm = [0, 1, 2, 3]> (o)"
    ),
    "masked scores become -5": MASKED.replace("Add (t, mask)", "Where (seen, t, five)"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(reason):
    body = REFUSALS[reason]
    mask = f", float[{B},1,1,{S}] mask" if "mask" in body else ""
    mask += f", bool[{B},1,{S},{S}] seen" if "seen" in body else ""
    five = {"five": np.float32(-5)} if "five" in body else {}
    assert reason in refusal(fuse_attention, model(body, QKV + mask, **five))


def test_only_some_operands_quantized_is_refused():
    reason = refusal(fuse_attention, quantized(q=False))
    assert reason.startswith("only some of q, k, v and the softmax are quantized: q is not, k is")


def test_a_product_that_others_read_is_refused():
    body = SPELLINGS["plain"]
    before = model(body, outputs=f"{TYPE} y, float[{B},{H},{S},{D}] o")
    assert "is an output of the model" in refusal(fuse_attention, before)


def test_a_softmax_alone_is_none_of_its_business():
    after, refusals = apply(fuse_attention, model("y = Softmax <axis = -1> (a)"))
    assert op_types(after) == ["Softmax"]
    assert not refusals


def test_keys_need_not_be_as_many_as_queries():
    body = SPELLINGS["plain"].replace("ks = Reshape (b, split)", "ks = Reshape (b, twice)")
    before = model(
        body.replace("vs = Reshape (c, split)", "vs = Reshape (c, twice)"),
        f"{TYPE} a, float[{B},{2 * S},{C}] b, float[{B},{2 * S},{C}] c",
        twice=np.array([B, 2 * S, H, D]),
    )
    after, refusals = apply(fuse_attention, before)
    assert not refusals
    assert op_types(after) == ["Attention"]


# split_projections

PART = (
    "m0 = {product}\n m = Add (m0, bias)\n r = Reshape (m, parts)\n"
    " t5 = Transpose <perm = [2, 0, 3, 1, 4]> (r)\n"
    " k1 = Gather <axis = 0> (t5, i1)\n {rest}"
)
BYTES = np.array([0.02], np.float32).reshape(()), np.array(3, np.int8)


def joint(product, rest, output, **constants):
    given = {
        "w": RNG.normal(size=(C, 3 * C)).astype(np.float32),
        "bias": RNG.normal(size=3 * C).astype(np.float32),
        "parts": np.array([B, S, 3, H, D]),
        "i1": np.array(1),
        "s": BYTES[0],
        "z": BYTES[1],
        **constants,
    }
    body = PART.format(product=product, rest=rest)
    used = {name: value for name, value in given.items() if name in body}
    before = graph(f"({TYPE} a) => ({output}) {{ {body} }}", **used)
    for step in (canonical_gemm, fold_bias):
        before = apply(step, before)[0]
    return before


RNG = np.random.default_rng(4)
PLAIN = "y = QuantizeLinear (k1, s, z)"
TURNED = "k2 = Transpose <perm = [0, 1, 3, 2]> (k1)\n y = QuantizeLinear (k2, s, z)"


@pytest.mark.parametrize(
    ("name", "rest", "shape"),
    [("plain", PLAIN, [B, H, S, D]), ("turned", TURNED, [B, H, D, S])],
)
def test_a_quantized_part_gets_its_own_product(golden, name, rest, shape):
    output = f"int8[{','.join(map(str, shape))}] y"
    before = joint("MatMul (a, w)", rest, output)
    after = check(split_projections, golden, before, name, bound=0.0)
    assert op_types(after) == ["Gemm", "QuantizeLinear", "Reshape", "Transpose"]
    assert next(iter(after.graph)).inputs[1].shape.numpy() == (C, C)


@pytest.mark.parametrize("scales", [3 * C, 1])
def test_a_part_of_a_quantized_weight_keeps_its_integers(scales):
    w8 = RNG.integers(-127, 128, (C, 3 * C)).astype(np.int8)
    ws = RNG.uniform(0.001, 0.01, scales).astype(np.float32)
    product = "MatMul (a, wd)"
    body = PART.format(product=product, rest=PLAIN)
    axis = " <axis = 1>" if scales > 1 else ""
    before = graph(
        f"({TYPE} a) => (int8[{B},{H},{S},{D}] y)"
        f" {{ wd = DequantizeLinear{axis} (w8, ws)\n {body} }}",
        w8=w8,
        ws=ws if scales > 1 else ws.reshape(()),
        bias=RNG.normal(size=3 * C).astype(np.float32),
        parts=np.array([B, S, 3, H, D]),
        i1=np.array(1),
        s=BYTES[0],
        z=BYTES[1],
    )
    before = apply(canonical_quantize, before)[0]
    for step in (canonical_gemm, fold_bias):
        before = apply(step, before)[0]
    after = check(split_projections, None, before, bound=0.0)
    assert op_types(after)[:2] == ["DequantizeLinear", "Gemm"]
    assert np.array_equal(next(iter(after.graph)).inputs[0].const_value.numpy(), w8.T[C : 2 * C])


def test_a_whole_projection_is_not_split():
    body = (
        "m = MatMul (a, w)\n r = Reshape (m, split)\n t = Transpose <perm = [0, 2, 1, 3]> (r)\n"
        " y = QuantizeLinear (t, s, z)"
    )
    before = graph(
        f"({TYPE} a) => (int8[{B},{H},{S},{D}] y) {{ {body} }}",
        w=RNG.normal(size=(C, C)).astype(np.float32),
        split=SIZES["split"],
        s=BYTES[0],
        z=BYTES[1],
    )
    before = apply(canonical_gemm, before)[0]
    after, refusals = apply(split_projections, before)
    assert op_types(after) == op_types(before)
    assert not refusals


def test_a_part_that_is_quantized_per_channel_is_refused():
    per_channel = {"s": np.full(D, 0.02, np.float32), "z": np.zeros(D, np.int8)}
    rest = PLAIN.replace("QuantizeLinear", "QuantizeLinear <axis = 3>")
    before = joint("MatMul (a, w)", rest, f"int8[{B},{H},{S},{D}] y", **per_channel)
    assert "per channel" in refusal(split_projections, before)

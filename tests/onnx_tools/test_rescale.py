"""Channels are multiplied where that keeps the function, and left where it would not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph, run
from twofour.onnx_tools.rescale import rescale, trace

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def scaled(model: ir.Model) -> tuple[ir.Model, int]:
    """A copy with a factor for each channel that is not pinned, and how many there are."""
    model = model.clone()
    traced = trace(model)
    fixed = traced.channels.fixed()
    every = {r for p in traced.places for r in np.unique(traced.channels.roots(p.written)).tolist()}
    free = sorted(root for root in every if root > 0 and root not in fixed)
    rescale(
        model,
        traced,
        {r: float(f) for r, f in zip(free, RANDOM.uniform(0.2, 5, len(free)), strict=True)},
    )
    return model, len(free)


def same(one: ir.Model, other: ir.Model, **feeds: np.ndarray) -> None:
    for a, b in zip(run(one, feeds), run(other, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


CASES = {
    "relu": ("r = Relu (c)", 8),
    "leaky": ("r = LeakyRelu <alpha = 0.1> (c)", 8),
    "slopes": ("r = PRelu (c, slope)", 8),
    "clip": ("r = Clip (c, zero)", 8),
    "relu6": ("r = Clip (c, zero, six)", 0),
    "sigmoid": ("r = Sigmoid (c)", 0),
    "swish": ("s = Sigmoid (c) r = Mul (c, s)", 0),
    "gate": ("g = GlobalAveragePool (c) h = Conv (g, e) i = Sigmoid (h) r = Mul (c, i)", 8),
    "pools": (
        "p = MaxPool <kernel_shape = [2, 2]> (c) r = AveragePool <kernel_shape = [2, 2]> (p)",
        8,
    ),
    "depthwise": ("d = Relu (c) r = Conv <group = 8> (d, k, b)", 16),
    "grouped": ("d = Relu (c) r = Conv <group = 2> (d, g2)", 16),
    "residual": ("d = Relu (c) h = Conv (d, e) i = Add (h, d) r = Relu (i)", 8),
    "second": ("d = Relu (c) h = Conv (d, e) r = Add (h, i0)", 8),
    "shuffle": (
        "a = Reshape (c, groups) t = Transpose <perm = [0, 2, 1, 3, 4]> (a) r = Reshape (t, back)",
        8,
    ),
    "halves": ("p, q = Split <axis = 1> (c, parts) s = Relu (q) r = Concat <axis = 1> (s, p)", 8),
    "joined": ("o = Conv (i0, e) r = Concat <axis = 1> (c, o)", 16),
    "slices": ("p = Slice (c, two, end, one) r = Pad (p, pads)", 8),
    "padded": (
        "p = Slice (c, two, end, one) q = Pad (p, pads) h = Conv (i0, e) r = Add (q, h)",
        11,
    ),
    "filled": (
        "p = Slice (c, two, end, one) q = Pad (p, pads) f = Add (q, b4) h = Conv (i0, e) "
        "r = Add (f, h)",
        3,
    ),
    "picked": ("r = Gather <axis = 1> (c, order)", 8),
    "even": ("a = Add (c, b4) r = Mul (a, half)", 8),
    "resized": ('r = Resize <mode = "linear"> (c, , double)', 8),
    "reduced": ("r = ReduceMean <keepdims = 1> (c, hw)", 8),
    "softmax": ("r = Softmax <axis = 1> (c)", 0),
    "output": ("r = Relu (c) z = Identity (c)", 0),
}


@pytest.mark.parametrize("name", CASES)
def test_convolutions(name: str) -> None:
    body, free = CASES[name]
    outputs = "float[2,4,a,b] y" + (", float[2,8,6,6] z" if name == "output" else "")
    reads = 16 if name == "joined" else 8
    model = graph(
        f"""(float[2,8,6,6] i0) => ({outputs}) <int64[5] groups = {{2, 2, 4, 6, 6}},
        int64[4] back = {{2, 8, 6, 6}}, int64[2] parts = {{3, 5}}, int64[1] one = {{1}},
        int64[1] two = {{2}}, int64[1] end = {{7}}, int64[8] pads = {{0, 1, 0, 0, 0, 2, 0, 0}},
        int64[8] order = {{3, 1, 1, 0, 7, 6, 5, 4}}, int64[2] hw = {{2, 3}}>
        {{ c = Conv <pads = [1, 1, 1, 1]> (i0, w, b) {body} y = Conv (r, v) }}""",
        w=normal(8, 8, 3, 3), b=normal(8), v=normal(4, reads, 1, 1), e=normal(8, 8, 1, 1),
        k=normal(8, 1, 3, 3), g2=normal(8, 4, 1, 1), slope=abs(normal(8, 1, 1)),
        zero=np.float32(0), six=np.float32(6), half=np.float32(0.5), b4=normal(1, 8, 1, 1),
        double=np.array([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    after, count = scaled(model)
    assert count == free
    same(model, after)


ATTENTION = """(float[2,5,16] x) => (float[2,5,16] y) <
    int64[4] heads = {2, 5, 4, 4}, int64[3] rows = {2, 5, 16}, int64[1] last = {-1}>
{
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    q0 = MatMul (n, wq) q1 = Add (q0, b) q2 = Reshape (q1, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k0 = MatMul (n, wk) k2 = Reshape (k0, heads) k = Transpose <perm = [0, 2, 3, 1]> (k2)
    v0 = MatMul (n, wv) v1 = Add (b, v0) v2 = Reshape (v1, heads)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
    s = MatMul (q, k) p = Softmax (s) o = MatMul (p, v)
    t = Transpose <perm = [0, 2, 1, 3]> (o) u = Reshape (t, rows) w = MatMul (u, wo)
    m = Add (x, w)
    mean = ReduceMean (m, last) d = Sub (m, mean) dd = Mul (d, d) var = ReduceMean (dd, last)
    ve = Add (var, eps) sd = Sqrt (ve) z = Div (d, sd) g1 = Mul (z, gamma2) g = Add (g1, beta2)
    f = Gemm_free (g)
}"""


def attention() -> ir.Model:
    body = ATTENTION.replace("f = Gemm_free (g)", "y = MatMul (g, wf)")
    return graph(
        body, gamma=normal(16), beta=normal(16), gamma2=normal(16), beta2=normal(16), b=normal(16),
        eps=np.float32(1e-5), **{w: normal(16, 16) for w in ("wq", "wk", "wv", "wo", "wf")},
    )  # fmt: skip


def test_normalizations_and_heads() -> None:
    """Of n, v and g; not of q and k, which are multiplied with each other."""
    model = attention()
    after, count = scaled(model)
    assert count == 3 * 16
    same(model, after)
    before = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    now = {name: v.const_value.numpy() for name, v in after.graph.initializers.items()}
    ends = np.log(np.abs(now["wv"] / before["wv"]))  # 1 / n of each row, v of each column
    assert np.allclose(ends - ends[:1] - ends[:, :1] + ends[0, 0], 0, atol=1e-4)
    assert np.ptp(now["wq"] / before["wq"], axis=1).max() < 1e-5


def test_a_pinned_channel_is_refused() -> None:
    model = graph("(float[2,4] x) => (float[2,4] y) {y = Gemm (x, w)}", w=normal(4, 4))
    traced = trace(model)
    assert set(traced.channels.fixed().values()) == {"an output of the model"}
    with pytest.raises(ValueError, match="pinned"):
        rescale(model, traced, {min(traced.channels.fixed()): 2.0})


def test_what_lies_under_flattened_pixels_is_one_channel() -> None:
    model = graph(
        """(float[2,3,2,2] x) => (float[2,5] y) { c = Conv (x, w) r = Relu (c) f = Flatten (r)
        y = Gemm <transB = 1> (f, v) }""",
        w=normal(4, 3, 1, 1), v=normal(5, 16),
    )  # fmt: skip
    after, count = scaled(model)
    assert count == 4
    same(model, after)


def test_shared_weights_stay() -> None:
    model = graph(
        """(float[2,4] x) => (float[2,4] y, float[2,4] z) { h = Gemm (x, w) r = Relu (h)
        y = Gemm (r, v) z = Gemm (x, w) }""",
        w=normal(4, 4), v=normal(4, 4),
    )  # fmt: skip
    assert scaled(model)[1] == 0

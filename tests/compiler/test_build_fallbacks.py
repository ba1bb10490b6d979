"""Networks with operators no kernel covers: steps on ONNX Runtime, equal results, reasons."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.engines import built_and_run, random_inputs, reference, steps
from tests.graphs import graph
from twofour.compiler.build import build

RANDOM = np.random.default_rng(0)


def w(*shape: int) -> np.ndarray:
    """Weights that keep values near 1."""
    size = np.prod(shape[1:]) ** -0.5
    return (RANDOM.normal(size=shape) * size).astype(np.float32)


K1, K3 = w(16, 16, 1, 1), w(16, 16, 3, 3)
X = "(float[1,16,6,6] x) => (float[1,16,6,6] y)"
# Sums of up to 144 products around 1 in another order, through a few layers.
BOUND = 2e-5

CASES = {
    "start": (f"{X} {{ s = Sin (x) y = Conv (s, k) }}", {"k": K1}),
    "middle": (f"{X} {{ a = Conv (x, k) s = Sin (a) y = Conv (s, k) }}", {"k": K1}),
    "end": ("(float[2,8] x) => (float[2,5] y) { a = MatMul (x, k) y = LogSoftmax (a) }",
            {"k": w(8, 5)}),
    "in and out": (f"{X} {{ a = Conv (x, k) b = Cos (a) c = Conv <pads=[1,1,1,1]> (b, l)"
                   " d = Add (c, b) e = Sin (d) f = Conv (e, k) y = Add (f, d) }",
                   {"k": K1, "l": K3}),
    "transposed": (f"{X} {{ a = Conv (x, k) b = ConvTranspose (a, k) y = Conv (b, k) }}",
                   {"k": K1}),
    "1-D": ("(float[1,4,9] x) => (float[1,4,9] y) { a = Conv <pads = [1,1]> (x, k) y = Relu (a) }",
            {"k": w(4, 4, 3)}),
    "lstm": ("(float[5,1,8] x) => (float[5,1,4] y) <int64[1] a = {1}>"
             "{ l = LSTM <hidden_size = 8> (x, i, r) s = Squeeze (l, a) y = MatMul (s, k) }",
             {"i": w(1, 32, 8), "r": w(1, 32, 8), "k": w(8, 4)}),
    "flatten": ("(float[2,16,2,2] x) => (float[2,5] y)"
                "{ c = Conv (x, k) f = Flatten (c) y = MatMul (f, l) }", {"k": K1, "l": w(64, 5)}),
    "reordering reshape": ("(float[2,5,8] x) => (float[2,3] y) <int64[1] a = {2}>"
                           "{ u = MatMul (x, k) v = Squeeze (u, a) y = MatMul (v, l) }",
                           {"k": w(8, 1), "l": w(5, 3)}),
    "4-D product": ("(float[1,2,3,8] x) => (float[1,2,3,5] y) { y = MatMul (x, k) }",
                    {"k": w(8, 5)}),
    "constant operands": (f"{X} {{ a = Conv (x, k) b = Relu (a) c = Add (h, b)"
                          " d = Conv (c, k) y = Add (d, h) }", {"k": K1, "h": w(1, 16, 6, 6)}),
    "no kernel at all": (f"{X} {{ a = Relu (x) y = Sin (a) }}", {}),
    "nothing to do": (f"{X} {{ y = Identity (x) }}", {}),
    "passed through": ("(float[1,16,6,6] x) => (float[1,16,6,6] y, float[1,16,6,6] z)"
                       "{ y = Conv (x, k) z = Identity (x) }", {"k": K1}),
    "second output of TopK": ("(float[1,16,6,6] x) => (int64[1,16,6,2] i) <int64[1] n = {2}>"
                              "{ a = Conv (x, k) v, i = TopK (a, n) }", {"k": K1}),
    "indices of MaxPool": ("(float[1,16,6,6] x) => (float[1,16,3,3] y, int64[1,16,3,3] i)"
                           "{ a = Conv (x, k)"
                           " y, i = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a) }",
                           {"k": K1}),
    "shape only while running": (f"{X} {{ a = Conv (x, k) n = NonZero (a) s = Shape (n)"
                                 " f = Cast <to = 1> (s) m = ReduceMax <keepdims = 0> (f)"
                                 " y = Div (a, m) }", {"k": K1}),
    "scalar between steps": (f"{X} {{ a = Conv (x, k) m = ReduceMax <keepdims = 0> (a)"
                             " b = Conv (a, k) y = Div (b, m) }", {"k": K1}),
    "scalar output": ("(float[1,16,6,6] x) => (float m, float[1,16,6,6] y)"
                      "{ y = Conv (x, k) m = ReduceMax <keepdims = 0> (y) }", {"k": K1}),
    "scalar squeezed": ("(float[1,16,6,6] x, float[1] s) => (float[1,16,6,6] y)"
                        "{ a = Conv (x, k) q = Squeeze (s) y = Mul (a, q) }", {"k": K1}),
    "means": ("(float[1,16,6,6] x) => (float[1,1,1,1] y, float[1,16,6,6] z)"
              "{ a = Conv (x, k) y = ReduceMean (a)"
              " z = ReduceMean <noop_with_empty_axes = 1> (a) }", {"k": K1}),
    "integers": ("(float[1,16,6,6] x, int32[3] a, int32[3] b) => (float[1,16,6,6] y, int32[3] z)"
                 "{ y = Conv (x, k) z = Div (a, b) }", {"k": K1}),
    "booleans": ("(float[1,16,6,6] x) => (bool[1,16,6,6] y) <float z = {0}>"
                 "{ a = Conv (x, k) y = Greater (a, z) }", {"k": K1}),
    "half precision": ("(float16[2,8] x) => (float16[2,5] y) { y = MatMul (x, k) }",
                       {"k": w(8, 5).astype(np.float16)}),
    "empty": ("(float[0,16,6,6] x) => (float[0,16,6,6] y) { y = Conv (x, k) }", {"k": K1}),
    "input nobody reads": ("(float[1,16,6,6] x, float[3] u) => (float[1,16,6,6] y)"
                           "{ y = Conv (x, k) }", {"k": K1}),
    "if": ("(float[1,16,6,6] x, bool b) => (float[1,16,6,6] y) { a = Conv (x, k) s = Sin (a)"
           " i = If <then_branch = t () => (float[1,16,6,6] p) { p = Mul (s, h) },"
           "         else_branch = e () => (float[1,16,6,6] q) { q = Neg (x) }> (b)"
           " y = Conv (i, k) }", {"k": K1, "h": w(1, 16, 1, 1)}),
    "if in if": ("(float[1,16,6,6] x, bool b) => (float[1,16,6,6] y) { p = Neg (x) c = Conv (x, k)"
                 " y = If <then_branch = g1 () => (float[1,16,6,6] t) {"
                 "   t = If <then_branch = g2 () => (float[1,16,6,6] t2) { t2 = Sigmoid (c) },"
                 "           else_branch = g3 () => (float[1,16,6,6] t3) { t3 = Neg (p) }> (b) },"
                 " else_branch = g4 () => (float[1,16,6,6] e) { e = Neg (x) }> (b) }", {"k": K1}),
    "loop": (f"{X} <int64 n = {{3}}, bool t = {{1}}> {{ c = Conv (x, k)"
             " y = Loop <body = b (int64 i, bool go, float[1,16,6,6] a) =>"
             " (bool on, float[1,16,6,6] r) { on = Identity (go) m = Mul (a, h) r = Add (m, c) }>"
             " (n, t, c) }", {"k": K1, "h": w(1, 16, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equal_to_onnxruntime(case, timing_cache) -> None:
    body, constants = case
    model = graph(body, **constants)
    inputs = random_inputs(model)
    if "b" in inputs and inputs["b"].dtype == np.int32:
        inputs["b"] = np.arange(1, 4, dtype=np.int32)
    want = reference(model, inputs)
    got = built_and_run(model, inputs, timing_cache=timing_cache)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape)
        assert np.allclose(got[name], value, rtol=BOUND, atol=BOUND), name


def test_every_layer_on_onnxruntime_says_why(timing_cache) -> None:
    model = graph(
        f"{X} {{ a = Conv (x, k) s = Sin (a) r = Relu (s) b = Cos (r) y = Conv (b, k) }}",
        k=K1,
    )
    engine = build(model, timing_cache=timing_cache, race=False)
    assert steps(engine) == [
        ("native", ["Conv"]),
        ("onnxruntime", ["Sin", "Relu", "Cos"]),
        ("native", ["Conv"]),
    ]
    notes = {layer.name: " ".join(layer.notes) for layer in engine.plan.layers}
    assert "no native kernel for Sin" in notes["s"]
    assert "no convolution or matrix product" in notes["r"]
    assert "no native kernel for Cos" in notes["b"]
    fallbacks = [layer for layer in engine.plan.layers if layer.tactic == "onnxruntime"]
    assert fallbacks[0].time_us is not None


def test_inputs_of_ones_may_be_refused_by_the_model(timing_cache) -> None:
    """Timing is a service: what it feeds must not decide whether a model builds."""
    model = graph(
        "(float[1,16,6,6] x, int64[3,1] at) => (float[1,16,6,6] y, float[3] z) <float[1] t = {2}>"
        "{ y = Conv (x, k) z = GatherND (t, at) }",
        k=K1,
    )
    engine = build(model, timing_cache=timing_cache, race=False)
    (layer,) = [layer for layer in engine.plan.layers if layer.op == "GatherND"]
    assert layer.time_us is None
    assert "does not take ones" in " ".join(layer.notes)

"""The pass that finds matrix products which quantize their input at run time."""

import numpy as np
import pytest

from tests.graphs import apply, check, graph, op_types, refusal, run
from twofour.compiler.passes import fuse_dynamic
from twofour.compiler.passes.pipeline import run_passes
from twofour.core.dynamic import LEAST

RNG = np.random.default_rng(5)
K, N = 8, 6
HEAD = "(float[2,3,8] x) => (float[2,3,6] y)"
ROWS = """
 a = Abs (x)
 p = ReduceMax <keepdims = 1> (a, last)
 h = Max (p, least)
 f = Div (steps, h)
 s = Div (h, steps)
 v = Mul (x, f)
 r = Round (v)
 m = Add (r, zero)
 q = Cast <to = 2> (m)
 sums = MatMulInteger (q, w8, point)
 real = Cast <to = 1> (sums)
 o = Mul (real, s)
 y = Mul (o, ws)"""
TENSOR = """
 q, s, z = DynamicQuantizeLinear (x)
 sums = MatMulInteger (q, w8, z)
 real = Cast <to = 1> (sums)
 o = Mul (s, ws)
 y = Mul (real, o)"""
NUMBERS = {
    "last": np.array([-1]),
    "least": np.float32(LEAST),
    "steps": np.float32(127),
    "zero": np.float32(128),
    "point": np.uint8(128),
    "w8": RNG.integers(-127, 128, (K, N)).astype(np.int8),
    "ws": RNG.uniform(0.01, 0.02, N).astype(np.float32),
}
# y = sums * s * ws, each factor rounded: |y| < K * 128 * 128 * max(s * ws) < 10.
BOUND = 4 * 10 * 2.0**-23


def model(body, head=HEAD, **constants):
    given = {**NUMBERS, **constants}
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return graph(f"{head} {{{body} }}", **{n: v for n, v in given.items() if n in words})


@pytest.mark.parametrize(("name", "body"), [("row", ROWS), ("tensor", TENSOR)])
def test_both_forms(golden, name, body):
    after = check(fuse_dynamic, golden, model(body), name, bound=BOUND)
    assert op_types(after) == [{"row": "RowGemm", "tensor": "TensorGemm"}[name]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Mul (x, f)", "Mul (f, x)"),
        ("Add (r, zero)", "Add (zero, r)"),
        ("Max (p, least)", "Max (least, p)"),
        ("o = Mul (real, s)\n y = Mul (o, ws)", "o = Mul (ws, real)\n y = Mul (s, o)"),
        ("o = Mul (real, s)\n y = Mul (o, ws)", "o = Mul (s, ws)\n y = Mul (o, real)"),
    ],
)
def test_rows_spelled_another_way(old, new):
    assert old in ROWS
    after = check(fuse_dynamic, None, model(ROWS.replace(old, new)), bound=BOUND)
    assert op_types(after) == ["RowGemm"]


def test_rows_of_an_older_opset():
    body = ROWS.replace("<keepdims = 1> (a, last)", "<axes = [2], keepdims = 1> (a)")
    numbers = {n: v for n, v in NUMBERS.items() if n != "last"}
    after = check(fuse_dynamic, None, graph(f"{HEAD} {{{body} }}", 17, **numbers), bound=BOUND)
    assert op_types(after) == ["RowGemm"]


@pytest.mark.parametrize(
    ("w8", "point"),
    [
        (RNG.integers(0, 256, (K, N)).astype(np.uint8), np.uint8(128)),
        (RNG.integers(-50, 50, (K, N)).astype(np.int8), np.arange(N).astype(np.int8)),
        (RNG.integers(-127, 128, (K, N)).astype(np.int8), np.zeros(N, np.int8)),
    ],
)
def test_weights_with_a_zero_point(w8, point):
    body = TENSOR.replace("w8, z)", "w8, z, wz)")
    before = model(body, w8=w8, wz=point)
    after = check(fuse_dynamic, None, before, bound=BOUND)
    w = next(iter(after.graph)).inputs[1].const_value.numpy()
    np.testing.assert_array_equal(w, (w8.astype(int) - point).T)


@pytest.mark.parametrize(
    ("reason", "body", "constants"),
    [
        ("uint8 128", ROWS, {"point": np.uint8(127)}),
        ("not rounded row by row", ROWS, {"zero": np.float32(127)}),
        ("not rounded row by row", ROWS, {"least": np.float32(1e-6)}),
        ("not rounded row by row", ROWS, {"steps": np.float32(126)}),
        ("not rounded row by row", ROWS.replace("(a, last)", "(a)"), {}),
        ("not rounded row by row", ROWS.replace("Round", "Floor"), {}),
        ("not rounded row by row", ROWS.replace("Abs (x)", "Relu (x)"), {}),
        ("expected what int8 holds", TENSOR.replace("w8, z)", "w8, z, wz)"),
         {"w8": np.full((K, N), 200, np.uint8), "wz": np.uint8(3)}),
        ("is empty", TENSOR, {"w8": np.zeros((K, 0), np.int8), "ws": np.ones(0, np.float32)}),
        ("another zero point", TENSOR.replace("w8, z)", "w8, point)"), {}),
        ("not a constant matrix", TENSOR, {"w8": np.ones((2, K, N), np.int8)}),
        ("not one of its scales", TENSOR, {"ws": -NUMBERS["ws"]}),
        ("not one of its scales", TENSOR, {"ws": np.ones((3, 1), np.float32)}),
        ("change the shape", TENSOR, {"ws": np.ones((1, 1, 1, N), np.float32)}),
        ("not one of its scales", TENSOR.replace("Mul (s, ws)", "Mul (s, s)"), {}),
        ("expected Cast to float32", TENSOR.replace("real = Cast <to = 1> (sums)\n",
         "d = Cast <to = 11> (sums)\n real = Cast <to = 1> (d)\n").replace("d = Cast <to = 11>",
         "d = Identity"), {}),
        ("are not multiplied by", TENSOR.replace("o = Mul (s, ws)\n y = Mul (real, o)",
         "o = Mul (real, s)\n y = Sub (o, ws)"), {}),
    ],
)  # fmt: skip
def test_refusals(reason, body, constants):
    unlike = "shape" in reason or "empty" in reason
    head = HEAD.replace("[2,3,6] y", "[] y") if unlike else HEAD
    given = model(body, head, **constants)
    assert reason in refusal(fuse_dynamic, given)


@pytest.mark.parametrize("name", ["zero", "least"])
def test_constants_that_add_a_dimension_are_refused(name):
    wide = np.full((1, 1, 1, 1), NUMBERS[name], np.float32)
    before = model(ROWS, "(float[2,3,8] x) => (float[1,2,3,6] y)", **{name: wide})
    assert "not that of 'x'" in refusal(fuse_dynamic, before)


def test_sums_that_others_read_stay():
    head = "(float[2,3,8] x) => (float[2,3,6] y, int32[2,3,6] sums)"
    assert "output of the model" in refusal(fuse_dynamic, model(TENSOR, head))


def test_other_types_than_float32_stay():
    before = model(TENSOR, "(float[8] x) => (float[6] y)")
    assert "expected float32 rank 2" in refusal(fuse_dynamic, before)


@pytest.mark.parametrize("body", [ROWS, TENSOR])
def test_bias_residual_and_activation_follow(body):
    more = body.replace("y = Mul", "n = Mul") + "\n c = Add (b, n)\n d = Add (c, e)\n y = Relu (d)"
    head = "(float[2,3,8] x, float[2,3,6] e) => (float[2,3,6] y)"
    before = model(more, head, b=RNG.normal(size=N).astype(np.float32))
    after = run_passes(before).model
    assert op_types(after) in (["RowGemmAddRelu"], ["TensorGemmAddRelu"])
    for want, got in zip(run(before), run(after), strict=True):
        np.testing.assert_allclose(got, want, atol=2 * BOUND)


def test_products_of_floats_are_left_alone():
    before = graph(f"{HEAD} {{ y = MatMul (x, w) }}", w=np.ones((K, N), np.float32))
    after, refusals = apply(fuse_dynamic, before)
    assert op_types(after) == ["MatMul"]
    assert not refusals

"""Convolutions of other kinds become plain ones: over one axis, and transposed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.engines import fused, reference, run_twice, steps
from tests.graphs import apply, graph, op_types, refusal, run
from twofour.compiler.build import build
from twofour.compiler.passes import (
    canonical_batchnorm,
    canonical_conv_1d,
    canonical_conv_transpose,
)

RANDOM = np.random.default_rng(0)


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {n: RANDOM.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


def same(before: ir.Model, after: ir.Model) -> None:
    for expected, got in zip(run(before), run(after), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@st.composite
def transposed(draw: st.DrawFn) -> tuple[str, dict[str, np.ndarray]]:
    """ConvTranspose with any attributes that ONNX Runtime takes."""
    rank, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    c, n = group * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    numbers = {
        name: [draw(st.integers(low, high)) for _ in range(rank)]
        for name, low, high in (("k", 1, 5), ("s", 1, 3), ("d", 1, 2), ("x", 2, 6))
    }
    reach = [d * (k - 1) for d, k in zip(numbers["d"], numbers["k"], strict=True)]
    pads = [draw(st.integers(0, min(2, r))) for r in (*reach, *reach)]
    extra = [draw(st.integers(0, s - 1)) for s in numbers["s"]]
    outs = [
        s * (x - 1) + r + 1 + e - a - b
        for s, x, r, e, a, b in zip(
            numbers["s"], numbers["x"], reach, extra, pads[:rank], pads[rank:], strict=True
        )
    ]
    if min(outs) < 1:
        outs = [o - e + a + b for o, e, a, b in zip(outs, extra, pads, pads[rank:], strict=False)]
        extra, pads = [0] * rank, [0] * 2 * rank
    attributes = (
        f"strides = {numbers['s']}, dilations = {numbers['d']}, pads = {pads},"
        f" output_padding = {extra}, group = {group}"
    )
    shape = ",".join(map(str, (2, c, *numbers["x"])))
    constants = weights(w=(c, n, *numbers["k"]), b=(group * n,))
    result = ",".join(map(str, (2, group * n, *outs)))
    node = f"y = ConvTranspose <{attributes}> (x, w, b)"
    return f"(float[{shape}] x) => (float[{result}] y) {{ {node} }}", constants


@settings(max_examples=80, deadline=None)
@given(transposed())
def test_phases_give_what_the_transposed_one_gives(case: tuple[str, dict[str, np.ndarray]]) -> None:
    model = graph(case[0], **case[1])
    after, _ = apply(canonical_conv_transpose, model)
    if "ConvTranspose" in op_types(after):
        assert "phases" in refusal(canonical_conv_transpose, model)
    else:
        same(model, after)


@pytest.mark.parametrize(
    ("mode", "size"), [("SAME_UPPER", "10,8"), ("SAME_LOWER", "10,8"), ("VALID", "11,9")]
)
def test_automatic_padding(mode: str, size: str) -> None:
    model = graph(
        f'(float[1,2,5,4] x) => (float[1,3,{size}] y) {{ y = ConvTranspose <auto_pad = "{mode}",'
        " strides = [2,2]> (x, w) }",
        **weights(w=(2, 3, 3, 3)),
    )
    after, _ = apply(canonical_conv_transpose, model)
    assert "ConvTranspose" not in op_types(after)
    same(model, after)


def test_what_follows_becomes_part_of_the_weights() -> None:
    constants = weights(w=(4, 3, 2, 2), c=(1, 3, 1, 1), g=(3,), b=(3,), m=(3,))
    model = graph(
        "(float[1,4,5,4] x) => (float[1,3,10,8] y) { t = ConvTranspose <strides = [2,2]> (x, w)"
        " a = Add (t, c) n = BatchNormalization (a, g, b, m, v) y = Relu (n) }",
        **constants,
        v=np.array([0.5, 1, 2], np.float32),
    )
    after, _ = apply(canonical_conv_transpose, model)
    assert op_types(after) == ["Conv", "Relu", "Reshape", "Transpose", "Reshape"]
    same(model, after)


def test_integers_stay_integers() -> None:
    model = graph(
        "(float[1,4,5,4] x) => (float[1,3,12,10] y) { f = DequantizeLinear <axis = 1> (w, s)"
        " y = ConvTranspose <strides = [2,2]> (x, f) }",
        w=RANDOM.integers(-127, 128, (4, 3, 4, 4)).astype(np.int8),
        s=np.array([0.01, 0.02, 0.03], np.float32),
    )
    after, _ = apply(canonical_conv_transpose, model)
    assert op_types(after)[:2] == ["DequantizeLinear", "Conv"]
    same(model, after)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("(float[1,2,3,3] x, float[2,2,2,2] w) => (float[1,2,4,4] y) { y = ConvTranspose (x, w) }",
         "its weight 'w' is not a float32 constant"),
        ("(float[1,2,3,3,3] x, float[2,2,2,2,2] w) => (float[1,2,4,4,4] y)"
         " { y = ConvTranspose (x, w) }", "it convolves over 3 axes; expected 1 or 2"),
    ],
)  # fmt: skip
def test_transposed_ones_that_stay(body: str, reason: str) -> None:
    assert refusal(canonical_conv_transpose, graph(body)) == reason


@pytest.mark.parametrize(
    ("attributes", "length"),
    [
        ("group = 1", 7),
        ("pads = [2,1], dilations = [2]", 8),
        ("strides = [2], group = 2", 4),
        ('auto_pad = "SAME_UPPER"', 9),
    ],
)
def test_one_axis_becomes_two(attributes: str, length: int) -> None:
    shape = (6, 2, 3) if "group = 2" in attributes else (6, 4, 3)
    model = graph(
        f"(float[2,4,9] x) => (float[2,6,{length}] y) {{ y = Conv <{attributes}> (x, w, b) }}",
        **weights(w=shape, b=(6,)),
    )
    after, _ = apply(canonical_conv_1d, model)
    assert op_types(after) == ["Unsqueeze", "Conv", "Squeeze"]
    same(model, after)


def test_one_axis_keeps_its_integers() -> None:
    model = graph(
        "(float[2,4,9] x) => (float[2,6,7] y) { f = DequantizeLinear <axis = 0> (w, s)"
        " y = Conv (x, f) }",
        w=RANDOM.integers(-127, 128, (6, 4, 3)).astype(np.int8),
        s=np.full(6, 0.02, np.float32),
    )
    after, _ = apply(canonical_conv_1d, model)
    assert op_types(after) == ["DequantizeLinear", "Unsqueeze", "Conv", "Squeeze"]
    same(model, after)


def test_both_run_natively() -> None:
    """A small decoder, and a network over one axis, without a step on ONNX Runtime."""
    decoder = graph(
        "(float[1,3,8,8] x) => (float[n,c,h,v] y) { e = Conv (x, u) t = ConvTranspose"
        " <strides = [2,2], pads = [1,1,1,1]> (e, w) y = Sigmoid (t) }",
        **weights(u=(8, 3, 1, 1), w=(8, 4, 4, 4)),
    )
    line = graph(
        "(float[1,3,32] x) => (float[n,c,l] y) { e = Conv <pads = [1,1]> (x, u) r = Relu (e)"
        " y = Conv (r, w) }",
        **weights(u=(8, 3, 3), w=(5, 8, 1)),
    )
    for model, shape in ((decoder, (1, 3, 8, 8)), (line, (1, 3, 32))):
        inputs = {"x": RANDOM.normal(size=shape).astype(np.float32)}
        engine = build(model, tuning_effort=0)
        assert [kind for kind, _ in steps(engine)] == ["native"]
        got = run_twice(engine, inputs)
        for name, array in reference(fused(model), inputs).items():
            np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("2,3,4,5", ["Conv"]), ("2,3,4", ["Mul", "Add"]), ("2,3", ["Mul", "Add"])],
)
def test_a_normalization_alone_is_one_factor_a_channel(shape: str, expected: list[str]) -> None:
    model = graph(
        f"(float[{shape}] x) => (float[{shape}] y)"
        " { y = BatchNormalization <epsilon = 0.01> (x, g, b, m, v) }",
        **weights(g=(3,), b=(3,), m=(3,)),
        v=np.array([0.5, 1, 2], np.float32),
    )
    after, _ = apply(canonical_batchnorm, model)
    assert op_types(after) == expected
    same(model, after)


def test_a_normalization_of_computed_parameters_stays() -> None:
    model = graph(
        "(float[2,3] x, float[3] g) => (float[2,3] y) { y = BatchNormalization (x, g, b, m, v) }",
        **weights(b=(3,), m=(3,)),
        v=np.ones(3, np.float32),
    )
    assert "not float32 constants" in refusal(canonical_batchnorm, model)


def test_a_dense_block_runs_natively() -> None:
    """Normalization and Relu in front of each convolution: two kernels each, no copies."""
    model = graph(
        "(float[1,8,6,6] x) => (float[n,c,h,w] y) { n = BatchNormalization (x, g, b, m, v)"
        " r = Relu (n) c = Conv (r, u) t = BatchNormalization (c, h, i, j, k) s = Relu (t)"
        " d = Concat <axis = 1> (x, s) o = BatchNormalization (d, p, q, e, f) a = Relu (o)"
        " y = Conv <pads = [1,1,1,1]> (a, z) }",
        **weights(g=(8,), b=(8,), m=(8,), u=(16, 8, 1, 1), h=(16,), i=(16,), j=(16,)),
        **weights(p=(24,), q=(24,), e=(24,), z=(4, 24, 3, 3)),
        **{n: np.ones(c, np.float32) for n, c in {"v": 8, "k": 16, "f": 24}.items()},
    )
    inputs = {"x": RANDOM.normal(size=(1, 8, 6, 6)).astype(np.float32)}
    engine = build(model, tuning_effort=0)
    ((kind, found),) = steps(engine)
    assert kind == "native"
    assert found == ["ConvRelu", "ConvRelu", "Concat", "ConvRelu", "Conv"]
    got = run_twice(engine, inputs)
    for name, array in reference(model, inputs).items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4)

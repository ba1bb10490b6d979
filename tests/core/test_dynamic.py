"""Quantization at run time, defined: what bytes stand for, and ONNX Runtime's own operator."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.graphs import graph, run
from twofour.core.dynamic import LEAST, ROW_ZERO, quantize_rows, quantize_tensor

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)
EPS = float(np.finfo(np.float32).eps)


@given(arrays.arrays(np.float32, (3, 5), elements=FLOATS))
def test_rows_are_within_half_a_step(x):
    q = quantize_rows(x)
    highest = np.maximum(np.abs(x).max(-1, keepdims=True), LEAST)
    np.testing.assert_allclose(q.scale, highest / 127, rtol=EPS)
    whole = q.bytes.astype(int) - ROW_ZERO
    assert np.abs(whole).max() <= 127
    # 127 / highest and the product are rounded: of at most 127 steps, 2 * 127 * eps / 2.
    error = np.abs(whole * q.scale.astype(np.float64) - x)
    assert (error <= q.scale * (0.5 + 128 * EPS)).all()


def test_rows_do_not_see_each_other():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    alone = [quantize_rows(row) for row in x]
    together = quantize_rows(x)
    for index, one in enumerate(alone):
        np.testing.assert_array_equal(together.bytes[index], one.bytes)
    x[2] *= 1e6
    np.testing.assert_array_equal(quantize_rows(x).bytes[:2], together.bytes[:2])


def test_rows_of_zeros_and_of_what_is_no_number():
    q = quantize_rows(np.float32([[0, -0.0], [1, np.nan], [np.inf, -1]]))
    assert q.bytes[0].tolist() == [ROW_ZERO, ROW_ZERO]
    assert np.isfinite(q.scale[0, 0])
    assert np.isnan(q.scale[1, 0])
    assert np.isinf(q.scale[2, 0])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (-1, 1), (2, 3), (-3, -2), (-0.001, 7), (-1e30, 1e-30)]
)
def test_a_tensor_is_as_onnx_runtime_has_it(low, high):
    x = np.random.default_rng(1).uniform(low, high, (7, 33)).astype(np.float32)
    names = "uint8[7,33] q, float s, uint8 z"
    model = graph(f"(float[7,33] x) => ({names}) {{ q, s, z = DynamicQuantizeLinear (x) }}")
    assert isinstance(model, ir.Model)
    q, scale, zero = run(model, {"x": x})
    got = quantize_tensor(x)
    assert np.unique(got.scale).tolist() == [float(scale)]
    assert np.unique(got.zero_point).tolist() == [int(zero)]
    np.testing.assert_array_equal(got.bytes, q)

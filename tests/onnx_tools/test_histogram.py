"""What calibration remembers, and the range each method takes from it."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from twofour.core import numerics
from twofour.core.errors import InputError
from twofour.onnx_tools.histogram import HALF, Affine, Histogram, Range, affine, choose_range
from twofour.onnx_tools.options import QuantizeOptions

METHODS = ["minmax", "percentile", "mse", "entropy"]
ACTIVATIONS = ["int8", "uint8"]
FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)


def seen(*parts) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(np.asarray(part, np.float32))
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    scalars = ("zeros", "limit", "low", "high")
    return np.array_equal(a.counts, b.counts) and all(
        getattr(a, n) == getattr(b, n) for n in scalars
    )


@settings(deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 60), elements=FLOATS), st.data())
def test_neither_order_nor_batches_matter(x, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=5)))
    shuffled = np.array(data.draw(st.permutations(list(x))), np.float32)
    assert same(seen(x), seen(*np.split(shuffled, cuts)))


@settings(deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 60), elements=FLOATS))
def test_every_value_is_counted_in_its_bin(x):
    histogram = seen(x)
    assert histogram.counts.sum() + histogram.zeros == len(x)
    assert histogram.zeros == np.count_nonzero(x == 0)
    assert (histogram.low, histogram.high) == (x.min(), x.max())
    filled = {int(i): int(histogram.counts[i]) for i in np.flatnonzero(histogram.counts)}
    # Exact: the width of a bin is a power of two.
    width = histogram.limit / HALF
    assert filled == Counter(math.floor(float(value) / width) + HALF for value in x if value)


def test_memory_is_bounded():
    histogram = Histogram()
    rng = np.random.default_rng(0)
    for power in range(-30, 31):
        histogram.add(rng.standard_normal(1000).astype(np.float32) * np.float32(2.0**power))
    assert histogram.counts.nbytes == 2 * HALF * 8
    assert histogram.counts.sum() == 61_000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        seen([1, 2, bad, 3])


@settings(deadline=None)
@given(low=FLOATS, high=FLOATS, activation=st.sampled_from(ACTIVATIONS), data=st.data())
def test_inside_the_range_the_error_is_at_most_half_a_step(low, high, activation, data):
    span = Range(*sorted((low + 0.0, high + 0.0)))  # no -0.0, which sorts as equal to 0.0
    scheme = affine(span, activation)
    assert scheme.scale > 0
    ends = min(span.low, 0.0), max(span.high, 0.0)
    x = np.array(data.draw(st.lists(st.floats(*ends, width=32), min_size=1)), np.float32)
    q = numerics.quantize(x, scheme.scale, scheme.zero_point, scheme.dtype)
    back = numerics.dequantize(q, scheme.scale, scheme.zero_point).astype(np.float64)
    # Half a step; at the ends another half for a rounded zero point; and float32's own rounding
    # of x / scale and of q * scale, each below 2**-23 of 256 steps.
    halves = 1.0 if activation == "uint8" else 0.5
    assert np.abs(back - x).max() <= scheme.scale * (halves + 256 * 2.0**-22)


@settings(deadline=None)
@given(low=FLOATS, high=FLOATS, activation=st.sampled_from(ACTIVATIONS))
def test_zero_is_exact(low, high, activation):
    scheme = affine(Range(*sorted((low, high))), activation)
    q = numerics.quantize(np.zeros(1, np.float32), scheme.scale, scheme.zero_point, scheme.dtype)
    assert numerics.dequantize(q, scheme.scale, scheme.zero_point)[0] == 0


def test_known_schemes():
    assert affine(Range(-1.27, 0.5), "int8") == Affine(float(np.float32(0.01)), 0, np.dtype("i1"))
    assert affine(Range(0.1, 2.55), "uint8") == Affine(float(np.float32(0.01)), 0, np.dtype("u1"))
    assert affine(Range(-1.0, 1.55), "uint8").zero_point == 100
    assert affine(Range(-2.0, -1.0), "uint8").zero_point == 255
    assert affine(Range(0.0, 0.0), "int8").scale == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "x",
    [
        [0, 0],
        [0.5],
        [-3, -3],
        [2.0**-126],
        [2.0**99, -(2.0**99)],
        [0] * 9 + [7.0],
        np.linspace(-1, 2, 99),
    ],
    ids=["zeros", "one value", "negative", "tiny", "huge", "mostly zero", "uniform"],
)
def test_the_range_lies_in_what_was_seen(method, activation, x):
    span = choose_range(seen(x), QuantizeOptions(method=method, activation=activation))
    assert np.min(x) - 1e-6 <= span.low <= span.high or not np.any(x)
    assert span.high <= np.max(x)
    assert affine(span, activation).scale > 0


def test_minmax_takes_all():
    assert choose_range(seen([-3, 1, 2.5]), QuantizeOptions(method="minmax")) == Range(-3, 2.5)


def bell(outliers=0):
    rng = np.random.default_rng(0)
    return np.concatenate([rng.standard_normal(30_000), np.full(outliers, 60.0)])


def error(x, span, activation):
    scheme = affine(span, activation)
    x = x.astype(np.float32)
    q = numerics.quantize(x, scheme.scale, scheme.zero_point, scheme.dtype)
    return np.square(numerics.dequantize(q, scheme.scale, scheme.zero_point) - x).mean()


def test_percentile_is_that_of_numpy():
    x = bell()
    span = choose_range(seen(x), QuantizeOptions(method="percentile", percentile=99.9))
    width = 8 / HALF
    assert abs(span.high - np.percentile(np.abs(x), 99.9, method="inverted_cdf")) <= width


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("outliers", [0, 3])
def test_mse_finds_the_least_error(activation, relu, outliers):
    x = np.maximum(bell(outliers), 0) if relu else bell(outliers)
    options = QuantizeOptions(method="mse", activation=activation)
    found = error(x, choose_range(seen(x), options), activation)
    thresholds = np.abs(x).max() * np.geomspace(1 / 32, 1, 80)
    tried = [error(x, Range(max(x.min(), -t), min(x.max(), t)), activation) for t in thresholds]
    # It tries 81 thresholds, 4.4 % apart; near the least error that costs little.
    assert found <= 1.03 * min(tried)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_a_few_outliers_do_not_take_the_range(method, activation):
    span = choose_range(seen(bell(3)), QuantizeOptions(method=method, activation=activation))
    assert 2 < span.high < 30


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_an_even_distribution_is_hardly_cut(method):
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    assert choose_range(seen(x), QuantizeOptions(method=method)).high > 0.9


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "best"}, "method"),
        ({"activation": "int4"}, "activation"),
        ({"add_inputs": "none"}, "add_inputs"),
        ({"percentile": 50}, "percentile"),
        ({"percentile": 101}, "percentile"),
        ({"samples": 0}, "samples"),
        ({"threads": -1}, "threads"),
    ],
)
def test_options_that_mean_nothing(options, name):
    with pytest.raises(InputError, match=f"bad quantization option {name}"):
        QuantizeOptions(**options)

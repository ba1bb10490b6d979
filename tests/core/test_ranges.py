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
from twofour.core.histogram import HALF, Histogram
from twofour.core.ranges import Affine, Range, RangeOptions, affine, choose_range
from twofour.onnx_tools.options import QuantizeOptions

METHODS = ["minmax", "average", "percentile", "mse", "entropy"]
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


@settings(deadline=None)
@given(arrays.arrays(np.float32, st.integers(0, 60), elements=FLOATS))
def test_a_histogram_comes_back_from_its_text(x):
    histogram = seen(x)
    histogram.close_batch()
    again = Histogram.restored(histogram.summary, histogram.counts_text())
    assert same(histogram, again)
    assert histogram.average == again.average


def test_the_moving_average_of_batches():
    histogram = Histogram()
    assert histogram.averaged is None
    for part in ([1.0, -2.0], [11.0, 0.0], []):
        histogram.add(np.array(part, np.float32))
        before = histogram.averaged
        histogram.close_batch()
        assert histogram.average == before
    assert histogram.average == (-2 + 0.01 * 2, 1 + 0.01 * 10)
    assert choose_range(histogram, RangeOptions("average")) == Range(-2 + 0.02, 1 + 0.1)


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
    span = choose_range(seen(x), RangeOptions(method=method, activation=activation))
    assert np.min(x) - 1e-6 <= span.low <= span.high or not np.any(x)
    assert span.high <= np.max(x)
    assert affine(span, activation).scale > 0


def test_minmax_takes_all():
    assert choose_range(seen([-3, 1, 2.5]), RangeOptions(method="minmax")) == Range(-3, 2.5)


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
    span = choose_range(seen(x), RangeOptions(method="percentile", percentile=99.9))
    width = 8 / HALF
    assert abs(span.high - np.percentile(np.abs(x), 99.9, method="inverted_cdf")) <= width


def test_percentile_of_asymmetric_values_is_the_shortest_range():
    rng = np.random.default_rng(0)
    gelu = np.concatenate([rng.uniform(-0.17, 0, 20_000), rng.exponential(1, 10_000), [30.0] * 2])
    gelu = gelu.astype(np.float32)
    options = RangeOptions("percentile", "uint8", 99.9)
    span = choose_range(seen(gelu), options)
    assert span.low < -0.169  # where many values lie nothing is cut
    outside = np.count_nonzero((gelu < span.low) | (gelu > span.high))
    assert 25 <= outside <= 30
    tails = np.concatenate([rng.uniform(-0.1, 5, 30_000), [-4.0] * 20])
    assert choose_range(seen(tails), options).low > -0.2
    assert choose_range(seen(-gelu), options).high > 0.169


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_both_ends_of_an_asymmetric_range_are_cut(method):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-0.5, 6, 500_000), [-5.5], [6.5]])
    span = choose_range(seen(x), RangeOptions(method, "uint8"))
    assert -1.5 < span.low <= -0.4
    assert 5.5 < span.high


def slow_divergence(counts: np.ndarray, stop: int, levels: int, below: float = 0) -> float:
    """KL(P || Q) as a person would write it down."""
    p = [float(count) for count in counts[:stop]]
    steps: dict[int, list[int]] = {}
    for i in range(stop):
        if p[i]:
            steps.setdefault(i * levels // stop, []).append(i)
    q = [0.0] * stop
    for bins in steps.values():
        for i in bins:
            q[i] = sum(p[j] for j in bins) / len(bins)
    p[-1] += float(counts[stop:].sum())
    p[0] += below
    ratio = sum(q) / sum(p)
    return sum(
        a * math.log(a * ratio / (b or 1e-12)) for a, b in zip(p, q, strict=True) if a
    ) / sum(p)


@pytest.mark.parametrize(("activation", "levels"), [("int8", 128), ("uint8", 256)])
def test_entropy_is_the_least_divergence(activation, levels):
    x = np.abs(np.random.default_rng(2).standard_normal(3000)) ** 1.5
    histogram = seen(x)
    counts = histogram.magnitudes().reshape(4096, -1).sum(axis=1)
    counts[0] = counts[1]
    width = histogram.limit / 4096
    last = math.ceil(histogram.peak / width)
    stops = list(range(last, levels - 1, -16))
    costs = [slow_divergence(counts, stop, levels) for stop in stops]
    span = choose_range(histogram, RangeOptions("entropy", activation))
    assert span.high == min(width * stops[int(np.argmin(costs))], histogram.high)


def test_entropy_of_both_signs_is_less_than_that_of_a_grid():
    """256 steps from end to end; bins of either side of zero count as their neighbours do."""
    rng = np.random.default_rng(3)
    histogram = seen(np.concatenate([rng.standard_normal(9000), [30.0, -4.0]]))
    counts = histogram.counts.reshape(8192, -1).sum(axis=1)
    counts[4096], counts[4095] = counts[4097], counts[4094]
    width = histogram.limit / 4096

    def divergence(low: float, high: float) -> float:
        start, stop = 4096 - math.ceil(-low / width), 4096 + math.ceil(high / width)
        folded = counts[start:].copy()
        below = counts[:start].sum()
        # What lies below is added to the first bin of P, and is no part of Q.
        return slow_divergence(folded, stop - start, 256, float(below))

    found = choose_range(histogram, RangeOptions("entropy", "uint8"))
    ends = [(a * histogram.low, b * histogram.high) for a in (0.5, 1) for b in (0.1, 0.15, 0.5, 1)]
    assert divergence(found.low, found.high) <= min(divergence(*each) for each in ends)


def test_mse_of_both_signs_is_near_that_of_a_grid_of_ends():
    activation = "uint8"
    x = np.concatenate([bell(), np.full(3, 40.0), np.full(3, -7.0)])
    found = error(x, choose_range(seen(x), RangeOptions("mse", activation)), activation)
    lows, highs = (end * np.geomspace(1 / 16, 1, 20) for end in (x.min(), x.max()))
    tried = [error(x, Range(low, high), activation) for low in lows for high in highs]
    assert found <= 1.03 * min(tried)


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
    span = choose_range(seen(bell(3)), RangeOptions(method=method, activation=activation))
    assert 2 < span.high < 30


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_an_even_distribution_is_hardly_cut(method):
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    assert choose_range(seen(x), RangeOptions(method=method)).high > 0.9


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

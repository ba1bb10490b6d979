"""Rounding errors from histograms against rounding every value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from twofour.core.histogram import Histogram
from twofour.core.noise import coarse, levels, noise_of
from twofour.core.numerics import dequantize, quantize
from twofour.core.ranges import Affine, Range, affine

RNG = np.random.default_rng(0)


def histogram(x: NDArray[np.float32]) -> Histogram:
    found = Histogram()
    found.add(x)
    return found


def direct(x: NDArray[np.float32], scheme: Affine) -> tuple[float, float]:
    """SQNR in dB and share that saturates, of the values themselves."""
    q = quantize(x, scheme.scale, scheme.zero_point, scheme.dtype)
    error = x.astype(np.float64) - dequantize(q, scheme.scale, scheme.zero_point)
    ends = levels(scheme)
    beyond = (x > ends.high + scheme.scale / 2) | (x < ends.low - scheme.scale / 2)
    signal = float(np.square(x.astype(np.float64)).sum())
    return 10 * math.log10(signal / float(np.square(error).sum())), float(beyond.mean())


CASES = {
    "normal": RNG.standard_normal(200_000),
    "relu": np.maximum(RNG.standard_normal(200_000), 0),
    "laplace": RNG.laplace(size=200_000) * 1e-3,
    "outliers": np.where(RNG.random(200_000) < 1e-4, 500.0, 1.0) * RNG.standard_normal(200_000),
    "positive": RNG.random(200_000) * 3 + 5,
}


@pytest.mark.parametrize("kept", [1.0, 0.3, 0.03])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_that_of_rounding_each_value(name: str, kind: str, kept: float) -> None:
    x = CASES[name].astype(np.float32)
    scheme = affine(Range(float(x.min()) * kept, float(x.max()) * kept), kind)  # type: ignore[arg-type]
    found = noise_of(histogram(x), scheme)
    sqnr_db, clipped = direct(x, scheme)
    assert found.sqnr_db == pytest.approx(sqnr_db, abs=0.05)
    assert found.clipped == pytest.approx(clipped, abs=2e-4)
    assert found.count == x.size


def test_the_share_that_is_clipped_is_exact() -> None:
    """Where no value lies near the ends."""
    x = np.zeros(1000, np.float32)
    x[:700] = 0.5
    x[700:708] = 100.0
    x[708:711] = -30.0
    scheme = affine(Range(-1.0, 1.0), "int8")
    assert noise_of(histogram(x), scheme).clipped == 11 / 1000
    assert noise_of(histogram(x), affine(Range(-30.0, 100.0), "uint8")).clipped == 0
    assert noise_of(histogram(x), affine(Range(-30.0, 30.0), "int8")).clipped == 8 / 1000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-127, 127), min_size=1, max_size=40))
def test_values_on_levels_cost_little(steps: list[int]) -> None:
    """At most what a bin's width can hide."""
    scale = 1 / 128
    x = np.array(steps, np.float32) * np.float32(scale)
    found = noise_of(histogram(x), Affine(scale, 0, np.dtype(np.int8)))
    assert found.clipped == 0
    assert found.noise <= found.count * (2.0**-14) ** 2


def test_zeros_are_exact() -> None:
    found = noise_of(histogram(np.zeros(5, np.float32)), affine(Range(0.0, 0.0), "int8"))
    assert (found.count, found.noise, found.sqnr_db) == (5, 0.0, math.inf)


def test_a_coarse_histogram_keeps_every_value() -> None:
    x = CASES["relu"].astype(np.float32)
    span, counts = coarse(histogram(x), 128)
    assert counts.sum() == x.size
    expected, _ = np.histogram(x, 128, (span.low, span.high))
    assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 0.002 * x.size


@pytest.mark.parametrize("value", [0.0, -2.0, 3.0])
def test_a_constant(value: float) -> None:
    span, counts = coarse(histogram(np.full(7, value, np.float32)), 16)
    assert (span, counts.sum(), np.count_nonzero(counts)) == (Range(value, value), 7, 1)

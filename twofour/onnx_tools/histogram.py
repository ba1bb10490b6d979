"""What calibration remembers of a tensor, and how a range is chosen from it.

A histogram has a fixed number of bins over `-limit .. limit`, where `limit` is the smallest power
of two above the largest magnitude seen. When a larger value arrives, the limit doubles and adjacent
bins merge, which loses nothing that a histogram made at once would have had: so memory is bounded,
one pass is enough, and neither the order of the samples nor the batch size changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.onnx_tools.options import Activation, QuantizeOptions

HALF = 16384
"""Bins on each side of zero; with int64 counts a tensor takes 256 KiB."""

_SMALLEST_LIMIT = 2.0**-100
_CHUNK = 1 << 18
_ENTROPY_BINS = 4096

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Range:
    """The values, `low <= 0 <= high` or not, that should come through quantization unclipped."""

    low: float
    high: float


@dataclass(frozen=True)
class Affine:
    """x = (q - zero_point) * scale.

    Attributes:
        scale: > 0, a float32 number.
        zero_point: a value of `dtype`.
        dtype: int8 or uint8.
    """

    scale: float
    zero_point: int
    dtype: np.dtype[Any]


def affine(span: Range, activation: Activation) -> Affine:
    """The quantization whose ends are the range's, zero being exact.

    Args:
        span: the range; widened to hold zero.
        activation: `int8` gives scale = max(|low|, |high|) / 127 and zero point 0; `uint8` gives
            scale = (high - low) / 255 and the zero point that puts `low` at 0.
    """
    low, high = min(span.low, 0.0), max(span.high, 0.0)
    if activation == "int8":
        return Affine(_scale(max(-low, high) / 127), 0, np.dtype(np.int8))
    scale = _scale((high - low) / 255)
    return Affine(scale, int(np.clip(np.rint(-low / scale), 0, 255)), np.dtype(np.uint8))


def _scale(scale: float) -> float:
    """As float32 that can be divided by: 1 for a tensor of zeros, and never too small."""
    return float(np.float32(max(scale, 2.0**-120))) if scale > 0 else 1.0


class Histogram:
    """Counts of what one tensor held.

    Attributes:
        counts: int64 [2 * HALF]; bin i holds x with i = floor(x / limit * HALF) + HALF.
        zeros: values that are exactly zero; not in `counts`, since any quantization keeps them.
        limit: 0 as long as only zeros were seen.
        low: least value seen.
        high: largest value seen.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.counts: Counts = np.zeros(2 * HALF, np.int64)
        self.zeros = 0
        self.limit = 0.0
        self.low = math.inf
        self.high = -math.inf

    def add(self, x: NDArray[Any]) -> None:
        """Counts the values of x, float32 of any shape.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        peak = max(-low, high)
        if peak > 0:
            self._grow(max(2.0 ** math.frexp(peak)[1], _SMALLEST_LIMIT))
        for start in range(0, flat.size, _CHUNK):
            self._count(flat[start : start + _CHUNK])

    def magnitudes(self) -> Counts:
        """Counts of |x|, zeros left out: int64 [HALF], bin i about (i + 0.5) * limit / HALF."""
        return self.counts[HALF:] + self.counts[HALF - 1 :: -1]

    @property
    def empty(self) -> bool:
        """Whether nothing was seen, not even a zero."""
        return self.low > self.high

    @property
    def peak(self) -> float:
        """The largest magnitude seen."""
        return max(-self.low, self.high, 0.0)

    def _count(self, chunk: NDArray[np.float32]) -> None:
        nonzero = chunk[chunk != 0]
        self.zeros += chunk.size - nonzero.size
        if nonzero.size:
            # limit is a power of two: the float64 product is exact, and |product| < HALF.
            places = np.multiply(nonzero, HALF / self.limit, dtype=np.float64)
            bins = np.floor(places, out=places).astype(np.intp) + HALF
            self.counts += np.bincount(bins, minlength=2 * HALF)

    def _grow(self, limit: float) -> None:
        if 0 < self.limit < limit:
            doublings = int(math.log2(limit / self.limit))
            filled = np.flatnonzero(self.counts)
            merged = np.zeros_like(self.counts)
            # A right shift rounds down, as the bins of both sides of zero do.
            np.add.at(merged, ((filled - HALF) >> doublings) + HALF, self.counts[filled])
            self.counts = merged
        self.limit = max(self.limit, limit)


def choose_range(histogram: Histogram, options: QuantizeOptions) -> Range:
    """The range that the options' method takes from what was seen.

    Each method chooses the largest magnitude T to keep; the range is what was seen, cut at -T and
    T.

    Sources: `entropy`: S. Migacz, 8-bit Inference with TensorRT, GTC 2017. `mse`, `percentile`:
    Wu et al. 2020, arXiv:2004.09602, section 5.
    """
    if histogram.peak == 0:
        return Range(0.0, 0.0)
    threshold = min(_METHODS[options.method](histogram, options), histogram.peak)
    return Range(max(histogram.low, -threshold), min(histogram.high, threshold))


def _minmax(histogram: Histogram, options: QuantizeOptions) -> float:
    return histogram.peak


def _percentile(histogram: Histogram, options: QuantizeOptions) -> float:
    counts = histogram.magnitudes()
    seen = histogram.zeros + np.cumsum(counts)
    place = int(np.searchsorted(seen, seen[-1] * (options.percentile / 100)))
    return (place + 1) * histogram.limit / HALF


def _mse(histogram: Histogram, options: QuantizeOptions) -> float:
    """Tries thresholds from the peak down to 1/32 of it, where a bin is still below a step."""
    filled = np.flatnonzero(histogram.counts)
    x = (filled + 0.5 - HALF) * (histogram.limit / HALF)
    counts = histogram.counts[filled]
    best, best_error = histogram.peak, math.inf
    for step in range(5 * 16 + 1):
        threshold = histogram.peak * 2 ** (-step / 16)
        span = Range(max(histogram.low, -threshold), min(histogram.high, threshold))
        scheme = affine(span, options.activation)
        info, zero_point = np.iinfo(scheme.dtype), scheme.zero_point
        steps = np.clip(np.rint(x / scheme.scale), info.min - zero_point, info.max - zero_point)
        error = float(np.dot(counts, np.square(steps * scheme.scale - x)))
        if error < best_error:
            best, best_error = threshold, error
    return best


def _entropy(histogram: Histogram, options: QuantizeOptions) -> float:
    """Cuts where the histogram, told apart in `levels` steps only, says the most about itself."""
    coarse = HALF // _ENTROPY_BINS
    counts = histogram.magnitudes().reshape(-1, coarse).sum(axis=1).astype(np.float64)
    width = histogram.limit / _ENTROPY_BINS
    one_sided = options.activation == "uint8" and histogram.low >= 0
    levels = 256 if one_sided else 128
    end = int(np.flatnonzero(counts)[-1]) + 1
    stops = range(levels + (end - levels) % 16, end + 1, 16)
    if not stops:
        return histogram.peak
    return width * min(stops, key=lambda stop: (_divergence(counts, stop, levels), -stop))


def _divergence(counts: NDArray[np.float64], stop: int, levels: int) -> float:
    """KL(P || Q) for P: the counts below stop, the rest added to the last; Q: P's steps, spread."""
    kept = counts[:stop]
    step_of = np.arange(stop) * levels // stop
    filled = kept > 0
    totals = np.bincount(step_of, weights=kept, minlength=levels)
    places = np.bincount(step_of, weights=filled, minlength=levels)
    spread = np.where(filled, (totals / np.maximum(places, 1))[step_of], 0.0)
    p = kept.copy()
    p[-1] += counts[stop:].sum()
    if not spread.sum():
        return math.inf
    p, q = p / p.sum(), spread / spread.sum()
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))))


_METHODS: dict[str, Callable[[Histogram, QuantizeOptions], float]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}

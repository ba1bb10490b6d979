"""What rounding to bytes costs a tensor, computed from its histogram alone.

With levels 0 .. n, one step s apart from the lowest level L, and u = (x - L) / s, a value is off by
s * (u - m), where m is the nearest level. Its square has the integral

    G(u) = m / 12 + (u - m)^3 / 3        m = clip(round(u), 0, n)

(each whole step adds 1/12; beyond the last levels the error grows with u). So the mean square error
of values that lie evenly in a bin from a to b is s^2 (G(u_b) - G(u_a)) / (u_b - u_a): exact for the
bin, whether it is narrower than a step or holds many of them. Zeros are exact and add nothing.

Source of the measure (signal to quantization noise): Jain, "Digital coding of waveforms", 1984.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.histogram import HALF, Histogram
from twofour.core.ranges import Affine, Range

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """What rounding does to the values of a histogram.

    Attributes:
        count: of the values.
        signal: sum of their squares.
        noise: sum of the squares of what they are off.
        clipped: share of the values that lie more than half a step beyond the last levels, 0 to 1.
    """

    count: int
    signal: float
    noise: float
    clipped: float

    @property
    def sqnr_db(self) -> float:
        """Infinite where every value is exact."""
        return decibels(self.signal, self.noise)


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, minus infinite without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def levels(scheme: Affine) -> Range:
    """The least and the largest value that can be told."""
    info = np.iinfo(scheme.dtype)
    low, high = ((int(end) - scheme.zero_point) * scheme.scale for end in (info.min, info.max))
    return Range(low, high)


def noise_of(histogram: Histogram, scheme: Affine) -> Noise:
    """What a scheme costs the values of a histogram, taken to lie evenly within each bin.

    Args:
        histogram: not empty.
        scheme: scale, zero point and type.
    """
    left, right, counts = _bins(histogram)
    kept, step = levels(scheme), scheme.scale
    squares = (left * left + left * right + right * right) / 3
    errors = _mean_square((left - kept.low) / step, (right - kept.low) / step, scheme)
    beyond = _share(left, right, -math.inf, kept.low - step / 2)
    beyond += _share(left, right, kept.high + step / 2, math.inf)
    count = int(counts.sum()) + histogram.zeros
    return Noise(
        count,
        float(np.dot(counts, squares)),
        step * step * float(np.dot(counts, errors)),
        float(np.dot(counts, beyond)) / max(count, 1),
    )


def coarse(histogram: Histogram, most: int) -> tuple[Range, NDArray[np.int64]]:
    """Counts in `most` bins of equal width from the least to the largest value seen.

    Zeros are among them. A fine bin goes where its middle lies.
    """
    low, high = histogram.low, histogram.high
    left, right, counts = _bins(histogram)
    width = (high - low) or 1.0
    middles = np.append((left + right) / 2, 0.0)
    places = np.clip(((middles - low) / width * most).astype(np.int64), 0, most - 1)
    found = np.zeros(most, np.int64)
    if low <= 0 <= high:
        np.add.at(found, places, np.append(counts, histogram.zeros))
    else:
        np.add.at(found, places[:-1], counts)
    return Range(low, high), found


def _bins(histogram: Histogram) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Ends and counts of the bins that hold values, cut where no value can lie."""
    filled = np.flatnonzero(histogram.counts)
    width = histogram.limit / HALF
    left = (filled - HALF) * width
    ends = (np.clip(each, histogram.low, histogram.high) for each in (left, left + width))
    return *ends, histogram.counts[filled]


def _mean_square(left: Floats, right: Floats, scheme: Affine) -> Floats:
    """Mean of (u - m)^2 between both; at a point where they are equal."""
    info = np.iinfo(scheme.dtype)
    top = int(info.max) - int(info.min)
    wide = right > left
    width = np.where(wide, right - left, 1.0)
    point = (left - _nearest(left, top)) ** 2
    mean: Floats = np.where(wide, (_integral(right, top) - _integral(left, top)) / width, point)
    return np.maximum(mean, 0.0)


def _integral(u: Floats, top: int) -> Floats:
    m = _nearest(u, top)
    return m / 12 + (u - m) ** 3 / 3


def _nearest(u: Floats, top: int) -> Floats:
    found: Floats = np.clip(np.rint(u), 0, top)
    return found


def _share(left: Floats, right: Floats, low: float, high: float) -> Floats:
    """How much of each bin lies between both: 0 to 1."""
    wide = right > left
    inside = np.minimum(right, high) - np.maximum(left, low)
    width: Any = np.where(wide, right - left, 1.0)
    point = (left > low) & (left < high)
    found: Floats = np.where(wide, np.clip(inside / width, 0.0, 1.0), point.astype(np.float64))
    return found

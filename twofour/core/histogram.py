"""What calibration remembers of a tensor: counts of its values, in bounded memory.

A histogram has a fixed number of bins over `-limit .. limit`, where `limit` is the smallest power
of two above the largest magnitude seen. When a larger value arrives, the limit doubles and adjacent
bins merge, which loses nothing that a histogram made at once would have had: so memory is bounded,
one pass is enough, and neither the order of the samples nor the batch size changes the result.

Beside the counts stands the moving average of the least and of the largest value of a batch, which
does depend on order and batches: whoever adds says by `close_batch` where one ends.

`ranges.py` chooses a range from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF = 16384
"""Bins on each side of zero; with int64 counts a tensor takes 256 KiB."""

AVERAGING = 0.01
"""How far a batch moves the average: torch's MovingAverageMinMaxObserver has the same."""

SMALLEST_LIMIT = 2.0**-100
_CHUNK = 1 << 16  # floats that stay in a second-level cache with their bins

_MOST = 1 << 53
"""Of values in a restored histogram."""

_MOST_PEAK = float(np.finfo(np.float32).max)

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Summary:
    """What a histogram says in a few numbers; the names are those of `Histogram`."""

    low: float
    high: float
    limit: float
    zeros: int
    average_low: float
    average_high: float


class Histogram:
    """Counts of what one tensor held.

    Attributes:
        counts: int64 [2 * HALF]; bin i holds x with i = floor(x / limit * HALF) + HALF.
        zeros: values that are exactly zero; not in `counts`, since any quantization keeps them.
        limit: 0 as long as only zeros were seen.
        low: least value seen.
        high: largest value seen.
        average: moving averages of the least and the largest value of the batches closed so far;
            None before the first.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.counts: Counts = np.zeros(2 * HALF, np.int64)
        self.zeros = 0
        self.limit = 0.0
        self.low = math.inf
        self.high = -math.inf
        self.average: tuple[float, float] | None = None
        self._open = (math.inf, -math.inf)

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
        self._open = min(self._open[0], low), max(self._open[1], high)
        peak = max(-low, high)
        if peak == 0:
            self.zeros += flat.size
            return
        self._grow(_limit_of(peak))
        for start in range(0, flat.size, _CHUNK):
            self._count(flat[start : start + _CHUNK])

    def close_batch(self) -> None:
        """Ends a batch: what was added since the last one moves `average`.

        average += (this batch - average) * AVERAGING, for each end; the first batch is the first
        average, and a batch of no values moves nothing.
        """
        self.average, self._open = self.averaged, (math.inf, -math.inf)

    @property
    def averaged(self) -> tuple[float, float] | None:
        """`average` as it would be if the open batch ended here; None if nothing was seen."""
        if self._open[0] > self._open[1] or self.average is None:
            return self.average if self._open[0] > self._open[1] else self._open
        (low, high), (new_low, new_high) = self.average, self._open
        return low + (new_low - low) * AVERAGING, high + (new_high - high) * AVERAGING

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

    def counts_text(self) -> str:
        """The counts as runs of bins that are not empty: `FIRST:COUNT,COUNT,... FIRST:...`."""
        filled = np.flatnonzero(self.counts)
        runs = np.split(filled, np.flatnonzero(np.diff(filled) > 1) + 1)
        return " ".join(
            f"{run[0]}:{','.join(map(str, self.counts[run].tolist()))}" for run in runs if run.size
        )

    @classmethod
    def restored(cls, summary: Summary, counts_text: str) -> Histogram:
        """The histogram that these were taken from.

        Args:
            summary: of `summary`.
            counts_text: of `counts_text`.

        Raises:
            ValueError: there can be no such histogram; the message says why.
        """
        histogram = cls()
        histogram.counts = _counts_of(counts_text)
        filled = bool(histogram.counts.any())
        if summary.zeros < 0 or summary.zeros > _MOST:
            raise ValueError(f"zeros: expected 0 to {_MOST}, got {summary.zeros}")
        histogram.zeros, histogram.limit = summary.zeros, summary.limit
        if not (filled or histogram.zeros):
            if summary != histogram.summary:
                raise ValueError(f"expected nothing where nothing was counted, got {summary}")
            return histogram
        low, high = summary.low, summary.high
        peak = max(-low, high)
        if not (low <= summary.average_low <= summary.average_high <= high):
            raise ValueError(
                "expected low <= average_low <= average_high <= high, got "
                f"{low}, {summary.average_low}, {summary.average_high}, {high}"
            )
        if not (filled == (peak > 0) and peak <= _MOST_PEAK):
            raise ValueError(f"expected values that can be counted so, got {low} to {high}")
        if histogram.limit != _limit_of(peak):
            raise ValueError(
                f"limit: expected {_limit_of(peak)}, the power of two above {peak}, "
                f"got {histogram.limit}"
            )
        histogram.low, histogram.high = low, high
        histogram._require_ends()
        histogram.average = summary.average_low, summary.average_high
        return histogram

    @property
    def summary(self) -> Summary:
        """All but the counts, an open batch taken as closed; zeros if nothing was seen."""
        low, high = (0.0, 0.0) if self.empty else (self.low, self.high)
        return Summary(low, high, self.limit, self.zeros, *(self.averaged or (0.0, 0.0)))

    def _require_ends(self) -> None:
        """Refuses ends that are not those of the values counted. Raises ValueError."""
        if self.zeros and not self.low <= 0 <= self.high:
            raise ValueError(f"zeros: expected none from {self.low} to {self.high}")
        filled = np.flatnonzero(self.counts)
        if not filled.size:
            return
        for name, end, bin_ in (("low", self.low, filled[0]), ("high", self.high, filled[-1])):
            place = math.floor(end / self.limit * HALF) + HALF
            beside_zero = bin_ >= HALF if name == "low" else bin_ < HALF
            if not (beside_zero and self.zeros if end == 0 else bin_ == place):
                raise ValueError(f"{name}: expected a value of bin {bin_}, got {end}")

    def _count(self, chunk: NDArray[np.float32]) -> None:
        # limit is a power of two, so the product is exact: in float32 as long as it is not smaller
        # than x, in float64 always. And |product| < HALF, so floor(product) + HALF is exact, too.
        kind = np.float32 if self.limit <= HALF else np.float64
        places = np.multiply(chunk, kind(HALF / self.limit), dtype=kind)
        np.floor(places, out=places)
        np.add(places, kind(HALF), out=places)
        np.add.at(self.counts, places.astype(np.int32).astype(np.intp), 1)
        zeros = int(np.count_nonzero(chunk == 0))
        self.counts[HALF] -= zeros
        self.zeros += zeros

    def _grow(self, limit: float) -> None:
        if 0 < self.limit < limit:
            doublings = int(math.log2(limit / self.limit))
            filled = np.flatnonzero(self.counts)
            merged = np.zeros_like(self.counts)
            # A right shift rounds down, as the bins of both sides of zero do.
            np.add.at(merged, ((filled - HALF) >> doublings) + HALF, self.counts[filled])
            self.counts = merged
        self.limit = max(self.limit, limit)


def _limit_of(peak: float) -> float:
    """The smallest power of two above a magnitude; 0 for 0."""
    return max(2.0 ** math.frexp(peak)[1], SMALLEST_LIMIT) if peak else 0.0


def _counts_of(text: str) -> Counts:
    """The inverse of `Histogram.counts_text`."""
    counts: Counts = np.zeros(2 * HALF, np.int64)
    end = total = 0
    for run in text.split():
        first, _, numbers = run.partition(":")
        values = [int(number) for number in numbers.split(",")]
        if not end <= int(first) <= 2 * HALF - len(values):
            place = f"{len(values)} from {first[:20]}"
            raise ValueError(f"counts: expected bins {end} to {2 * HALF - 1}, got {place}")
        total += sum(values)
        if min(values) < 1 or total > _MOST:
            raise ValueError(f"counts: expected 1 to {_MOST} in all, got {run[:40]!r}")
        end = int(first) + len(values)
        counts[int(first) : end] = values
    return counts

"""The last minute and the last minutes of one version, from its counts as they were each second.

Memory is bounded: 61 vectors of counts and `POINTS` points a version.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.serve.models.tally import ROWS, SECONDS, Tally

MINUTE = 60
STEP = 2
"""Ticks of a second that a point of the plots covers."""
POINTS = 300
PHASES = ("total", "queue", "assembly", "compute", "output")
COLUMNS = ("requests_per_s", "errors_per_s", "p50_ms", "p90_ms", "p99_ms", "queue_length", "busy")
"""Of a point."""
_TIMES = len(SECONDS) + 1
_WIDTH = len(PHASES) * _TIMES + len(ROWS) + 2
"""Of a vector of counts: those of the phases, those of runs by their rows, and all rows."""
_BOUNDS_MS = [bound * 1e3 for bound in (0.0, *SECONDS, SECONDS[-1])]
Counts = NDArray[np.int64]
Point = tuple[float | None, ...]


@dataclass(slots=True)
class _Snapshot:
    """Counts at one time."""

    at_s: float
    counts: Counts
    failures: Counter[str]


class Window:
    """What one version did lately.

    Attributes:
        points: of the plots, one every `STEP` ticks, oldest first; see `COLUMNS`.
        last: number of the newest point.
    """

    def __init__(self, now_s: float) -> None:
        """Nothing has happened before now."""
        first = _Snapshot(now_s, np.zeros(_WIDTH, np.int64), Counter())
        self._ring: deque[_Snapshot] = deque([first], maxlen=MINUTE + 1)
        self._most_waiting = 0
        self.points: deque[Point] = deque(maxlen=POINTS)
        self.last = 0

    def add(self, tally: Tally, queue_length: int, now_s: float) -> None:
        """Takes the counts as they are now, once a second."""
        newest = self._ring[-1]
        counts = _vector(tally)
        if np.array_equal(counts, newest.counts):
            counts = newest.counts  # an idle version shares its vectors
        self._ring.append(_Snapshot(now_s, counts, Counter(tally.failures)))
        self._most_waiting = max(self._most_waiting, queue_length)

    def close_point(self, number: int, busy: int) -> None:
        """Ends a point of the plots.

        Args:
            number: of the point; all versions have the same at one time.
            busy: instances that compute now.
        """
        then = self._ring[-1 - min(STEP, len(self._ring) - 1)]
        now = self._ring[-1]
        seconds = max(now.at_s - then.at_s, 1e-9)
        total = _phase(now.counts - then.counts, 0)
        errors = now.failures.total() - then.failures.total()
        times = [quantile_ms(total, q) for q in (0.5, 0.9, 0.99)]
        rates = [_short(sum(total) / seconds), _short(errors / seconds)]
        self.points.append((*rates, *times, self._most_waiting, busy))
        self.last, self._most_waiting = number, 0

    def minute(self) -> dict[str, Any]:
        """What `/v2/status` says of the last minute, or of the time since the version is known."""
        then, now = self._ring[0], self._ring[-1]
        seconds = max(now.at_s - then.at_s, 1e-9)
        counts = now.counts - then.counts
        phases = {name: _phase(counts, index) for index, name in enumerate(PHASES)}
        failures = now.failures - then.failures
        *runs, rows = counts[len(PHASES) * _TIMES :].tolist()
        return {
            "requests_per_s": _short(sum(phases["total"]) / seconds),
            "errors_per_s": _short(failures.total() / seconds),
            "failures": dict(failures),
            "latency_ms": {
                name: {f"p{q}": quantile_ms(phases[name], q / 100) for q in (50, 90, 99)}
                for name in PHASES
            },
            "phases": phases,
            "batch_rows": runs,
            "mean_rows": _short(rows / sum(runs)) if sum(runs) else None,
        }

    def history(self, since: int) -> dict[str, Any]:
        """Points after number `since`, as columns; `first` is the number of the first of them."""
        count = min(max(self.last - since, 0), len(self.points))
        points = list(self.points)[len(self.points) - count :]
        columns = zip(*points, strict=True) if points else ([] for _ in COLUMNS)
        named = zip(COLUMNS, columns, strict=True)
        return {"first": self.last - count + 1} | {name: list(each) for name, each in named}


def quantile_ms(counts: Sequence[int], q: float) -> float | None:
    """The time below which a share of what a histogram counted lies.

    Args:
        counts: of each bound of `SECONDS`, and of all beyond.
        q: the share, 0 to 1.

    Returns:
        Milliseconds, evenly spread within a bucket, so at most a bucket's width off; the last
        bound for what is beyond it; None of no counts.
    """
    sums = list(itertools.accumulate(counts))
    if not sums[-1]:
        return None
    wanted = q * sums[-1]
    at = bisect.bisect_left(sums, wanted)
    low, high = _BOUNDS_MS[at], _BOUNDS_MS[at + 1]
    above = (sums[at] - wanted) / max(counts[at], 1)
    return _short(high - (high - low) * above)


def _vector(tally: Tally) -> Counts:
    parts: list[Sequence[int]] = [getattr(tally, name).counts for name in PHASES]
    parts += [tally.rows.counts, [round(tally.rows.total)]]
    return np.array([count for part in parts for count in part], np.int64)


def _phase(counts: Counts, index: int) -> list[int]:
    plain: list[int] = counts[index * _TIMES : (index + 1) * _TIMES].tolist()
    return plain


def _short(number: float) -> float:
    """Four digits."""
    return float(f"{number:.4g}")

"""Counts of versions that never go back, though a version is unloaded, or loaded again.

A version that is loaded again has a new `Tally`. Its predecessor may still be answering the last of
its requests, so it is added up as it is now until some time has passed, and then for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twofour.serve.models.tally import Histogram, Tally
from twofour.serve.readings import VersionReading

SHOWN_S = 300.0
"""How long a version is still shown that is gone: so a scraper sees its last counts."""
SETTLED_S = 600.0
"""After that no request of an unloaded version is on its way any more."""
MOST_KNOWN = 10_000
"""Versions whose counts are remembered; beyond that those gone longest are forgotten."""
HISTOGRAMS = ("queue", "assembly", "compute", "output", "total", "rows")


@dataclass(slots=True)
class Series:
    """One version since the server began.

    Attributes:
        model: name.
        version: number.
        reading: the latest; None: it is gone.
        seen_s: when it was last there.
        settled: sum of the tallies that do not change any more.
        leaving: tallies that may, each with the time at which it was replaced.
        current: the one that is loaded.
    """

    model: str
    version: str
    reading: VersionReading | None = None
    seen_s: float = 0.0
    settled: Tally = field(default_factory=Tally)
    leaving: list[tuple[float, Tally]] = field(default_factory=list)
    current: Tally | None = None

    def update(self, tally: Tally | None, now_s: float) -> None:
        """Takes over the tally that is loaded now."""
        if tally is not self.current:
            if self.current is not None:
                self.leaving.append((now_s, self.current))
            self.current = tally
        while self.leaving and now_s - self.leaving[0][0] > SETTLED_S:
            _add(self.settled, self.leaving.pop(0)[1])

    def tally(self) -> Tally:
        """All that the version has counted; to be read, not to be added to."""
        total = Tally()
        for part in (self.settled, *(tally for _, tally in self.leaving), self.current):
            if part is not None:
                _add(total, part)
        return total


class Totals:
    """The counts of all versions, each only growing."""

    def __init__(self) -> None:
        """Nothing was counted."""
        self._series: dict[tuple[str, str], Series] = {}

    def update(self, versions: Sequence[VersionReading], now_s: float) -> list[Series]:
        """Takes a reading.

        Args:
            versions: all that there are.
            now_s: of a clock that does not step.

        Returns:
            One for each version that is there, or was until a few minutes ago.
        """
        here = {(each.model, each.version): each for each in versions}
        for key, reading in here.items():
            series = self._series.pop(key, None) or Series(*key)
            series.reading, series.seen_s = reading, now_s
            series.update(reading.tally, now_s)
            self._series[key] = series
        for key, series in self._series.items():
            if key not in here:
                series.reading = None
                series.update(None, now_s)
        while len(self._series) > max(MOST_KNOWN, len(here)):
            del self._series[next(iter(self._series))]
        return [each for each in self._series.values() if now_s - each.seen_s < SHOWN_S]


def _add(into: Tally, more: Tally) -> None:
    for name in HISTOGRAMS:
        mine: Histogram = getattr(into, name)
        other: Histogram = getattr(more, name)
        mine.counts[:] = [a + b for a, b in zip(mine.counts, other.counts, strict=True)]
        mine.total += other.total
    into.failures.update(more.failures)
    into.failed_s += more.failed_s
    into.last_ms = max(into.last_ms, more.last_ms)

"""What happened to the requests of one model version: counts, sums and histograms.

The statistics of the protocol and the metrics of Prometheus read the same numbers. Adding to them
takes about a microsecond a request.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from twofour.serve.errors import ServeError
from twofour.serve.models.queue import Job

SECONDS = (
    *(m * 10.0**e for e in (-5, -4, -3, -2, -1) for m in (1, 1.5, 2, 3, 5, 7)),
    *(1.0, 2.0, 5.0, 10.0, 30.0),
)
"""Upper bounds of the histograms of times; Prometheus has no finer ones."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(slots=True)
class Histogram:
    """Counts below bounds.

    Attributes:
        bounds: upper ones, each inclusive, ascending.
        counts: of each bound, and of all beyond the last.
        total: sum of what was added.
    """

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        """No counts yet."""
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Of all values."""
        return sum(self.counts)


def _times() -> Histogram:
    return Histogram(SECONDS)


@dataclass(slots=True)
class Tally:
    """Of one version since it was loaded.

    Attributes:
        queue: seconds from the arrival of a request until its batch was taken.
        assembly: until its inputs were joined.
        compute: of the network.
        output: from there until the answer was handed to the protocol.
        total: from arrival to answer.
        rows: of a batch, once for each run.
        failures: by the name of the error.
        runs: rows of a run -> how many such runs there were, and their seconds.
        failed_s: sum of the times of requests that failed.
        last_ms: milliseconds since 1970, of the last answer.
    """

    queue: Histogram = field(default_factory=_times)
    assembly: Histogram = field(default_factory=_times)
    compute: Histogram = field(default_factory=_times)
    output: Histogram = field(default_factory=_times)
    total: Histogram = field(default_factory=_times)
    rows: Histogram = field(default_factory=lambda: Histogram(ROWS))
    runs: dict[int, tuple[int, float]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    failed_s: float = 0.0
    last_ms: int = 0

    def answered(self, job: Job, arrived_ns: int, ended_ns: int) -> None:
        """Counts a request that got its outputs."""
        self.queue.add((job.started_ns - arrived_ns) / 1e9)
        self.assembly.add((job.computing_ns - job.started_ns) / 1e9)
        self.compute.add((job.computed_ns - job.computing_ns) / 1e9)
        self.output.add((ended_ns - job.computed_ns) / 1e9)
        self.total.add((ended_ns - arrived_ns) / 1e9)
        self.last_ms = time.time_ns() // 1_000_000

    def ran(self, job: Job) -> None:
        """Counts a run by any one of its requests."""
        seconds = (job.computed_ns - job.computing_ns) / 1e9
        self.rows.add(job.batch_rows)
        times, total = self.runs.get(job.batch_rows, (0, 0.0))
        self.runs[job.batch_rows] = times + 1, total + seconds

    def failed(self, error: ServeError, arrived_ns: int, ended_ns: int) -> None:
        """Counts a request that got an error instead."""
        self.failures[type(error).__name__] += 1
        self.failed_s += (ended_ns - arrived_ns) / 1e9

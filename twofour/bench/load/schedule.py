"""When requests are due in an open loop: at random, evenly, or as they once came."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError

Times = NDArray[np.int64]

KINDS = ("poisson", "constant")


@dataclass(frozen=True)
class Arrivals:
    """A stream of requests that come whether or not earlier ones were answered.

    Attributes:
        rate: requests a second; of a trace its mean.
        kind: poisson: the gaps are exponential, as of many callers who know nothing of each other;
            constant: all gaps are alike; trace.
        seed: of the gaps.
        trace_ns: when the requests of a trace came, ascending, from 0.
    """

    rate: float
    kind: str = "poisson"
    seed: int = 0
    trace_ns: Times | None = None

    def between(self, begin_s: float, end_s: float) -> Times:
        """int64: when requests are due, in nanoseconds from `begin_s`, ascending.

        The same span has the same times each time.
        """
        begin_ns, end_ns = int(begin_s * 1e9), int(end_s * 1e9)
        if self.trace_ns is not None:
            first, last = np.searchsorted(self.trace_ns, (begin_ns, end_ns))
            return self.trace_ns[first:last] - begin_ns
        count = math.ceil(self.rate * (end_s - begin_s))
        if self.kind == "constant":
            times = np.arange(count) / self.rate
        else:
            random = np.random.default_rng([self.seed, begin_ns])
            enough = count + int(8 * math.sqrt(count)) + 16  # too few once in 1e14 spans
            times = np.cumsum(random.exponential(1 / self.rate, enough))
        due = (times * 1e9).astype(np.int64)
        return due[due < end_ns - begin_ns]


def read_trace(path: Path) -> Arrivals:
    """Arrivals of a file: a line each, its first column seconds; a first line of words is skipped.

    Raises:
        InputError: it cannot be read, or holds no ascending numbers.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the trace {path}", [str(e)], "check --trace") from e
    cells = [(number, line.split(",")[0].strip()) for number, line in enumerate(lines, 1)]
    seconds = []
    for number, cell in cells:
        try:
            seconds.append(float(cell))
        except ValueError:
            if number > 1 and cell:
                raise _bad_trace(path, f"line {number} has {cell!r}") from None
    times = np.array(seconds, np.float64)
    if len(times) < 2 or not np.isfinite(times).all() or times[0] == times[-1]:
        raise _bad_trace(path, f"got {len(times)} times")
    if (np.diff(times) < 0).any():
        raise _bad_trace(path, "a time is smaller than the one before")
    times -= times[0]
    return Arrivals(len(times) / float(times[-1]), "trace", 0, (times * 1e9).astype(np.int64))


def _bad_trace(path: Path, got: str) -> InputError:
    return InputError(
        f"{path} is no trace",
        ["expected seconds at which requests came, ascending, one in each line", got],
        "write one with numpy.savetxt",
    )

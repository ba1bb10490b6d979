"""Timing: several contestants in one process, taking turns, so that all see the same machine.

Clock, cache and neighbours change within seconds. So each round gives every contestant one short
slice, in turn, and what is compared are medians over all rounds. Before a slice its contestant is
left alone for a moment (threads of the one before go to sleep) and then called untimed until it is
warm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError

Array = NDArray[Any]
Feeds = Mapping[str, Array]

MIN_ROUNDS = 20


@dataclass(frozen=True)
class Contestant:
    """Something that runs one network on one prepared input.

    Attributes:
        name: as the table shows it.
        version: of what runs it.
        setting: how it was set up, in words.
        call: one inference of the prepared input; what is timed.
        outputs: output name -> array of that inference; runs it if need be.
    """

    name: str
    version: str
    setting: str
    call: Callable[[], object]
    outputs: Callable[[], dict[str, Array]]


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Attributes:
        duration_s: timed seconds in total, shared by all contestants; more where a call is slow.
        slice_s: timed seconds of one turn; at least one call.
        pause_s: idle before a turn.
        warm_s: untimed calls before a turn; at least one call.
        min_rounds: turns of each contestant at least, however long they take.
    """

    duration_s: float = 5.0
    slice_s: float = 0.03
    pause_s: float = 0.004
    warm_s: float = 0.003
    min_rounds: int = MIN_ROUNDS

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        if not 0 < self.duration_s < 1e5:
            raise InputError(
                f"cannot measure for {self.duration_s} seconds",
                ["expected a duration above 0"],
                "give --duration a few seconds",
            )

    def rounds(self, contestants: int) -> int:
        """Turns of each contestant."""
        return max(self.min_rounds, round(self.duration_s / (self.slice_s * contestants)))


@dataclass(frozen=True)
class Timing:
    """Times of single calls in microseconds.

    Attributes:
        median_us: over all calls.
        p90_us: over all calls.
        min_us: over all calls.
        spread_us: distance between the quartiles of the rounds' medians: what noise the median has.
        calls: how many were timed.
        round_medians_us: one for each round, in order.
    """

    median_us: float
    p90_us: float
    min_us: float
    spread_us: float
    calls: int
    round_medians_us: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one contestant is as another, from turns that lay side by side.

    Attributes:
        median: over the rounds; above 1 means faster.
        low: first quartile of the rounds.
        high: third quartile of the rounds.
    """

    median: float
    low: float
    high: float


def race(
    contestants: Sequence[Contestant],
    schedule: Schedule | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Timing]:
    """Times all contestants, taking turns.

    Args:
        contestants: in the order of their turns.
        schedule: default `Schedule()`.
        progress: called with (rounds done, rounds) after each round.

    Returns:
        A timing for each contestant.
    """
    schedule = schedule or Schedule()
    rounds = schedule.rounds(len(contestants))
    times: list[list[list[int]]] = [[] for _ in contestants]
    for done in range(rounds):
        for contestant, taken in zip(contestants, times, strict=True):
            time.sleep(schedule.pause_s)
            _turn(contestant.call, schedule.warm_s)
            taken.append(_turn(contestant.call, schedule.slice_s))
        if progress is not None:
            progress(done + 1, rounds)
    return [summarize(taken) for taken in times]


def summarize(rounds_ns: Sequence[Sequence[int]]) -> Timing:
    """The statistics of one contestant.

    Args:
        rounds_ns: for each round the nanoseconds of its calls, at least one.
    """
    medians = np.array([np.median(taken) for taken in rounds_ns]) / 1e3
    calls = np.concatenate([np.asarray(taken, np.float64) for taken in rounds_ns]) / 1e3
    low, high = np.quantile(medians, [0.25, 0.75])
    return Timing(
        float(np.median(calls)),
        float(np.quantile(calls, 0.9)),
        float(calls.min()),
        float(high - low),
        len(calls),
        tuple(float(median) for median in medians),
    )


def ratio(ours: Timing, theirs: Timing) -> Ratio:
    """Their time over ours, round by round; both from the same race."""
    each = np.array(theirs.round_medians_us) / np.array(ours.round_medians_us)
    low, median, high = (float(q) for q in np.quantile(each, [0.25, 0.5, 0.75]))
    return Ratio(median, low, high)


def _turn(call: Callable[[], object], seconds: float) -> list[int]:
    """Nanoseconds of single calls until the time is over; at least one."""
    clock = time.perf_counter_ns
    times = []
    end = clock() + int(seconds * 1e9)
    now = clock()
    while True:
        call()
        after = clock()
        times.append(after - now)
        if after >= end:
            return times
        now = after

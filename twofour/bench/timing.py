"""Timing: several contestants in one process, taking turns, so that all see the same machine.

Clock, cache and neighbours change within seconds. So each round gives every contestant one short
slice, in turn, and what is compared are medians over all rounds. Before a slice its contestant is
left alone for a moment (threads of the one before go to sleep) and then called untimed until it is
warm. Several callers of one contestant begin a slice together, each in a thread of its own, and
each calls again as soon as it has its answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Call = Callable[[], object]

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
        more_calls: what further callers call at the same time.
        share: length of its turns in slices.
    """

    name: str
    version: str
    setting: str
    call: Call
    outputs: Callable[[], dict[str, Array]]
    more_calls: tuple[Call, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Attributes:
        duration_s: timed seconds in total, shared by all contestants; more where `min_rounds` of
            them take longer.
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

    def rounds(self, round_s: float) -> int:
        """Turns of each contestant, where those of one round are timed for so many seconds."""
        return max(self.min_rounds, round(self.duration_s / round_s))


@dataclass(frozen=True)
class Turn:
    """One turn of one contestant.

    Attributes:
        times_ns: of single calls, those of all callers; at least one.
        wall_ns: from the first call's begin to the last one's end.
        cpu_ns: that all threads of this process computed in that time.
    """

    times_ns: Sequence[int]
    wall_ns: int
    cpu_ns: int


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
        p99_us: over all calls.
        cpu_us: that one call computes, its threads together: median of the rounds.
        per_second: calls that all callers together get answered: median of the rounds.
    """

    median_us: float
    p90_us: float
    min_us: float
    spread_us: float
    calls: int
    round_medians_us: tuple[float, ...]
    p99_us: float
    cpu_us: float
    per_second: float


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
    turns: list[list[Turn]] = [[] for _ in contestants]
    done, rounds, timed_ns = 0, schedule.min_rounds, 0
    while done < rounds:
        for contestant, taken in zip(contestants, turns, strict=True):
            time.sleep(schedule.pause_s)
            taken.append(_turn(contestant, schedule))
            timed_ns += taken[-1].wall_ns
        done += 1
        rounds = schedule.rounds(timed_ns / 1e9 / done)  # a call may be longer than a slice
        if progress is not None:
            progress(done, max(done, rounds))
    return [summarize(taken) for taken in turns]


def summarize(turns: Sequence[Turn]) -> Timing:
    """The statistics of one contestant's turns, at least one."""
    medians = np.array([np.median(turn.times_ns) for turn in turns]) / 1e3
    calls = np.concatenate([np.asarray(turn.times_ns, np.float64) for turn in turns]) / 1e3
    low, high = np.quantile(medians, [0.25, 0.75])
    p90, p99 = np.quantile(calls, [0.9, 0.99])
    return Timing(
        float(np.median(calls)),
        float(p90),
        float(calls.min()),
        float(high - low),
        len(calls),
        tuple(float(median) for median in medians),
        float(p99),
        float(np.median([turn.cpu_ns / len(turn.times_ns) / 1e3 for turn in turns])),
        float(np.median([1e9 * len(turn.times_ns) / turn.wall_ns for turn in turns])),
    )


def ratio(ours: Timing, theirs: Timing) -> Ratio:
    """Their time over ours, round by round; both from the same race."""
    each = np.array(theirs.round_medians_us) / np.array(ours.round_medians_us)
    low, median, high = (float(q) for q in np.quantile(each, [0.25, 0.5, 0.75]))
    return Ratio(median, low, high)


def _turn(contestant: Contestant, schedule: Schedule) -> Turn:
    """Warms up, then times calls until the slice is over."""
    seconds = schedule.slice_s * contestant.share
    if contestant.more_calls:
        calls = (contestant.call, *contestant.more_calls)
        return _together(calls, schedule.warm_s, seconds)
    _timed(contestant.call, schedule.warm_s)
    cpu_ns, wall_ns = time.process_time_ns(), time.perf_counter_ns()
    times = _timed(contestant.call, seconds)
    return Turn(times, time.perf_counter_ns() - wall_ns, time.process_time_ns() - cpu_ns)


def _together(calls: Sequence[Call], warm_s: float, seconds: float) -> Turn:
    """Each call in a thread; all are warm before the first is timed."""
    marks: list[tuple[int, int]] = []
    barrier = Barrier(
        len(calls), lambda: marks.append((time.perf_counter_ns(), time.process_time_ns()))
    )

    def caller(call: Call) -> list[int]:
        try:
            _timed(call, warm_s)
            barrier.wait()
            times = _timed(call, seconds)
            barrier.wait()
        except BrokenBarrierError:
            return []  # another one failed, and says why
        finally:
            if len(marks) < 2:
                barrier.abort()
        return times

    with ThreadPoolExecutor(len(calls)) as pool:
        times = [each for taken in pool.map(caller, calls) for each in taken]
    (wall_ns, cpu_ns), (wall_end_ns, cpu_end_ns) = marks
    return Turn(times, wall_end_ns - wall_ns, cpu_end_ns - cpu_ns)


def _timed(call: Call, seconds: float) -> list[int]:
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

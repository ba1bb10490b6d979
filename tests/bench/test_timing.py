"""Timing: turns are taken in order, statistics are right, the slower one is found slower."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest

from twofour.bench import timing
from twofour.bench.timing import Contestant, Schedule, Timing, Turn
from twofour.core.errors import InputError

QUICK = Schedule(duration_s=0.01, slice_s=0.001, pause_s=0.0, warm_s=0.0)


def contestant(name: str, call: Callable[[], object]) -> Contestant:
    return Contestant(name, "1", "", call, dict)


def test_summary_of_known_times() -> None:
    turns = [
        Turn([1000, 3000], 4000, 8000),
        Turn([5000], 10000, 5000),
        Turn([9000, 9000, 9000], 10000, 9000),
    ]
    summary = timing.summarize(turns)
    assert summary.round_medians_us == (2.0, 5.0, 9.0)
    assert summary.median_us == 7.0
    assert summary.min_us == 1.0
    assert summary.p90_us == 9.0
    assert summary.spread_us == pytest.approx(7.0 - 3.5)
    assert summary.calls == 6
    assert 9.0 * 0.99 <= summary.p99_us <= 9.0
    assert summary.cpu_us == 4.0
    assert summary.per_second == pytest.approx(3e5)  # of 5e5, 1e5 and 3e5


def test_ratio_compares_round_by_round() -> None:
    # Both double their time when the machine slows down: the ratio does not move.
    ours = Timing(0, 0, 0, 0, 0, (1.0, 2.0, 1.0, 2.0), 0, 0, 0)
    theirs = Timing(0, 0, 0, 0, 0, (3.0, 6.0, 3.0, 6.0), 0, 0, 0)
    found = timing.ratio(ours, theirs)
    assert (found.low, found.median, found.high) == (3.0, 3.0, 3.0)


def test_turns_alternate_and_every_round_counts() -> None:
    calls: list[str] = []

    def caller(name: str) -> Callable[[], object]:
        return lambda: (calls.append(name), time.sleep(0.002))

    seen: list[tuple[int, int]] = []
    schedule = Schedule(duration_s=1e-6, slice_s=1e-6, pause_s=0.0, warm_s=0.0)
    names = ["a", "b", "c"]
    found = timing.race(
        [contestant(name, caller(name)) for name in names],
        schedule,
        lambda done, total: seen.append((done, total)),
    )
    # One warm and one timed call a turn.
    assert calls == [n for _ in range(timing.MIN_ROUNDS) for n in "aabbcc"]
    assert seen == [(i + 1, timing.MIN_ROUNDS) for i in range(timing.MIN_ROUNDS)]
    assert [t.calls for t in found] == [timing.MIN_ROUNDS] * 3
    assert [len(t.round_medians_us) for t in found] == [timing.MIN_ROUNDS] * 3


def test_a_slower_contestant_is_found_slower() -> None:
    def spin(seconds: float) -> Callable[[], object]:
        def call() -> None:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return call

    fast, slow = timing.race(
        [contestant("fast", spin(1e-4)), contestant("slow", spin(3e-4))], QUICK
    )
    assert 100 <= fast.median_us < slow.median_us
    assert timing.ratio(fast, slow).median > 2.0
    assert fast.min_us <= fast.median_us <= fast.p90_us


def test_longer_measurements_have_more_rounds() -> None:
    assert Schedule(duration_s=6.0).rounds(0.06) == 100
    assert Schedule(duration_s=0.1).rounds(0.06) == timing.MIN_ROUNDS


def test_slow_calls_have_fewer_rounds_not_a_longer_race() -> None:
    """Each call takes as long as fifty slices."""
    told: list[tuple[int, int]] = []
    schedule = Schedule(duration_s=0.2, slice_s=0.001, pause_s=0.0, warm_s=0.0, min_rounds=2)
    slow = contestant("slow", lambda: time.sleep(0.05))
    (found,) = timing.race([slow], schedule, lambda done, total: told.append((done, total)))
    assert 2 <= len(found.round_medians_us) <= 4
    assert told[-1][0] == told[-1][1] == len(found.round_medians_us)


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan"), float("inf")])
def test_a_duration_that_is_none(duration: float) -> None:
    with pytest.raises(InputError, match="cannot measure"):
        Schedule(duration_s=duration)


def test_several_callers_call_at_once() -> None:
    """Four that sleep get four times the answers of one; the CPU time of sleep is next to none."""
    sleep = lambda: time.sleep(0.002)  # noqa: E731
    alone = contestant("alone", sleep)
    four = dataclasses.replace(alone, more_calls=(sleep,) * 3)
    schedule = Schedule(duration_s=0.2, slice_s=0.02, pause_s=0.0, min_rounds=5)
    one, many = timing.race([alone, four], schedule)
    assert 2.5 < many.per_second / one.per_second < 5
    assert many.calls > 2.5 * one.calls
    assert many.cpu_us < 0.5 * many.median_us


def test_what_a_caller_raises_is_raised() -> None:
    """And the others do not wait for it."""

    def broken() -> None:
        raise ZeroDivisionError

    both = dataclasses.replace(contestant("both", lambda: None), more_calls=(broken,))
    with pytest.raises(ZeroDivisionError):
        timing.race([both], QUICK)


def test_a_share_shortens_turns() -> None:
    full = contestant("full", lambda: time.sleep(0.0005))
    tenth = dataclasses.replace(full, share=0.1)
    schedule = Schedule(duration_s=0.1, slice_s=0.02, pause_s=0.0, min_rounds=1)
    assert schedule.rounds(0.022) == 5
    long, short = timing.race([full, tenth], schedule)
    assert short.calls < 0.4 * long.calls

"""The interval of a speed-up holds the truth as often as it says: planted times."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.bench.regression import Duel, median_time, speedup

RUNS, MOST_WRONG = 100, 13  # as in tests/evaluate/test_drop.py


def duel(random: np.random.Generator, truth: float, rounds: int = 60, place: float = 0.0) -> Duel:
    """A race on a made-up machine.

    Args:
        random: of its noise.
        truth: how many times as fast the candidate is.
        rounds: of the race.
        place: by how much it matters where sessions lie in memory.
    """
    shared = np.exp(np.cumsum(random.normal(0, 0.003, rounds)))  # the clock walks
    busy = random.random(rounds) < 0.2
    shared[busy] *= random.uniform(1.1, 1.5, busy.sum())
    times = [
        base * shared * np.exp(random.normal(0, 0.01, rounds)) * np.exp(random.normal(0, place))
        for base in (100.0, 100.0 / truth)
    ]
    return Duel(*(list(each) for each in times))


@pytest.mark.parametrize(("duels", "place"), [(1, 0.0), (3, 0.0), (3, 0.02), (2, 0.02), (6, 0.01)])
def test_it_is_wrong_as_seldom_as_it_says(duels: int, place: float) -> None:
    random = np.random.default_rng(3)
    found = [
        speedup([duel(random, 1.3, place=place) for _ in range(duels)], 0.95) for _ in range(RUNS)
    ]
    assert sum(each.low > 1.3 for each in found) <= MOST_WRONG
    assert sum(each.high < 1.3 for each in found) <= MOST_WRONG
    assert np.median([each.value for each in found]) == pytest.approx(1.3, rel=0.01)


def test_what_sessions_differ_by_counts() -> None:
    """Each race by itself is sure of its own figure; three of them are not."""
    times = [Duel([100.0, 100.1] * 20, [1e2 / s, 1.001e2 / s] * 20) for s in (1.0, 1.02, 1.1)]
    for each in times:
        alone = speedup([each])
        assert alone.high - alone.low < 0.01
    found = speedup(times)
    assert found.low < 1.0 < 1.04 < found.high


def test_more_duels_tell_more() -> None:
    random = np.random.default_rng(0)
    widths = []
    for count in (2, 4, 40):
        found = speedup([duel(random, 1.3, place=0.02) for _ in range(count)])
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)


def test_a_contestant_against_itself() -> None:
    times = [100.0, 101.0, 99.5] * 10
    found = speedup([Duel(times, times)])
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [([1.0], []), ([], []), ([1.0, 2.0], [1.0]), ([1.0], [0.0]), ([1.0], [float("nan")])],
)
def test_what_is_no_duel(baseline: list[float], candidate: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Duel(baseline, candidate)


def test_no_duel_at_all() -> None:
    with pytest.raises(ValueError, match="at least one"):
        speedup([])


def test_the_median_of_a_race_lies_within_its_ends() -> None:
    random = np.random.default_rng(0)
    missed = 0
    for seed in range(60):
        races = [100 + 5 * random.standard_normal(60) for _ in range(3)]
        found = median_time([list(map(float, race)) for race in races], 0.95, seed)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
        missed += not found.low <= 100 <= found.high
    assert missed <= 15  # two ends of 5 % each: 6 are expected


def test_equal_rounds_have_no_width() -> None:
    found = median_time([[7.0] * 30, [7.0] * 30], 0.95)
    assert (found.low, found.value, found.high) == (7.0, 7.0, 7.0)

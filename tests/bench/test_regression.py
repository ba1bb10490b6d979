"""A slowdown of 5 % is found, and noise is not one: planted times of known machines."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.bench.regression import Rounds, Slowdown, slowdown

ALLOWED = 0.03
ROUNDS = 160  # five seconds
SEEDS = range(20)


def measured(seed: int, factor: float = 1.0, busy: float = 0.0, drift: float = 0.0) -> Rounds:
    """A run on a made-up machine.

    Args:
        seed: of its noise.
        factor: how many times as long the network takes.
        busy: share of the time in which a neighbour slows down rounds, in bursts of about ten.
        drift: standard deviation of the clock's walk from round to round, and ten times that from
            run to run; it moves network and gauge alike.
    """
    random = np.random.default_rng(seed)
    times = 100.0 * factor * np.exp(random.normal(0, 0.008, ROUNDS))
    gauge = 50.0 * np.exp(random.normal(0, 0.003, ROUNDS))
    disturbed = False
    for i in range(ROUNDS):
        if random.random() < (0.1 if disturbed else 0.1 * busy / max(1 - busy, 0.1)):
            disturbed = not disturbed
        if disturbed:
            more = random.uniform(0.1, 0.5)
            times[i] *= 1 + more
            gauge[i] *= 1 + more * random.uniform(0, 0.5)
    clock = np.exp(np.cumsum(random.normal(0, drift, ROUNDS)) + random.normal(0, 10 * drift))
    return Rounds(list(times * clock), list(gauge * clock))


# Name -> how the machine is before, and how it is now.
MACHINES = {
    "quiet": ({}, {}),
    "busy": ({"busy": 0.3}, {"busy": 0.3}),
    "busy only now": ({}, {"busy": 0.6}),
    "another clock": ({"drift": 0.004}, {"drift": 0.004}),
    "all of it": ({"busy": 0.3, "drift": 0.004}, {"busy": 0.3, "drift": 0.004}),
}


@pytest.mark.parametrize("name", MACHINES)
def test_five_percent_are_found_and_noise_is_none(name: str) -> None:
    before, now = MACHINES[name]
    found = {
        factor: [
            slowdown(measured(2 * seed, **before), measured(2 * seed + 1, factor, **now))
            for seed in SEEDS
        ]
        for factor in (1.0, 1.05)
    }
    verdicts = {
        factor: [each.verdict(ALLOWED) for each in several] for factor, several in found.items()
    }
    assert verdicts[1.0].count("regression") == 0
    assert verdicts[1.05].count("regression") >= 0.9 * len(SEEDS)
    assert np.median([each.ratio for each in found[1.05]]) == pytest.approx(1.05, abs=0.01)


def test_without_the_gauge_a_slower_clock_is_a_slower_network() -> None:
    """So it is the gauge that tells them apart."""
    before, now = measured(0), measured(1)
    slower = Rounds([1.08 * t for t in now.times_us], [1.08 * t for t in now.gauge_us])
    found = slowdown(before, slower)
    assert found.verdict(ALLOWED) == "no regression"
    assert found.gauge == pytest.approx(1.08, abs=0.01)
    blind = slowdown(before, Rounds(slower.times_us))
    assert blind.verdict(ALLOWED) == "regression"
    assert blind.gauge == 1.0


def test_a_run_against_itself() -> None:
    run = measured(0)
    found = slowdown(run, run)
    assert found.ratio == 1.0
    assert found.low < 1 < found.high


def test_faster_is_no_regression() -> None:
    assert slowdown(measured(0), measured(1, 0.7)).verdict(ALLOWED) == "no regression"


def test_few_noisy_rounds_decide_nothing() -> None:
    random = np.random.default_rng(0)
    times = list(random.lognormal(4, 0.2, 6))
    assert slowdown(Rounds(times), Rounds(times[::-1])).verdict(ALLOWED) == "undecided"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.031, 1.2, "regression"),
        (1.03, 1.2, "undecided"),
        (0.9, 1.031, "undecided"),
        (0.9, 1.03, "no regression"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert Slowdown(1.02, low, high, 1.0).verdict(ALLOWED) == verdict

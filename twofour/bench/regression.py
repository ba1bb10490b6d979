"""Has it become slower? Two runs of a benchmark, told apart from their noise.

    slowdown = (time now / gauge now) / (time before / gauge before)

What disturbs a call only adds to its time, so a run's time is the first decile of its rounds'
medians; a clock that changed between the runs, or a busy neighbour, shows in the gauge and cancels.
How sure that is comes from a bootstrap over blocks of rounds that lie side by side, because rounds
in one second are disturbed alike (Kuensch 1989, The jackknife and the bootstrap for general
stationary observations). A regression is one whose whole interval lies above what is allowed.

Of contestants that took turns in one race the rounds that lay side by side are drawn together, so
that what disturbed both cancels: `speedup`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.interval import Interval, student_quantile

Floats = NDArray[np.float64]

CONFIDENCE = 0.99
"""That a slowdown lies above the low end of its interval; below the high end, as much."""
RUNS = 3
"""In so many a regression has to show: sessions opened anew lie elsewhere in memory."""
_QUANTILE, _BLOCK, _SAMPLES = 0.1, 8, 2000


@dataclass(frozen=True)
class Rounds:
    """One run.

    Attributes:
        times_us: a median for each round, in order.
        gauge_us: of the gauge in the same rounds; as many, or none if it has no gauge.
    """

    times_us: Sequence[float]
    gauge_us: Sequence[float] = ()


@dataclass(frozen=True)
class Slowdown:
    """How many times as long it takes now.

    Attributes:
        ratio: above 1 means slower.
        low: with `CONFIDENCE` it is not less.
        high: with `CONFIDENCE` it is not more.
        gauge: the gauge's own ratio, which `ratio` is free of; 1 without one.
    """

    ratio: float
    low: float
    high: float
    gauge: float

    def verdict(self, allowed: float) -> str:
        """Whether a slowdown above `allowed` (0.03: 3 %) is certain.

        Returns:
            "regression", "no regression", or "undecided": the interval reaches to both sides.
        """
        if self.low > 1 + allowed:
            return "regression"
        return "no regression" if self.high <= 1 + allowed else "undecided"


@dataclass(frozen=True)
class Judgement:
    """What came of the comparison.

    Attributes:
        slowdown: of the last run.
        verdict: its verdict.
        runs: how many were measured: a regression is one only if it shows in all `RUNS`.
    """

    slowdown: Slowdown
    verdict: str
    runs: int


def judge(runs: Iterable[tuple[Rounds, Rounds]], allowed: float) -> Judgement:
    """Compares runs with a baseline until one is no regression, `RUNS` at most.

    Args:
        runs: the baseline, and the rounds of one run; each is asked for only if it is needed.
        allowed: slowdown that is none, as a share.

    Raises:
        ValueError: there is no run.
    """
    judged = None
    for number, (before, now) in enumerate(islice(runs, RUNS), 1):
        found = slowdown(before, now)
        judged = Judgement(found, found.verdict(allowed), number)
        if judged.verdict != "regression":
            break
    if judged is None:
        raise ValueError("expected at least one run")
    return judged


def slowdown(before: Rounds, now: Rounds, seed: int = 0) -> Slowdown:
    """Compares two runs; the gauge counts if both have it.

    Args:
        before: the baseline.
        now: the run that is judged.
        seed: of the bootstrap.
    """
    gauged = bool(before.gauge_us) and bool(now.gauge_us)
    runs = [_columns(run, gauged) for run in (before, now)]
    random = np.random.default_rng(seed)
    drawn = [_speed(_resampled(run, random)) for run in runs]
    low, high = np.quantile(drawn[1] / drawn[0], [1 - CONFIDENCE, CONFIDENCE])
    ratio = _speed(runs[1]) / _speed(runs[0])
    clocks = [np.quantile(run[1], _QUANTILE) for run in runs]
    return Slowdown(float(ratio), float(low), float(high), float(clocks[1] / clocks[0]))


@dataclass(frozen=True)
class Duel:
    """Two contestants of one race.

    Attributes:
        baseline_us: a median for each round, in order.
        candidate_us: in the same rounds; as many.
    """

    baseline_us: Sequence[float]
    candidate_us: Sequence[float]

    def __post_init__(self) -> None:
        """Refuses rounds that did not lie side by side, or no times. Raises ValueError."""
        sizes = len(self.baseline_us), len(self.candidate_us)
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ValueError(f"expected as many rounds of both, at least one; got {sizes}")
        if not all(0 < us < math.inf for us in (*self.baseline_us, *self.candidate_us)):
            raise ValueError("expected times above 0")


def speedup(duels: Sequence[Duel], confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """How many times as fast the candidate is: above 1 means faster.

    Sessions opened anew lie elsewhere in memory, which a race cannot see from within. So from two
    duels on, each in sessions of its own, the interval is that of the rounds or that of the duels'
    means by Student's t, whichever reaches further.

    Args:
        duels: at least one.
        confidence: of each end.
        seed: of the bootstrap.

    Raises:
        ValueError: there is no duel.
    """
    if not duels:
        raise ValueError("expected at least one duel")
    random = np.random.default_rng(seed)
    pairs = [np.array([duel.candidate_us, duel.baseline_us], np.float64) for duel in duels]
    gains = np.array([-math.log(_speed(pair)) for pair in pairs])
    drawn = np.mean([-np.log(_speed(_resampled(pair, random))) for pair in pairs], axis=0)
    value = float(gains.mean())
    low, high = (float(q) for q in np.quantile(drawn, [1 - confidence, confidence]))
    if len(duels) > 1:
        error = float(gains.std(ddof=1)) / math.sqrt(len(duels))
        reach = student_quantile(confidence, len(duels) - 1) * error
        low, high = min(low, value - reach), max(high, value + reach)
    low, high = min(low, value), max(high, value)
    return Interval(math.exp(value), math.exp(low), math.exp(high))


def median_time(races: Sequence[Sequence[float]], confidence: float, seed: int = 0) -> Interval:
    """The median over all rounds of several races, and the ends that other races would stay within.

    Args:
        races: a median for each round, in order.
        confidence: of each end.
        seed: of the bootstrap.
    """
    random = np.random.default_rng(seed)
    drawn = [_resampled(np.array([rounds], np.float64), random) for rounds in races]
    medians = np.median(np.concatenate(drawn, axis=-1), axis=-1)
    low, high = (float(q) for q in np.quantile(medians, [1 - confidence, confidence]))
    value = float(np.median(np.concatenate([np.asarray(rounds) for rounds in races])))
    return Interval(value, min(low, value), max(high, value))


def _columns(run: Rounds, gauged: bool) -> Floats:
    """float64 [2, rounds]: times, and those of the gauge or ones."""
    times = np.asarray(run.times_us, np.float64)
    return np.stack(
        [times, np.asarray(run.gauge_us, np.float64) if gauged else np.ones_like(times)]
    )


def _speed(run: Floats) -> Any:
    """Time in units of the gauge, along the last axis."""
    times, gauge = np.quantile(run, _QUANTILE, axis=-1)
    return times / gauge


def _resampled(run: Floats, random: np.random.Generator) -> Floats:
    """float64 [rows, samples, rounds]: blocks drawn with replacement, all rows alike."""
    rounds = run.shape[1]
    block = min(_BLOCK, max(rounds // 4, 1))  # a few long blocks would always hold the same rounds
    starts = random.integers(0, rounds, (_SAMPLES, -(-rounds // block), 1))
    picked = (starts + np.arange(block)) % rounds
    return run[:, picked.reshape(_SAMPLES, -1)[:, :rounds]]

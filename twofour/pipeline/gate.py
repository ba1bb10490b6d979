"""The gate: whether a candidate loses little enough, is fast enough, and small enough.

    accuracy    drop  <= max_drop, in the metric's own unit: points where it is percent
    speed       times as fast as the baseline >= min_speedup
    memory      peak resident memory <= max_memory_bytes, max_memory_share of the baseline's

A limit that was not asked for is no check. Each check has an interval: `low` and `high` are bounds
of one side each, and the verdict is

    passed      the interval lies within the limit
    failed      it lies beyond
    undecided   the limit is inside: more samples or rounds would tell

so that a model at least as bad as a limit passes it, and one at least as good fails it, by chance
at most as often as one minus the confidence. Looking again after each measurement gives chance more
opportunities: `decide` shares that out over all looks (Bonferroni), so that it holds for the whole.

What is measured: `evaluate/drop.py` (accuracy), `bench/regression.py` (speed); memory is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from twofour.bench.regression import Duel, speedup
from twofour.bench.timing import MIN_ROUNDS
from twofour.core.errors import InputError
from twofour.core.interval import Interval
from twofour.core.outcome import FAILED, PASSED, UNDECIDED, Check, Figure
from twofour.evaluate.drop import LEAST_SAMPLES, drop_of
from twofour.evaluate.metric import Kept, Metric
from twofour.pipeline.gate_text import MORE, accuracy_text, ends_text, memory_text, speed_text

ACCURACY, SPEED, MEMORY = "accuracy", "speed", "memory"
POINTS, TIMES, BYTES = "points", "x", "bytes"


@dataclass(frozen=True)
class Limits:
    """What is asked for; None: not asked.

    Attributes:
        max_drop: most that the metric may be worse than the baseline's.
        min_speedup: times as fast as the baseline, at least.
        max_memory_bytes: peak resident memory of the candidate.
        max_memory_share: the same in units of the baseline's.
        confidence: of each end of an interval, 0.5 to below 1.
    """

    max_drop: float | None = 1.5
    min_speedup: float | None = None
    max_memory_bytes: int | None = None
    max_memory_share: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuses what means nothing. Raises InputError, with all reasons."""
        named = {
            "min_speedup": self.min_speedup,
            "max_memory": self.max_memory_bytes,
            "max_memory_share": self.max_memory_share,
        }
        wrong = [
            f"{name}: expected a number above 0, got {value}"
            for name, value in named.items()
            if value is not None and not 0 < value < math.inf
        ]
        if self.max_drop is not None and not math.isfinite(self.max_drop):
            wrong.append(f"max_drop: expected a number, got {self.max_drop}")
        if not 0.5 <= self.confidence < 1:
            wrong.append(f"confidence: expected 0.5 to below 1, got {self.confidence}")
        if wrong:
            raise InputError("bad limits of the gate", wrong, "such as max_drop: 1.5")


@dataclass(frozen=True, eq=False)
class Paired:
    """Both networks, judged on the same samples.

    Attributes:
        metric: that judged them.
        before: of the baseline.
        after: of the candidate.
    """

    metric: Metric
    before: Kept
    after: Kept


@dataclass(frozen=True)
class Figures:
    """Two figures that were measured apart: of a recorded baseline, and of the candidate.

    Attributes:
        metric: that both were judged by.
        before: of the baseline, with its interval.
        after: of the candidate, with its own.
    """

    metric: Metric
    before: Figure
    after: Figure


@dataclass(frozen=True)
class Times:
    """Two times that were measured apart, on one machine: see `gate_recorded.py`.

    Attributes:
        before: microseconds of the baseline, with their interval.
        after: of the candidate.
    """

    before: Figure
    after: Figure


@dataclass(frozen=True, eq=False)
class Measured:
    """All that was measured so far; None: not yet, or not at all.

    Attributes:
        accuracy: of both.
        speed: duels of both, each in sessions of its own; or recorded times.
        memory_bytes: peak resident memory of the candidate.
        baseline_memory_bytes: of the baseline.
    """

    accuracy: Paired | Figures | None = None
    speed: Sequence[Duel] | Times | None = None
    memory_bytes: int | None = None
    baseline_memory_bytes: int | None = None


@dataclass(frozen=True)
class Looks:
    """How often each check is judged at most, before it is left undecided.

    Attributes:
        accuracy: 1 where all samples are judged at once.
        speed: each on more duels than the one before.
    """

    accuracy: int = 1
    speed: int = 1

    def __post_init__(self) -> None:
        """Refuses none. Raises ValueError."""
        if min(self.accuracy, self.speed) < 1:
            raise ValueError(f"expected at least one look each, got {self}")


Measure = Callable[[int, tuple[str, ...]], Measured | None]
"""Number of the look, from 0, and the names of the checks that are still undecided -> all that is
measured by then; None where nothing more can be measured."""


def judge_gate(measured: Measured, limits: Limits, looks: Looks | None = None) -> tuple[Check, ...]:
    """The checks that the limits ask for, in the order accuracy, speed, memory.

    Args:
        measured: all so far.
        limits: what is asked for.
        looks: how often this is called at most on growing data; default once.

    Raises:
        InputError: a limit has nothing measured for it, or baseline and candidate do not match.
        GateError: the candidate's metric is no number.
    """
    looks = looks or Looks()
    _require_measured(measured, limits)
    checks = []
    if limits.max_drop is not None and measured.accuracy is not None:
        checks.append(_accuracy(measured.accuracy, limits.max_drop, limits, looks))
    if limits.min_speedup is not None and measured.speed is not None:
        checks.append(_speed(measured.speed, limits.min_speedup, limits, looks))
    if MEMORY in _asked(limits):
        checks.append(_memory(measured, limits))
    return tuple(checks)


def more_needed(checks: Sequence[Check]) -> tuple[str, ...]:
    """The names of the checks that more measuring might decide; none once a check has failed."""
    if any(check.verdict == FAILED for check in checks):
        return ()
    return tuple(check.name for check in checks if check.verdict == UNDECIDED)


def decide(measure: Measure, limits: Limits, looks: Looks | None = None) -> tuple[Check, ...]:
    """Measures until each check is decided, one has failed, or all looks are used up.

    A check that is decided stays so: later looks judge only the others.

    Args:
        measure: measures more.
        limits: what is asked for.
        looks: how often each check is judged at most; default accuracy once, speed three times.

    Raises:
        InputError, GateError: see `judge_gate`; or nothing was measured at the first look.
    """
    looks = looks or Looks(speed=3)
    found: dict[str, Check] = {}
    names = tuple(_asked(limits))
    most = {ACCURACY: looks.accuracy, SPEED: looks.speed, MEMORY: 1}
    for look in range(max(most.values())):
        open_names = tuple(name for name in names if look < most[name])
        measured = measure(look, open_names) if open_names else None
        if measured is None:
            break
        judged = judge_gate(measured, _only(limits, open_names), looks)
        found |= {check.name: check for check in judged}
        names = more_needed(tuple(found.values()))
    if missing := [name for name in _asked(limits) if name not in found]:
        raise InputError("the gate has nothing to judge", [f"no measurement of {missing}"])
    return tuple(found[name] for name in _asked(limits))


def verdict_of(checks: Sequence[Check]) -> str:
    """Of the whole gate: failed if one failed, else undecided if one is; "" without checks."""
    verdicts = {check.verdict for check in checks}
    return next((each for each in (FAILED, UNDECIDED, PASSED) if each in verdicts), "")


def is_open(checks: Sequence[Check], undecided_passes: bool = False) -> bool:
    """Whether the candidate may go on.

    Args:
        checks: of the gate; without any it is open.
        undecided_passes: as a recipe with `undecided: pass` asks for.
    """
    shut = {FAILED} if undecided_passes else {FAILED, UNDECIDED}
    return not any(check.verdict in shut for check in checks)


def _shared_out(confidence: float, looks: int) -> float:
    """Of one look, so that all together err no more often than one may (Bonferroni)."""
    return 1 - (1 - confidence) / looks


def _asked(limits: Limits) -> list[str]:
    """The names of the checks."""
    memory = limits.max_memory_bytes is not None or limits.max_memory_share is not None
    asked = {
        ACCURACY: limits.max_drop is not None,
        SPEED: limits.min_speedup is not None,
        MEMORY: memory,
    }
    return [name for name, wanted in asked.items() if wanted]


def _only(limits: Limits, names: Sequence[str]) -> Limits:
    """Those of these checks."""
    if ACCURACY not in names:
        limits = replace(limits, max_drop=None)
    if SPEED not in names:
        limits = replace(limits, min_speedup=None)
    if MEMORY not in names:
        limits = replace(limits, max_memory_bytes=None, max_memory_share=None)
    return limits


def _require_measured(measured: Measured, limits: Limits) -> None:
    there = {
        ACCURACY: measured.accuracy is not None,
        SPEED: bool(measured.speed),
        MEMORY: measured.memory_bytes is not None
        and (limits.max_memory_share is None or measured.baseline_memory_bytes is not None),
    }
    missing = [name for name in _asked(limits) if not there[name]]
    if missing:
        raise InputError(
            "the gate lacks a measurement",
            [f"a limit is set for {name}, which was not measured of both" for name in missing],
            "measure it, or leave the limit out",
        )


def _accuracy(evidence: Paired | Figures, limit: float, limits: Limits, looks: Looks) -> Check:
    if isinstance(evidence, Paired):
        confidence = _shared_out(limits.confidence, looks.accuracy)
        drop = drop_of(evidence.metric, evidence.before, evidence.after, confidence)
        figures = evidence.before.figure, evidence.after.figure
        samples = len(evidence.before.labels)
        why = f"{evidence.metric.name} does not say which samples belong together ('group')"
        if drop.low == -math.inf:
            why = f"{samples} samples are too few to tell, {LEAST_SAMPLES} at least"
    else:
        drop = _drop(evidence)
        figures = evidence.before.value, evidence.after.value
        why = "none was recorded"
    sure = ends_text(drop, limits.confidence, why)
    if drop.low == drop.high == 0:
        sure = "no sample tells them apart"
    text = accuracy_text(evidence.metric, figures, drop, limit, sure)
    unit = POINTS if evidence.metric.unit == "%" else ""
    return _check(ACCURACY, drop.at_most(limit), drop, limit, unit, text)


def _speed(evidence: Sequence[Duel] | Times, limit: float, limits: Limits, looks: Looks) -> Check:
    if isinstance(evidence, Times):
        found, why = _quotient(evidence), "none was recorded"
    else:
        found = speedup(evidence, _shared_out(limits.confidence, looks.speed))
        rounds = sum(len(duel.baseline_us) for duel in evidence)
        why = f"{rounds} rounds are too few to tell, {MIN_ROUNDS} at least"
        if rounds < MIN_ROUNDS:
            found = Interval(found.value, -math.inf, math.inf)
    text = speed_text(found, limit, ends_text(found, limits.confidence, why, ".3f"))
    return _check(SPEED, found.at_least(limit), found, limit, TIMES, text)


def _memory(measured: Measured, limits: Limits) -> Check:
    """Against the smaller of both limits."""
    used, baseline = float(measured.memory_bytes or 0), measured.baseline_memory_bytes
    most, share = math.inf, None
    if limits.max_memory_share is not None and baseline is not None:
        most, share = limits.max_memory_share * baseline, limits.max_memory_share
    if limits.max_memory_bytes is not None and limits.max_memory_bytes <= most:
        most, share = float(limits.max_memory_bytes), None
    text = memory_text(used, baseline, most, share)
    found = Interval(used)
    return _check(MEMORY, found.at_most(most), found, most, BYTES, text)


def _drop(evidence: Figures) -> Interval:
    """Of figures measured apart: its ends are those that their ends allow."""
    gain, before, after = evidence.metric.gain, evidence.before, evidence.after
    value = -gain(before.value, after.value)
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Interval(value)
    ends = -gain(before.low, after.high), -gain(before.high, after.low)
    return Interval(value, min(ends), max(ends))


def _quotient(evidence: Times) -> Interval:
    """Likewise of times: the baseline's over the candidate's."""
    before, after = evidence.before, evidence.after
    value = before.value / after.value
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Interval(value)
    return Interval(value, before.low / after.high, before.high / after.low)


def _check(name: str, verdict: str, found: Interval, limit: float, unit: str, text: str) -> Check:
    """Ends that are infinite are none."""
    low, high = (None if end is None or math.isinf(end) else end for end in (found.low, found.high))
    more = f"; {MORE[name]} to decide it" if verdict == UNDECIDED else ""
    return Check(name, verdict, found.value, low, high, limit, unit, text + more)

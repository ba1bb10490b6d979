"""The gate: noise neither passes nor fails a model, whatever its true figures are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from twofour.bench.regression import Duel
from twofour.core.errors import InputError
from twofour.core.outcome import FAILED, PASSED, UNDECIDED, Check, Figure
from twofour.evaluate.metric import Kept
from twofour.evaluate.metrics import METRICS
from twofour.pipeline.gate import (
    Figures,
    Limits,
    Looks,
    Measured,
    Paired,
    Times,
    decide,
    is_open,
    judge_gate,
    more_needed,
    verdict_of,
)
from twofour.pipeline.gate_text import gate_lines

RUNS, MOST_WRONG = 100, 13  # a chance of 5 % each: more than 13 once in a thousand times


def top1(drop: float, samples: int, seed: int = 0, differ: float = 0.03) -> Paired:
    """Both of a classifier that truly loses `drop` points; `differ`: share on which they differ."""
    random = np.random.default_rng(seed)
    draw = random.random(samples)
    before = random.random(samples) < 0.9
    changed = draw < differ
    before[changed] = random.random(int(changed.sum())) < 0.5 + drop / 200 / differ
    labels = np.zeros(samples, np.int64)
    rows = [before, np.where(changed, ~before, before)]
    kept = [Kept({"right": each}, labels, 100 * float(each.mean())) for each in rows]
    return Paired(METRICS["top1"], *kept)


def duels(truth: float, count: int = 3, seed: int = 0, rounds: int = 40) -> list[Duel]:
    """Of a candidate that is truly so many times as fast."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        clock = np.exp(random.normal(0, 0.05, rounds))
        times = [base * clock * np.exp(random.normal(0, 0.02, rounds)) for base in (1.0, 1 / truth)]
        found.append(Duel(list(times[0]), list(times[1])))
    return found


def verdicts(checks: Sequence[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def test_three_checks() -> None:
    measured = Measured(top1(0.2, 10_000), duels(2.0), 90_000_000, 100_000_000)
    checks = judge_gate(measured, Limits(1.5, 1.5, 95_000_000))
    assert verdicts(checks) == dict.fromkeys(("accuracy", "speed", "memory"), PASSED)
    assert [check.unit for check in checks] == ["points", "x", "bytes"]
    accuracy, speed, memory = checks
    assert accuracy.low < accuracy.value < accuracy.high < accuracy.limit == 1.5
    assert 1.5 < speed.low < speed.value < speed.high
    assert (memory.value, memory.low, memory.high, memory.limit) == (9e7, None, None, 9.5e7)
    assert verdict_of(checks) == PASSED
    assert is_open(checks)


def test_each_check_fails_by_itself() -> None:
    good = Measured(top1(0.2, 10_000), duels(2.0), 90_000_000, 100_000_000)
    for limits, name in (
        (Limits(-1.5), "accuracy"),
        (Limits(None, 2.5), "speed"),
        (Limits(None, None, 89_999_999), "memory"),
        (Limits(None, None, None, 0.89), "memory"),
    ):
        checks = judge_gate(good, limits)
        assert verdicts(checks) == {name: FAILED}
        assert not is_open(checks, undecided_passes=True)
    assert verdicts(judge_gate(good, Limits(None, None, 90_000_000, 0.9))) == {"memory": PASSED}


@pytest.mark.parametrize("drop", [1.5, 1.6, 2.5])
def test_at_or_beyond_the_limit_chance_seldom_passes(drop: float) -> None:
    found = [
        judge_gate(Measured(top1(drop, 1000, seed)), Limits(1.5))[0].verdict for seed in range(RUNS)
    ]
    assert found.count(PASSED) <= MOST_WRONG


@pytest.mark.parametrize("drop", [0.5, 1.4, 1.5])
def test_at_or_within_the_limit_chance_seldom_fails(drop: float) -> None:
    found = [
        judge_gate(Measured(top1(drop, 1000, seed)), Limits(1.5))[0].verdict for seed in range(RUNS)
    ]
    assert found.count(FAILED) <= MOST_WRONG


def test_models_far_from_the_limit_are_decided() -> None:
    """A gate that is always undecided would never be wrong, either."""
    for drop, verdict in ((0.0, PASSED), (4.0, FAILED)):
        found = [
            judge_gate(Measured(top1(drop, 5000, seed, differ=0.06)), Limits(1.5))[0].verdict
            for seed in range(20)
        ]
        assert found.count(verdict) >= 19


@pytest.mark.parametrize("truth", [1.18, 1.2, 1.22])
def test_speed_near_the_limit(truth: float) -> None:
    found = [
        judge_gate(Measured(speed=duels(truth, 3, seed)), Limits(None, 1.2))[0].verdict
        for seed in range(RUNS)
    ]
    if truth <= 1.2:
        assert found.count(PASSED) <= MOST_WRONG
    if truth >= 1.2:
        assert found.count(FAILED) <= MOST_WRONG


def growing(truth: float, drop: float, seed: int) -> object:
    """Measures more at each look: 3, 6, 9 duels; 1000, 2000, 3000 samples."""
    everything, races = top1(drop, 3000, seed), duels(truth, 9, seed)

    def measure(look: int, names: tuple[str, ...]) -> Measured:
        size = 1000 * (look + 1)
        kept = [
            Kept({"right": each.rows["right"][:size]}, each.labels[:size], 0.0)
            for each in (everything.before, everything.after)
        ]
        kept = [
            Kept(each.rows, each.labels, 100 * float(each.rows["right"].mean())) for each in kept
        ]
        return Measured(Paired(METRICS["top1"], *kept), races[: 3 * (look + 1)])

    return measure


def test_looking_three_times_does_not_give_chance_more_opportunities() -> None:
    """At the limit, where a look at 95 % each would pass or fail up to 14 %."""
    limits, looks = Limits(1.5, 1.2), Looks(3, 3)
    found = [verdicts(decide(growing(1.2, 1.5, seed), limits, looks)) for seed in range(RUNS // 2)]
    for name in ("accuracy", "speed"):
        for verdict in (PASSED, FAILED):
            assert [each[name] for each in found].count(verdict) <= 8, (name, verdict)


def test_more_is_measured_only_while_it_may_decide() -> None:
    asked: list[tuple[int, tuple[str, ...]]] = []

    def measure(look: int, names: tuple[str, ...]) -> Measured:
        asked.append((look, names))
        # Noisy at first: the second look has enough duels.
        return Measured(top1(0.0, 10_000), duels(1.3, 1 if look == 0 else 30, rounds=20), 5)

    limits = Limits(1.5, 1.28, 10)
    checks = decide(measure, limits, Looks(1, 4))
    assert verdicts(checks) == dict.fromkeys(("accuracy", "speed", "memory"), PASSED)
    assert asked == [(0, ("accuracy", "speed", "memory")), (1, ("speed",))]


def test_a_failed_check_ends_it() -> None:
    looks: list[int] = []

    def measure(look: int, names: tuple[str, ...]) -> Measured:
        looks.append(look)
        return Measured(top1(5.0, 10_000, differ=0.1), duels(1.2))

    checks = decide(measure, Limits(1.5, 1.2), Looks(1, 5))
    assert verdicts(checks) == {"accuracy": FAILED, "speed": UNDECIDED}
    assert looks == [0]
    assert verdict_of(checks) == FAILED


def test_the_looks_are_bounded_and_what_cannot_be_measured_ends_them() -> None:
    looks: list[int] = []

    def measure(look: int, names: tuple[str, ...]) -> Measured | None:
        looks.append(look)
        return Measured(speed=duels(1.2)) if look < 4 else None

    assert verdicts(decide(measure, Limits(None, 1.2))) == {"speed": UNDECIDED}
    assert looks == [0, 1, 2]
    looks.clear()
    assert verdicts(decide(measure, Limits(None, 1.2), Looks(1, 9))) == {"speed": UNDECIDED}
    assert looks == [0, 1, 2, 3, 4]


def test_undecided_is_not_passed_unless_asked_for() -> None:
    checks = judge_gate(Measured(speed=duels(1.2)), Limits(None, 1.2))
    assert verdict_of(checks) == UNDECIDED
    assert not is_open(checks)
    assert is_open(checks, undecided_passes=True)
    assert more_needed(checks) == ("speed",)
    assert "measure longer to decide it" in checks[0].text


def test_without_limits_there_is_no_gate() -> None:
    assert judge_gate(Measured(), Limits(None)) == ()
    assert decide(lambda look, names: None, Limits(None)) == ()
    assert verdict_of(()) == ""
    assert is_open(())


def test_the_same_network_passes_a_limit_of_nothing() -> None:
    kept = Kept({"right": np.ones(10, bool)}, np.zeros(10), 100.0, "same")
    (check,) = judge_gate(Measured(Paired(METRICS["top1"], kept, kept)), Limits(0.0))
    assert check.verdict == PASSED
    assert (check.value, check.low, check.high) == (0.0, 0.0, 0.0)
    assert "no sample tells them apart" in check.text


def test_few_samples_and_few_rounds_decide_nothing() -> None:
    measured = Measured(top1(0.0, 20), duels(3.0, 1, rounds=6))
    checks = judge_gate(measured, Limits(1.5, 1.0))
    assert verdicts(checks) == {"accuracy": UNDECIDED, "speed": UNDECIDED}
    assert [(check.low, check.high) for check in checks] == [(None, None)] * 2
    assert "20 samples are too few to tell, 30 at least" in checks[0].text
    assert "6 rounds are too few to tell, 20 at least" in checks[1].text


def test_less_is_better_for_a_loss() -> None:
    random = np.random.default_rng(0)
    errors = random.random(1000)
    labels = np.zeros(1000)
    before, worse, better = (
        Kept({"error": errors + more}, labels, float(errors.mean()) + more)
        for more in (0.0, 0.2, -0.2)
    )
    (check,) = judge_gate(Measured(Paired(METRICS["loss"], before, worse)), Limits(0.1))
    assert check.verdict == FAILED
    assert check.value == pytest.approx(0.2)
    assert check.unit == ""
    assert "0.2 worse than the baseline's" in check.text
    (check,) = judge_gate(Measured(Paired(METRICS["loss"], before, better)), Limits(0.1))
    assert check.verdict == PASSED
    assert "0.2 better than the baseline's" in check.text


@pytest.mark.parametrize(
    ("before", "after", "verdict", "ends"),
    [
        (Figure(92.0, 91.8, 92.2), Figure(91.5, 91.3, 91.7), PASSED, (0.1, 0.9)),
        (Figure(92.0, 91.8, 92.2), Figure(90.5, 90.3, 90.7), UNDECIDED, (1.1, 1.9)),
        (Figure(92.0, 91.8, 92.2), Figure(88.0, 87.8, 88.2), FAILED, (3.6, 4.4)),
        (Figure(92.0), Figure(90.5), PASSED, (None, None)),
        (Figure(92.0, 91.0, 93.0), Figure(90.4), FAILED, (None, None)),
    ],
)
def test_recorded_figures(
    before: Figure, after: Figure, verdict: str, ends: tuple[float | None, float | None]
) -> None:
    (check,) = judge_gate(Measured(Figures(METRICS["top1"], before, after)), Limits(1.5))
    assert check.verdict == verdict
    assert (check.low, check.high) == pytest.approx(ends)
    assert ("the figure alone decides" in check.text) == (ends[0] is None)


def test_recorded_times() -> None:
    times = Times(Figure(200.0, 190.0, 210.0), Figure(100.0, 95.0, 105.0))
    for limit, verdict in ((1.8, PASSED), (1.9, UNDECIDED), (2.3, FAILED)):
        (check,) = judge_gate(Measured(speed=times), Limits(None, limit))
        assert (check.verdict, check.value) == (verdict, 2.0)
        assert (check.low, check.high) == pytest.approx((190 / 105, 210 / 95))


@pytest.mark.parametrize(
    ("measured", "limits", "message"),
    [
        (Measured(), Limits(1.5), "a limit is set for accuracy"),
        (Measured(speed=[]), Limits(None, 1.0), "a limit is set for speed"),
        (Measured(memory_bytes=1), Limits(None, None, None, 0.5), "a limit is set for memory"),
    ],
)
def test_what_was_not_measured(measured: Measured, limits: Limits, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge_gate(measured, limits)


def test_bad_limits_are_all_named() -> None:
    with pytest.raises(InputError, match="min_speedup") as error:
        Limits(float("nan"), -1.0, 0, None, 1.0)
    for name in ("max_drop", "min_speedup", "max_memory", "confidence"):
        assert name in str(error.value)


def test_the_lines_say_what_was_asked_and_found() -> None:
    measured = Measured(top1(2.5, 20_000), duels(2.0, 3), 90_000_000, 100_000_000)
    lines = gate_lines(judge_gate(measured, Limits(1.5, 1.5, None, 0.95)))
    accuracy, speed, memory = lines
    assert accuracy.startswith("FAILED: accuracy: top1 ")
    for part in (
        "points worse than the baseline's",
        "with 95 % confidence at least",
        "at most 1.50",
    ):
        assert part in accuracy
    assert speed.startswith("passed: speed: 2.0")
    assert speed.endswith("; at least 1.5 was asked for")
    assert memory == (
        "passed: memory: peak resident memory 90.0 MB (the baseline's is 100.0 MB); "
        "at most 95.0 MB, 95% of the baseline's, was asked for"
    )

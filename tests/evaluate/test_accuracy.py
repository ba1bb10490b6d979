"""Top-1 counts what it should, and the gate opens and shuts at its limits."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.core.errors import GateError, InputError
from twofour.evaluate.accuracy import Limits, gate, top1

SCORES = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], np.float32)
X = np.arange(4)


def predict(x: np.ndarray) -> np.ndarray:
    return SCORES[x]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9])
def test_top1(batch: int) -> None:
    assert top1(predict, X, np.array([1, 0, 1, 0]), batch) == 1.0
    assert top1(predict, X, np.array([1, 0, 0, 0]), batch) == 0.75
    assert top1(predict, X, np.array([0, 1, 0, 1]), batch) == 0.0


def test_nan_is_never_right() -> None:
    bad = np.array([[np.nan, 0.5]], np.float32)
    assert top1(lambda _: bad, X[:1], np.array([0])) == 0.0


def test_progress_ends_at_the_last_sample() -> None:
    seen: list[tuple[int, int]] = []
    top1(predict, X, np.array([1, 0, 1, 0]), 3, lambda done, total: seen.append((done, total)))
    assert seen == [(3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [(X, np.zeros(3), "got 4 and 3"), (X[:0], np.zeros(0), "got 0 and 0")],
)
def test_labels_that_do_not_match(x: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        top1(predict, x, labels)


def test_outputs_that_are_no_scores() -> None:
    with pytest.raises(InputError, match=r"expected \[1, classes\], got \[1, 2, 2\]"):
        top1(lambda x: np.zeros((1, 2, 2)), X, np.zeros(4))


@pytest.mark.parametrize(
    ("found", "time_us", "passed", "drop", "speedup"),
    [
        (0.92, 50.0, True, 0.0, 2.0),
        (0.95, 50.0, True, -3.0, 2.0),
        (0.905, 50.0, True, 1.5, 2.0),  # exactly at the limit
        (0.9049, 50.0, False, 1.51, 2.0),
        (0.92, 100.0, False, 0.0, 1.0),  # as fast is not faster
        (0.5, 200.0, False, 42.0, 0.5),
    ],
)
def test_gate(found: float, time_us: float, passed: bool, drop: float, speedup: float) -> None:
    verdict = gate(0.92, found, 100.0, time_us, Limits())
    assert verdict.passed is passed
    assert verdict.drop_points == pytest.approx(drop)
    assert verdict.speedup == pytest.approx(speedup)
    assert any("BROKEN" in reason for reason in verdict.reasons) is not passed


def test_a_shut_gate_is_an_error_with_exit_code_1() -> None:
    gate(0.92, 0.92, 100.0, 50.0, Limits()).require()
    with pytest.raises(GateError, match=r"BROKEN: top-1 50\.00 %") as shut:
        gate(0.92, 0.5, 100.0, 50.0, Limits()).require()
    assert shut.value.exit_code == 1
    assert "held: 2.00 times" in str(shut.value)

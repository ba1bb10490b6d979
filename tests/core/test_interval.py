"""Intervals against limits, and Student's t against scipy."""

from __future__ import annotations

import pytest
from scipy import stats

from twofour.core.interval import Interval, student_quantile
from twofour.core.outcome import FAILED, PASSED, UNDECIDED


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.2, 1.4, PASSED),
        (0.2, 1.5, PASSED),  # exactly at the limit
        (0.1 + 0.2, 0.3 * 5, PASSED),  # 1.5 in binary fractions
        (1.4, 1.6, UNDECIDED),
        (1.5, 1.6, UNDECIDED),
        (1.51, 1.6, FAILED),
        (float("-inf"), float("inf"), UNDECIDED),
        (1.5, 1.5, PASSED),
        (1.6, 1.6, FAILED),
    ],
)
def test_at_most(low: float, high: float, verdict: str) -> None:
    assert Interval((low + high) / 2, low, high).at_most(1.5) == verdict
    assert Interval(-(low + high) / 2, -high, -low).at_least(-1.5) == verdict


def test_without_an_interval_the_value_decides() -> None:
    assert Interval(1.5).at_most(1.5) == PASSED
    assert Interval(1.51).at_most(1.5) == FAILED
    assert Interval(1.5).at_least(1.5) == PASSED
    assert Interval(1.49).at_least(1.5) == FAILED


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 60, 61, 100, 1000, 100_000])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.95, 0.99, 0.9983])
def test_student_is_scipys(freedom: int, probability: float) -> None:
    expected = stats.t.ppf(probability, freedom)
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=2e-6, abs=1e-9)


@pytest.mark.parametrize(("probability", "freedom"), [(0.4, 5), (1.0, 5), (0.9, 0)])
def test_what_is_no_quantile(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="quantile"):
        student_quantile(probability, freedom)

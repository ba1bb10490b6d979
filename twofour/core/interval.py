"""A measured figure with what chance may have made of it, and what a limit says of the two.

`low` and `high` are bounds of one side each: with the confidence asked for the truth is not below
`low`, and with the same confidence it is not above `high`. So whoever decides only where the limit
lies beyond an end is wrong at most as often as one minus the confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from twofour.core.outcome import FAILED, PASSED, UNDECIDED

_SLACK = 1e-9  # what is exactly at the limit holds, whatever binary fractions make of it
_EXPANDED_FROM = 60


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its interval.

    Attributes:
        value: the estimate.
        low: the truth is not less; None where nothing is known of the noise.
        high: the truth is not more.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def at_most(self, limit: float) -> str:
        """Whether the truth is at most `limit`: passed, failed, or undecided.

        Without an interval the value alone decides.
        """
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        if high <= limit + _SLACK:
            return PASSED
        return FAILED if low > limit + _SLACK else UNDECIDED

    def at_least(self, limit: float) -> str:
        """Likewise whether it is at least `limit`."""
        return self.negative().at_most(-limit)

    def negative(self) -> Interval:
        """Of minus the figure."""
        low = None if self.high is None else -self.high
        return Interval(-self.value, low, None if self.low is None else -self.low)


def student_quantile(probability: float, freedom: int) -> float:
    """What Student's t with `freedom` degrees stays below with this probability.

    Up to 60 degrees by bisection of the distribution's finite series, which is exact; above by the
    Cornish-Fisher expansion around the normal distribution, off by less than 1e-6.

    Args:
        probability: 0.5 to below 1.
        freedom: 1 or more.

    Source: Abramowitz and Stegun, "Handbook of mathematical functions", 26.7.3, 26.7.4, 26.7.5.
    """
    if not (0.5 <= probability < 1 and freedom >= 1):
        raise ValueError(f"quantile of {probability} with {freedom} degrees of freedom")
    if freedom > _EXPANDED_FROM:
        return _expanded(NormalDist().inv_cdf(probability), freedom)
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):
        middle = (low + high) / 2
        below = 0.5 + _central(middle, freedom) / 2 < probability
        low, high = (middle, high) if below else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _central(angle: float, freedom: int) -> float:
    """Probability that |t| is at most sqrt(freedom) * tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = (cosine if odd else 1.0) if freedom > 1 else 0.0
    for i in range(2 + odd, freedom, 2):
        term *= cosine * cosine * (i - 1) / i
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _expanded(z: float, freedom: int) -> float:
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3

"""What measured points teach about predictions: factors of their parts, and a monotone map.

    time  = sum of factors[part] * part       parts: layers of one choice, passages between kinds
    error = sum of factors[part] * part       parts: pruning to a pattern, rounding to a precision
    drop  = a rising function of the error

Few points are measured, and parts rise and fall together. So factors are pulled towards one that
all parts share: least squares of relative errors with a penalty (ridge regression), none negative;
a point that is far off counts less (Huber's weights), for something may have disturbed it.
The map is isotonic regression (pool adjacent violators), straight between its points.

Source: Hoerl and Kennard 1970 (ridge); Huber 1964; Barlow et al. 1972 (isotonic).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_PULL = 0.02  # of a factor that is off by as much as itself, against a point that is off so
_ROUNDS, _FAR = 5, 0.1  # of weighing points by how far off they are; what is far
_LEAST, _MOST = 0.2, 5.0  # of a factor over the shared one: what a few points can be trusted with
Parts = Mapping[str, float]


@dataclass(frozen=True)
class Factors:
    """How much of each part there really is.

    Attributes:
        shared: of parts that no point had.
        own: of the others, by name.
    """

    shared: float
    own: Mapping[str, float]

    def of(self, part: str) -> float:
        """The factor of a part."""
        return self.own.get(part, self.shared)

    def whole(self, parts: Parts) -> float:
        """The prediction."""
        return sum(self.of(name) * value for name, value in parts.items())


NEUTRAL = Factors(1.0, {})


def fit_factors(points: Sequence[tuple[Parts, float]]) -> Factors:
    """Factors that explain what was measured.

    Args:
        points: parts as predicted, and what was measured of their sum.
    """
    known = [(parts, y) for parts, y in points if y > 0 and 0 < sum(parts.values()) < np.inf]
    if not known:
        return NEUTRAL
    shared = float(np.median([y / sum(parts.values()) for parts, y in known]))
    names = sorted({name for parts, _ in known for name, value in parts.items() if value > 0})
    rows = np.array([[parts.get(n, 0.0) * shared / y for n in names] for parts, y in known])
    wanted, trust = 1 - rows.sum(1), np.ones(len(rows))
    for _ in range(_ROUNDS):
        left = np.vstack([trust[:, None] * rows, np.sqrt(_PULL) * np.eye(len(names))])
        right = np.concatenate([trust * wanted, np.zeros(len(names))])
        change = np.linalg.lstsq(left, right, rcond=None)[0]
        off = np.abs(rows @ change - wanted)
        trust = np.sqrt(np.minimum(1, _FAR / np.maximum(off, _FAR)))
    factors = np.clip(1 + change, _LEAST, _MOST)
    return Factors(shared, {n: shared * float(f) for n, f in zip(names, factors, strict=True)})


@dataclass(frozen=True)
class Rising:
    """A rising function, through 0.

    Attributes:
        xs: rising.
        ys: not falling.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    @staticmethod
    def through(points: Sequence[tuple[float, float]]) -> Rising:
        """The nearest one to points (x, y) of x >= 0, a point at (0, 0) among them."""
        blocks: list[list[float]] = []  # weight, sum of x, sum of y
        for x, y in sorted([(0.0, 0.0), *points]):
            blocks.append([1.0, x, y])
            while len(blocks) > 1 and not _rises(blocks[-2], blocks[-1]):
                last = blocks.pop()
                blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
        return Rising(
            tuple(x / weight for weight, x, _ in blocks),
            tuple(y / weight for weight, _, y in blocks),
        )

    def at(self, x: float) -> float:
        """Its value; beyond the last point as steep as on average."""
        if x > self.xs[-1]:
            return self.ys[-1] + self._slope() * (x - self.xs[-1])
        return float(np.interp(x, self.xs, self.ys))

    def most(self, y: float) -> float:
        """The largest x at which it is at most y; infinite where it never is more."""
        if y >= self.ys[-1]:
            slope = self._slope()
            return self.xs[-1] + (y - self.ys[-1]) / slope if slope > 0 else np.inf
        above = next(i for i, each in enumerate(self.ys) if each > y)
        if above == 0:
            return 0.0
        low, high = self.ys[above - 1], self.ys[above]
        x0, x1 = self.xs[above - 1], self.xs[above]
        return x0 + (x1 - x0) * (y - low) / (high - low)

    def _slope(self) -> float:
        return max(self.ys[-1], 0.0) / self.xs[-1] if self.xs[-1] > 0 else 0.0


def _rises(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the second block lies to the right of the first, and above it."""
    (x0, y0), (x1, y1) = ((x / weight, y / weight) for weight, x, y in (one, other))
    return x1 > x0 and y1 > y0

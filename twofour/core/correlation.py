"""Correlation of two rows of numbers, by their values or by their ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def pearson(a: Array, b: Array) -> float:
    """Covariance over both deviations, -1 to 1; 0 where one of them does not vary.

    Args:
        a: [n], n >= 1.
        b: [n].
    """
    a, b = a - a.mean(), b - b.mean()
    norms = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norms if norms else 0.0


def spearman(a: Array, b: Array) -> float:
    """`pearson` of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: Array) -> NDArray[np.float64]:
    """1 for the smallest."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean: NDArray[np.float64] = ((2 * counts.cumsum() - counts + 1) / 2)[group]
    return mean

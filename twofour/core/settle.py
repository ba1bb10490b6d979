"""Columns of a weight are settled one after another; those behind make up for what each one lost.

A layer computes y = w x; changing w costs (w - w') H (w - w')^T, with H = (U^T U)^-1 as `factor` in
`sparsegpt.py` has it. Column i is settled at a value: 0 where it is pruned, a multiple of a step
where it is rounded, else what it is by then.

    error = (w[:, i] - value) / U[i, i]
    w[:, i:] -= outer(error, U[i, i:])                     # makes w[:, i] the value

What all this costs a row is the sum of its squared errors. The last line is done at once for a
group of columns, by one matrix product for the rest of a block of columns, and by one more for
everything behind the block. All in float64.

Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1 (pruning, rounding, and both in one
pass); Frantar et al. 2022, arXiv:2210.17323 (rounding).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twofour.core.masks import magnitude_mask
from twofour.core.patterns import Pattern

Float64 = NDArray[np.float64]


class Settler:
    """Some rows of a weight, turned: column i of the weight is row i here.

    Args:
        upper: U, float64 [K, K].
        w: float64 [K, N]; becomes the result.
        group: columns that are settled together; a pattern, and then a mask is chosen for each
            group of its m columns where none is given.
        mask: bool [K, N], where weights stay; becomes the mask that was chosen.
        step: float64 [N]; each weight becomes an integer times it. None: nothing is rounded.
        most: the largest magnitude of these integers.
    """

    def __init__(
        self,
        upper: Float64,
        w: Float64,
        group: int | Pattern,
        mask: NDArray[np.bool_] | None = None,
        step: Float64 | None = None,
        most: int = 0,
    ) -> None:
        """Takes the arrays as they are; `run` changes `w`."""
        self.w = w
        self.kept = np.empty(w.shape, np.bool_) if mask is None else mask
        self.cost: Float64 = np.zeros(w.shape[1])
        self._pattern = group if isinstance(group, Pattern) and mask is None else None
        self._group = group.m if isinstance(group, Pattern) else group
        self._upper, self._step, self._most = upper, step, most

    def run(self, block: int) -> None:
        """Settles all columns.

        Args:
            block: so many at a time; whole groups.
        """
        for first in range(0, len(self.w), block):
            last = min(first + block, len(self.w))
            errors = np.empty((last - first, self.w.shape[1]))
            for low in range(first, last, self._group):
                high = min(low + self._group, last)
                self._settle(low, high, errors[low - first : high - first])
                self._hand_on(errors[low - first : high - first], (low, high), (high, last))
            self._hand_on(errors, (first, last), (last, len(self.w)))
            self.cost += np.einsum("kn,kn->n", errors, errors)

    def _settle(self, low: int, high: int, errors: Float64) -> None:
        """Settles one group; fills in the errors."""
        w, upper = self.w[low:high], self._upper[low:high, low:high]
        if self._pattern is not None:
            score = np.abs(w) / upper.diagonal()[:, None]
            self.kept[low:high] = magnitude_mask(score.T, self._pattern).T
        for i in range(high - low):
            value = np.where(self.kept[low + i], self._rounded(w[i]), 0.0)
            np.divide(w[i] - value, upper[i, i], out=errors[i])
            w[i + 1 :] -= upper[i, i + 1 :, None] * errors[i]
            w[i] = value

    def _rounded(self, w: Float64) -> Float64:
        """The nearest multiples of the steps, where there are steps."""
        if self._step is None:
            return w
        steps = np.clip(np.rint(w / self._step), -self._most, self._most)
        return np.asarray(steps * self._step)

    def _hand_on(self, errors: Float64, done: tuple[int, int], to: tuple[int, int]) -> None:
        """Lets later columns make up for what settled ones lost."""
        if to[0] < to[1]:
            self.w[slice(*to)] -= self._upper[slice(*done), slice(*to)].T @ errors

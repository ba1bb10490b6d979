"""Integers moved one at a time, each to its best value given all others, until none moves.

For each row w of a weight, its step s and integers q, the cost is

    (w - s q) H (w - s q)^T = const - 2 s q b + s^2 q H q^T        b = w H

With r = b - s q H, which is kept up to date, the best value of integer i given all others is

    q[i]  <-  clip(round(q[i] + r[i] / (s H[i, i])))               r -= s * change * H[i]

Each move makes the cost of its row smaller, so the moves end: at integers which no move of a single
one improves. Coordinates are visited in order, for all rows at once; those outside of a block see
its moves when it is done, by one matrix product, as if they had seen each. A row in which nothing
moved is done.

Source: cyclic coordinate descent as in Behdin et al. 2023, arXiv:2309.01885 (QuantEase), and Zhang
et al. 2024, arXiv:2403.07134 (COMQ), which fits the step too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_BLOCK = 32
_MOST_SWEEPS = 100
_MARGIN = 1e-6
"""How much more than half a step off an integer has to be: what is a draw is left as it is."""


def descend(
    hessian: Float64, b: Float64, q: Float64, step: Float64, kept: NDArray[np.bool_], most: int
) -> None:
    """Moves integers until no move of a single one makes its row's cost smaller.

    Args:
        hessian: H, [K, K], symmetric; H[i, i] > 0.
        b: [K, N], H w, one column for each row of the weight.
        q: [K, N], integers; changed in place.
        step: [N], > 0.
        kept: [K, N], which may move.
        most: the largest magnitude of an integer.
    """
    rows = np.arange(q.shape[1])
    residual = b - step * (hessian @ q)
    for _ in range(_MOST_SWEEPS):
        some = q[:, rows]
        moved = _sweep(hessian, (residual, some, step[rows]), kept[:, rows], most)
        q[:, rows] = some
        rows, residual = rows[moved], residual[:, moved]
        if not len(rows):
            return


def fitted(hessian: Float64, b: Float64, q: Float64, step: Float64) -> Float64:
    """The best steps for given integers, [N]: s = q b / q H q^T.

    Args:
        hessian: H, [K, K].
        b: [K, N], H w.
        q: [K, N], integers.
        step: [N], which stays where the best one is not a positive number.
    """
    along, bent = _dots(q, b), _dots(q, hessian @ q)
    found = np.divide(along, bent, out=np.zeros_like(along), where=bent > 0)
    return np.where(found > 0, found, step)


def costs(hessian: Float64, change: Float64) -> Float64:
    """D H d^T of each column d of `change`, [N]."""
    return _dots(change, hessian @ change)


def _sweep(
    hessian: Float64,
    state: tuple[Float64, Float64, Float64],
    kept: NDArray[np.bool_],
    most: int,
) -> NDArray[np.bool_]:
    """Visits each coordinate once; True for the rows in which one moved."""
    residual, q, step = state
    moved = np.zeros(q.shape[1], np.bool_)
    for first in range(0, len(q), _BLOCK):
        block = slice(first, first + _BLOCK)
        inner, off = hessian[block, block], residual[block].copy()
        before = q[block].copy()
        for i in range(len(before)):
            q_i = q[first + i]
            wanted = q_i + off[i] / (inner[i, i] * step)
            best = np.clip(np.rint(wanted), -most, most)
            gain = np.abs(wanted - q_i) - np.abs(wanted - best)
            move = (gain > _MARGIN) & kept[first + i]
            if move.any():
                change = np.where(move, best - q_i, 0.0)
                q_i += change
                off[i + 1 :] -= inner[i + 1 :, i, None] * (step * change)
        change = q[block] - before
        if change.any():
            moved |= change.any(axis=0)
            residual -= hessian[:, block] @ (step * change)
    return moved


def _dots(a: Float64, b: Float64) -> Float64:
    """The product of each column of a with that of b, [N]."""
    return np.asarray(np.einsum("kn,kn->n", a, b))

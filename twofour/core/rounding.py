"""How a weight becomes int8: one symmetric scale for each output channel.

`quantize_weight` takes the nearest integers. `round_weight` takes those for which the layer's
outputs change least. A layer computes y = w x, and with the inputs of some samples in the columns
of X, rounding costs, with the damping of `rounding_factor`,

    (w - scale w8) H (w - scale w8)^T        H = X X^T + damping * mean(diag(X X^T)) * I

For each output channel:

1. of some scales that clip more and more, the one is taken whose integers, found by settling
   columns one after another (`settle.py`, GPTQ), those of the largest inputs first, cost least;
2. integers are moved one at a time until no move helps (`descent.py`), and the scale is fitted to
   them; then once more with this scale;
3. where all of this costs more than the nearest integers, these are taken.

A zero stays zero: what was pruned stays pruned, and what was kept makes up for it.

Source: Wu et al. 2020, arXiv:2004.09602, section 3.1 (scales); Frantar et al. 2022,
arXiv:2210.17323 (GPTQ); Behdin et al. 2023, arXiv:2309.01885 (coordinate descent).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core import numerics
from twofour.core.descent import costs, descend, fitted
from twofour.core.errors import InputError
from twofour.core.settle import Settler
from twofour.core.sparsegpt import factor

WEIGHT_MAX = 127
"""Weights use -127..127, so that a weight and its negative are both representable."""

_SMALLEST_SCALE = 2.0**-120
"""No smaller scale, so that w / scale stays in range."""
_CLIPPED = (1.0, 0.95, 0.9, 0.8)
"""Shares of a channel's largest weight that are tried as its range."""
_COLUMNS = 1024
"""At most so many, output channels times scales, at a time: little memory."""
_FITS = 2
_BLOCK, _GROUP = 128, 8
_LEAST_DAMPING = 1e-3

Float64 = NDArray[np.float64]


def quantize_weight(w: NDArray[Any], axis: int = 0) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """w8 = round_half_even(w / scale), scale = max(|w|) / 127 for each output channel.

    Args:
        w: float32, any shape; finite.
        axis: counts the output channels.

    Returns:
        int8 in -127..127 of the shape of `w`, zero wherever `w` is, and float32 [N] scales; a
        channel of zeros has scale 1.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    others = tuple(i for i in range(w.ndim) if i != axis)
    scale = _nearest_scale(np.abs(w).max(axis=others), WEIGHT_MAX)
    shape = [1] * w.ndim
    shape[axis] = -1
    w8 = numerics.quantize(w, scale.reshape(shape), 0, np.int8)
    return np.maximum(w8, -WEIGHT_MAX).astype(np.int8), scale


@dataclass(frozen=True)
class Rounded:
    """A weight in integers.

    Attributes:
        w8: int8, of the shape of the weight.
        scale: float32 [N].
        cost: float64 [N], (w - w8 * scale) H (w - w8 * scale)^T of each output channel.
        nearest_cost: the same of what `quantize_weight` gives; no smaller.
    """

    w8: NDArray[np.int8]
    scale: NDArray[np.float32]
    cost: Float64
    nearest_cost: Float64

    @property
    def cost_left(self) -> float:
        """The share of what the nearest integers cost that is left; 1 where that is nothing."""
        before = float(self.nearest_cost.sum())
        return float(self.cost.sum()) / before if before > 0 else 1.0


@dataclass(frozen=True)
class OrderedFactor:
    """What `round_weight` needs of its inputs; layers that read the same input share one.

    Attributes:
        hessian: H, float64 [K, K].
        order: int [K], the features in the order in which they are settled.
        upper: U, float64 [K, K], upper triangular, with U^T U = H^-1, both in that order.
        damping: that H has, as a share of the Gram matrix's mean diagonal.
    """

    hessian: Float64
    order: NDArray[np.intp]
    upper: Float64
    damping: float


def rounding_factor(gram: NDArray[Any], rows: float) -> OrderedFactor:
    """The factor for `round_weight`, damped by as much as the samples leave open.

    The damping is features / rows of the mean of the diagonal: so far off is a Gram matrix of that
    many independent rows. Inputs that are 0 in all samples are damped like the others, or weights
    of theirs would be clipped at no cost.

    Args:
        gram: float64 [K, K], the sum of x x^T; features in the order (tap, channel), channels
            fastest.
        rows: how many x were added up; at least 1.

    Raises:
        InputError: the matrix is not square, finite, symmetric and positive semidefinite, or there
            are no rows.
    """
    if not rows >= 1:
        raise InputError(
            "a Gram matrix is not usable",
            [f"expected the sum of at least 1 row, got {rows:g}"],
            "give samples",
        )
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise InputError(
            "a Gram matrix is not usable",
            [f"expected [K, K], got shape {gram.shape}"],
            "give the sum of x x^T",
        )
    damping = max(len(gram) / rows, _LEAST_DAMPING)
    filled, diagonal = np.array(gram, np.float64), np.diagonal(gram)
    dead = np.flatnonzero(diagonal == 0)
    filled[dead, dead] = damping * float(diagonal.mean())
    order = np.argsort(-diagonal, kind="stable")
    found, back = factor(filled[np.ix_(order, order)], damping), np.argsort(order)
    return OrderedFactor(found.hessian[np.ix_(back, back)], order, found.upper, found.damping)


def round_weight(w: NDArray[Any], found: OrderedFactor, most: int = WEIGHT_MAX) -> Rounded:
    """Rounds a weight so that the layer's outputs on the samples change little.

    Args:
        w: float32 [N, C, ...], finite; zeros stay zeros. Of a convolution in groups one group:
            [N / groups, ...].
        found: of the inputs, see `rounding_factor`; of taps * C features.
        most: the largest magnitude of an integer, 1 to 127.

    Returns:
        Integers in -most..most, and scales. No output channel costs more than with its nearest
        integers and scale max(|w|) / most.

    Raises:
        InputError: the factor is of another size, or `w` is not finite.

    Source: Frantar et al. 2022, arXiv:2210.17323; Behdin et al. 2023, arXiv:2309.01885.
    """
    _require_fit(w, found)
    turned = np.moveaxis(w, 1, -1)
    flat = turned.reshape(len(w), -1)
    scale = _nearest_scale(np.abs(flat).max(axis=1), most)
    q, cost, nearest = np.empty(flat.shape, np.int8), np.empty(len(w)), np.empty(len(w))
    for first in range(0, len(w), _COLUMNS // len(_CLIPPED)):
        rows = slice(first, first + _COLUMNS // len(_CLIPPED))
        part = _Part(np.array(flat[rows].T, np.float64, order="C"), found, most)
        plain = scale[rows].astype(np.float64)
        near = np.clip(np.rint(part.w / plain), -most, most)
        nearest[rows] = part.costs(near, plain)
        best, step = part.rounded(plain)
        better = part.costs(best, step) < nearest[rows]
        best, step = np.where(better, best, near), np.where(better, step, plain)
        q[rows], scale[rows], cost[rows] = best.T, step, part.costs(best, step)
    w8 = np.ascontiguousarray(np.moveaxis(q.reshape(turned.shape), -1, 1))
    return Rounded(w8, scale, cost, nearest)


class _Part:
    """Some rows of a weight, turned: [K, N]."""

    def __init__(self, w: Float64, found: OrderedFactor, most: int) -> None:
        self.w = w
        self._kept, self._found, self._most = w != 0, found, most

    def costs(self, q: Float64, step: Float64) -> Float64:
        return costs(self._found.hessian, self.w - q * step)

    def rounded(self, plain: Float64) -> tuple[Float64, Float64]:
        """Integers, and steps that are exact in float32.

        Args:
            plain: the steps that clip nothing, [N].
        """
        q, step = self._settled(plain)
        hessian, b = self._found.hessian, self._found.hessian @ self.w
        for _ in range(_FITS):
            step = _as_scale(fitted(hessian, b, q, step)).astype(np.float64)
            descend(hessian, b, q, step, self._kept, self._most)
        return q, step

    def _settled(self, plain: Float64) -> tuple[Float64, Float64]:
        """By columns, with the best of several steps."""
        tried = [_as_scale(plain * share) for share in _CLIPPED]
        steps, times = np.concatenate(tried).astype(np.float64), (1, len(tried))
        order = self._found.order
        w, kept = np.tile(self.w[order], times), np.tile(self._kept[order], times)
        settler = Settler(self._found.upper, w, _GROUP, kept, steps, self._most)
        settler.run(_BLOCK)
        choice = settler.cost.reshape(len(_CLIPPED), -1).argmin(axis=0)
        best = choice * len(plain) + np.arange(len(plain))
        q = np.empty_like(self.w)
        q[order] = np.rint(settler.w[:, best] / steps[best])
        return q, steps[best]


def _nearest_scale(peak: NDArray[Any], most: int) -> NDArray[np.float32]:
    """max(|w|) / most; 1 of a channel of zeros."""
    if not np.isfinite(peak).all():
        raise ValueError("NaN or infinite")
    wide = peak.astype(np.float64)
    return np.where(wide > 0, _as_scale(wide / most), 1).astype(np.float32)


def _as_scale(step: Float64) -> NDArray[np.float32]:
    return np.maximum(step, _SMALLEST_SCALE).astype(np.float32)


def _require_fit(w: NDArray[Any], found: OrderedFactor) -> None:
    columns, size = math.prod(w.shape[1:]), len(found.upper)
    problems = []
    if size != columns:
        problems.append(f"expected {columns} features (taps * input channels), got {size}")
    if not np.isfinite(w).all():
        problems.append(f"{int(np.count_nonzero(~np.isfinite(w)))} values are NaN or infinite")
    if problems:
        raise InputError(
            f"cannot round a weight of shape {w.shape}",
            problems,
            "give finite weights of one group of a convolution at a time, with its own inputs",
        )

"""SparseGPT: which weights of a layer to drop, and how those that stay make up for them.

A layer computes y = w x. With the inputs of some calibration samples in the columns of X, dropping
weights costs ||(w - w') X||^2, which depends on X through the Gram matrix `X X^T` alone. Let

    H = X X^T + damping * mean(diag(X X^T)) * I = (U^T U)^-1        U upper triangular

Columns (input features) are settled from left to right. Once column i is settled, what it lost is
made up for by the columns behind it, in the way that is best for the sum of squares (the "optimal
brain surgeon" of one row, with all rows sharing the one U):

    for group in groups of m columns:
        keep the n of m with the largest w[r, i]^2 / U[i, i]^2, of the values as they are now
        for i in group:
            error = (w[:, i] - kept[:, i] * w[:, i]) / U[i, i]
            w[:, i:] -= outer(error, U[i, i:])             # makes the dropped w[:, i] exactly 0

`settle.py` does it, in float64.

So a column is never changed by what goes behind it. Once the mask is complete, `refit.py` moves all
that stays to where the error is smallest, which takes off another third of it or so.

The weights of an input that is always 0 cost nothing. They go first, and of a group of such inputs
the largest stay, with their values.

Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1 and section 3.3 (n:m).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.patterns import Pattern, ineligible
from twofour.core.refit import refit
from twofour.core.settle import Settler

Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

_ROWS = 1024
"""At most so many output channels at a time, whole pairs and tiles: little memory."""
_MOST_GROWTH = 6
"""How often the damping may grow by ten."""
_DEAD = 1e-6
"""The damping of an input that is always 0, beside that of others."""
_SMALL = 64


@dataclass(frozen=True)
class Factor:
    """The triangular factor of an inverse Hessian; layers that read the same input share one.

    Attributes:
        hessian: H, float64 [K, K].
        upper: U, float64 [K, K], upper triangular, with U^T U = H^-1.
        damping: that H has, as a share of the Gram matrix's mean diagonal; larger than what was
            asked for where the matrix would not have been positive definite.
    """

    hessian: Float64
    upper: Float64
    damping: float


def factor(gram: NDArray[Any], damping: float = 0.01) -> Factor:
    """Factors the inverse of the damped Gram matrix.

    Args:
        gram: real [K, K], symmetric, the sum of x x^T over samples; features in the order (tap,
            channel), channels fastest. All zeros count as the identity.
        damping: > 0, a share of the mean of the diagonal.

    Returns:
        The factor. Where the matrix is not positive definite in float64 the damping grows by
        factors of ten, at most six times.

    Raises:
        InputError: the matrix is not square, finite and symmetric, or not positive definite even
            with the largest damping; or the damping is not a positive number.
    """
    _require_gram(gram, damping)
    hessian = np.array(gram, np.float64)
    diagonal = hessian.diagonal().copy()
    mean = float(diagonal.mean())
    mean = mean if mean > 0 else 1.0
    share = np.where(diagonal > 0, 1.0, _DEAD)
    for growth in range(_MOST_GROWTH + 1):
        grown = damping * 10**growth
        np.fill_diagonal(hessian, diagonal + grown * mean * share)
        try:
            # P H P = L L^T with P turning the order round, so H = R R^T with R = P L P upper.
            root = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            continue
        return Factor(hessian, _inverse_upper(np.ascontiguousarray(root)), grown)
    raise InputError(
        f"a Gram matrix of {len(gram)} features is not positive definite",
        [f"its Cholesky factorization fails with damping up to {grown:g}"],
        "give the sum of x x^T over samples, in float64",
    )


def sparsegpt(
    w: NDArray[Any],
    gram: NDArray[Any] | Factor,
    pattern: str | Pattern,
    *,
    block: int = 128,
    mask: Mask | None = None,
    fit: bool = True,
) -> tuple[NDArray[np.float32], Mask]:
    """Prunes a weight so that the layer's outputs on the samples change little.

    Args:
        w: float32 [N, C, ...], finite. Of a convolution in groups one group: [N / groups, ...].
        gram: [K, K] as `factor` takes it, K = taps * C; or its factor.
        pattern: such as `2:4`, `2:4/pair` or `2:4/2d`; a group of columns holds whole tiles.
        block: columns whose changes are collected before the columns behind them see them; rounded
            down to whole groups. Changes the time, and the result by rounding only.
        mask: where weights stay, bool like `w`: then none is chosen, and what stays is updated.
        fit: go on to the best values that the mask allows; without, the result is the paper's.

    Returns:
        The new weight, zero where the mask is False, and the mask.

    Raises:
        InputError: the shape cannot have the pattern, the Gram matrix is not usable or of another
            size, `w` is not finite, or the mask is not shaped like `w`.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774.
    """
    pattern = Pattern.parse(pattern)
    _require_weight(w, pattern, mask)
    columns = math.prod(w.shape[1:])
    size = len(gram.upper if isinstance(gram, Factor) else gram)
    if size != columns:
        raise InputError(
            f"a Gram matrix does not fit a weight of shape {w.shape}",
            [f"expected {columns} features (taps * input channels), got {size}"],
            "give one group of a convolution at a time, with its own inputs",
        )
    found = gram if isinstance(gram, Factor) else factor(gram)
    turned = np.moveaxis(w, 1, -1)
    flat = turned.reshape(len(w), columns)
    kept = None if mask is None else np.moveaxis(mask, 1, -1).reshape(flat.shape)
    new_flat, new_kept = np.empty(flat.shape, np.float32), np.empty(flat.shape, np.bool_)
    step = _ROWS // pattern.together * pattern.together
    for first in range(0, len(w), step):
        rows = slice(first, first + step)
        dense = np.array(flat[rows].T, np.float64, order="C")
        given = None if kept is None else np.ascontiguousarray(kept[rows].T)
        settler = Settler(found.upper, dense.copy(), pattern, given)
        settler.run(max(block // pattern.m, 1) * pattern.m)
        best = refit(dense, settler.w, settler.kept, found.hessian) if fit else settler.w
        new_flat[rows], new_kept[rows] = best.T, settler.kept.T
    return _as_given(new_flat, turned.shape), _as_given(new_kept, turned.shape)


def _inverse_upper(root: Float64) -> Float64:
    """The inverse of an upper triangular matrix: that of its quarters, and a product of them."""
    size = len(root)
    if size <= _SMALL:
        return np.triu(np.linalg.inv(root))
    half = size // 2
    inverse = np.zeros_like(root)
    inverse[:half, :half] = _inverse_upper(root[:half, :half])
    inverse[half:, half:] = _inverse_upper(root[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ root[:half, half:] @ inverse[half:, half:]
    return inverse


def _as_given(flat: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """[N, taps * C] -> [N, C, ...]; `shape` is [N, ..., C]."""
    return np.ascontiguousarray(np.moveaxis(flat.reshape(shape), -1, 1))


def _require_gram(gram: NDArray[Any], damping: float) -> None:
    problems = []
    if not (math.isfinite(damping) and damping > 0):
        problems.append(f"expected a damping above 0, got {damping}")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.size:
        problems.append(f"expected [K, K], got shape {gram.shape}")
    elif not np.isfinite(gram).all():
        problems.append(f"{int(np.count_nonzero(~np.isfinite(gram)))} entries are NaN or infinite")
    elif not np.allclose(gram, gram.T, rtol=1e-3, atol=1e-3 * float(np.abs(gram).max())):
        problems.append("it is not symmetric")
    elif (gram.diagonal() < 0).any():
        problems.append("its diagonal has negative entries")
    if problems:
        raise InputError(
            "a Gram matrix is not usable", problems, "give the sum of x x^T over finite samples"
        )


def _require_weight(w: NDArray[Any], pattern: Pattern, mask: Mask | None) -> None:
    reason = ineligible(w.shape, pattern)
    problems = [] if reason is None else [reason]
    if not np.isfinite(w).all():
        problems.append(f"{int(np.count_nonzero(~np.isfinite(w)))} values are NaN or infinite")
    if mask is not None and (mask.shape != w.shape or mask.dtype != np.bool_):
        problems.append(f"expected a mask bool {w.shape}, got {mask.dtype} {mask.shape}")
    if problems:
        raise InputError(
            f"cannot prune a weight of shape {w.shape} to {pattern} by SparseGPT",
            problems,
            "leave this layer dense",
        )

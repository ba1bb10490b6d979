"""The definition of what is done to a row as a whole: its sum, and layer normalisation.

Like `core.numerics`: plain numpy, every float32 operation rounded once, in the order written here,
so that a kernel on any CPU gives the same bytes.

Source: Ba et al. 2016, arXiv:1607.06450; ONNX LayerNormalization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.fma import fma

Array = NDArray[Any]

LANES = 16


def row_sum(x: Array) -> Array:
    """The sum along the last axis, in the order that vector code adds.

    Lane l of 16 adds the elements l, l + 16, l + 32, ... one after the other; then lanes l and
    l + 8 are added, then l and l + 4, l and l + 2, l and l + 1.

    Args:
        x: float32 [..., K].

    Returns:
        float32 [..., 1]. Off the exact sum by at most (K / 16 + 4) * eps / 2 * sum |x|.
    """
    return _total(x, lambda lanes, values: lanes + values)


def row_squares(x: Array) -> Array:
    """The sum of squares along the last axis, in the order of `row_sum`.

    A lane adds a square by a fused multiply-add: it is rounded once, with the sum.

    Args:
        x: float32 [..., K].

    Returns:
        float32 [..., 1]. Off the exact sum by at most (K / 16 + 4) * eps / 2 * sum x**2.
    """
    return _total(x, lambda lanes, values: fma(values, values, lanes))


def _total(x: Array, add: Callable[[Array, Array], Array]) -> Array:
    """Each lane's elements added one after the other, then the lanes."""
    steps = -(-x.shape[-1] // LANES)
    padded = np.zeros((*x.shape[:-1], steps * LANES), np.float32)
    padded[..., : x.shape[-1]] = x
    lanes = np.zeros((*x.shape[:-1], LANES), np.float32)
    for step in range(steps):
        lanes = add(lanes, padded[..., LANES * step : LANES * (step + 1)])
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float) -> Array:
    """Normalises: y = fma((x - mean) * (1 / sqrt(variance + eps)), gamma, beta), row by row.

    The variance is the mean square of x - mean.

    Args:
        x: float32 [..., K].
        gamma: float32 [K].
        beta: float32 [K].
        eps: > 0.

    Returns:
        float32, the shape of `x`.

    Source: ONNX LayerNormalization with axis = -1.
    """
    count = np.float32(x.shape[-1])
    centred = x.astype(np.float32) - row_sum(x) / count
    variance = row_squares(centred) / count
    inverse = np.float32(1) / np.sqrt(variance + np.float32(eps))
    return fma(centred * inverse, gamma.astype(np.float32), beta.astype(np.float32))

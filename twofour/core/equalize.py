"""How large the channels between two layers should be, so that int8 loses least.

Channel j of an activation is divided by s_j, and the weights that read it are multiplied by s_j.
An activation has one scale for all channels: small ones are rounded coarsely, unless s makes them
as large as the others. A weight has one scale for each row: what s does to its columns costs
accuracy there, unless a row reads one channel only (depthwise). So

    s_j = a_j^alpha / w_j^(1 - alpha)

with a_j, w_j: the largest magnitudes of channel j and of the weights that read it. alpha = 1 makes
the channels equal, 0 the columns; `damage` tells from samples which alpha is best.

Source: Xiao et al. 2023, arXiv:2211.10438, eq. 4. Equal ranges of two weights, s = sqrt(r1 / r2) of
Nagel et al. 2019, arXiv:1906.04721, eq. 11, are the same with alpha = 1/2 and for a_j the range of
the weights that write the channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core import numerics
from twofour.core.histogram import Histogram
from twofour.core.ranges import RangeOptions, affine, choose_range
from twofour.core.rounding import quantize_weight

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

MOST = 100.0
"""No channel is made larger or smaller than by this factor, against their geometric mean."""


def columns(weight: NDArray[Any]) -> Float64:
    """How much of its row's scale each channel's weights take: 1 where they set it.

    Args:
        weight: [G, R, K, T]: of each group rows, channels, taps.

    Returns:
        float64 [G * K], the largest share over all rows; 0 for channels that nothing reads.
    """
    magnitude = np.abs(weight.astype(np.float64)).max(axis=3)
    row = magnitude.max(axis=2, keepdims=True)
    share = np.divide(magnitude, row, out=np.zeros_like(magnitude), where=row > 0)
    found: Float64 = share.max(axis=1).reshape(-1)
    return found


def smoothing(activation: Float64, weight: Float64, alpha: float) -> Float64:
    """s_j = a_j^alpha / w_j^(1 - alpha), with geometric mean 1, and 1 for channels that are zero.

    Args:
        activation: float64 [C], the largest magnitude of each channel.
        weight: float64 [C], the largest magnitude, or share, of what reads it.
        alpha: 0..1.

    Returns:
        float64 [C], within 1 / `MOST` .. `MOST`.

    Source: arXiv:2211.10438, eq. 4.
    """
    alive = (activation > 0) & (weight > 0)
    if not alive.any():
        return np.ones_like(activation)
    power = alpha * np.log(activation[alive]) - (1 - alpha) * np.log(weight[alive])
    s = np.ones_like(activation)
    s[alive] = np.exp(np.clip(power - power.mean(), -np.log(MOST), np.log(MOST)))
    return s


def damage(rows: Float32, weight: Float32, s: Float64, options: RangeOptions) -> float:
    """What int8 does to a product whose channels are divided by s, as a share of its energy.

    The error of the activation and that of the weight, each times the mean square of what it is
    multiplied with; errors of different channels are taken as independent. Each row of the weight
    counts the same: how large its results are says nothing about how much they matter.

    Args:
        rows: float32 [samples, G * K], what the layer reads.
        weight: float32 [G, R, K, T].
        s: float64 [G * K].
        options: how the activation's range is chosen.

    Returns:
        >= 0; 0 if there is nothing to multiply.
    """
    groups, outputs, inputs, taps = weight.shape
    x = (rows / s).astype(np.float32)
    w = weight * s.reshape(groups, 1, inputs, 1)
    flat = w.reshape(groups * outputs, inputs * taps).astype(np.float32)
    w8, scale = quantize_weight(flat)
    lost = np.square(w8 * scale[:, None].astype(np.float64) - flat).reshape(w.shape)
    power, noise = (
        _squares(each).reshape(groups, inputs) for each in (x, x - _rounded(x, options))
    )
    of_x = np.square(w).sum(axis=3)
    energy = np.einsum("grk,gk->gr", of_x, power)
    error = np.einsum("grk,gk->gr", of_x, noise) + np.einsum("grk,gk->gr", lost.sum(axis=3), power)
    alive = energy > 0
    return float((error[alive] / energy[alive]).mean()) if alive.any() else 0.0


def _squares(x: Float32) -> Float64:
    found: Float64 = np.einsum("rc,rc->c", x, x, dtype=np.float64)
    return found


def _rounded(x: Float32, options: RangeOptions) -> Float32:
    """What quantization per tensor makes of it."""
    histogram = Histogram()
    histogram.add(x)
    scheme = affine(choose_range(histogram, options), options.activation)
    q = numerics.quantize(x, scheme.scale, scheme.zero_point, scheme.dtype)
    steps = q.astype(np.float32) - np.float32(scheme.zero_point)
    return steps * np.float32(scheme.scale)

"""The average over windows of quantized tensors: integer sums, one float32 factor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import Window


def tap_factors(scale: float, most: int) -> NDArray[np.float32]:
    """What a sum of n taps is multiplied with: scale / n, rounded once; 0 for none.

    Args:
        scale: x_scale / y_scale.
        most: taps of a window.

    Returns:
        float32 [most + 1], by n.
    """
    counts = np.arange(1, most + 1, dtype=np.float64)
    return np.concatenate([[0.0], scale / counts]).astype(np.float32)


def average_pool(
    x: NDArray[np.uint8],
    window: Window,
    scale: float,
    zero_points: tuple[int, int],
    *,
    include_pad: bool,
) -> NDArray[np.uint8]:
    """Averages windows, each sum exact and rounded once.

        y = saturate(round_half_even((sum - n * x_zero) * (scale / n)) + y_zero)

    The sum is over the n taps of a window that lie in the image.

    Args:
        x: [N, H, W, C], as stored.
        window: where each output looks.
        scale: x_scale / y_scale.
        zero_points: of x and y, as stored.
        include_pad: the factor is that of all taps; those outside the image are zeros.

    Returns:
        uint8 [N, OH, OW, C].

    Source: ONNX AveragePool between DequantizeLinear and QuantizeLinear, which rounds each sum.
    """
    x_zero, y_zero = zero_points
    out_h, out_w = window.output_size(x.shape[1], x.shape[2])
    factors = tap_factors(scale, window.kernel[0] * window.kernel[1])
    y = np.empty((x.shape[0], out_h, out_w, x.shape[3]), np.uint8)
    for i, j in np.ndindex(out_h, out_w):
        rows, columns = (
            place * step - pad + dilation * np.arange(size)
            for place, step, pad, dilation, size in zip(
                (i, j), window.stride, window.pads[:2], window.dilation, window.kernel, strict=True
            )
        )
        rows = rows[(rows >= 0) & (rows < x.shape[1])]
        columns = columns[(columns >= 0) & (columns < x.shape[2])]
        taps = len(rows) * len(columns)
        sums = x[:, rows][:, :, columns].astype(np.int32).sum((1, 2)) - taps * x_zero
        real = sums.astype(np.float32) * factors[-1 if include_pad else taps]
        # Beyond 512 steps every result is the same end of the range.
        y[:, i, j] = np.clip(np.rint(np.clip(real, -512, 512)) + y_zero, 0, 255)
    return y

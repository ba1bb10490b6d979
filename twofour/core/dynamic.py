"""The definition of quantization at run time: scales of what is there, no calibration.

Of a product that quantizes its own input, two forms:

    "row"     each row of the last axis has a scale of its own, and no zero point (per token)
    "tensor"  one scale and zero point for all of it, as ONNX DynamicQuantizeLinear has it

Like `core.numerics`: every float32 operation rounded once, in the order written here. Both give
bytes as stored, uint8: those of a row are int8 values plus 128.

Source: Yao et al. 2022, arXiv:2206.01861 (token-wise quantization); ONNX DynamicQuantizeLinear.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import quantize

Array = NDArray[Any]

ROW, TENSOR = "row", "tensor"
ROW_ZERO = 128
"""The zero point of a row, as stored."""
STEPS = 127.0
"""Of a row, on each side of zero."""
LEAST = 2.0**-100
"""What stands for the largest magnitude of a row where that is smaller: of zeros, for instance."""


class Quantized(NamedTuple):
    """Bytes and what they stand for: x = (bytes - zero_point) * scale.

    Attributes:
        bytes: uint8, the shape of what was quantized.
        scale: float32 [..., 1].
        zero_point: int32 [..., 1], as stored.
    """

    bytes: Array
    scale: Array
    zero_point: Array


def quantize_rows(x: Array) -> Quantized:
    """Each row by itself: highest = max(|x|, LEAST); q = round_half_even(x * (127 / highest)).

    The scale is highest / 127. No result leaves -127..127, as no rounding of the two operations
    takes |x| * (127 / highest) to 127.5.

    Args:
        x: float32 [..., K].

    Returns:
        The bytes and scales. Of a row with a NaN the scale is NaN; of one with an infinity it is
        infinite. What is NaN then is stored as 0.
    """
    x = np.asarray(x, np.float32)
    highest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(LEAST))
    with np.errstate(invalid="ignore"):
        steps = np.rint(x * (np.float32(STEPS) / highest))
    stored = np.where(np.isnan(steps), 0, steps + ROW_ZERO).astype(np.uint8)
    scale = highest / np.float32(STEPS)
    return Quantized(stored, scale, np.full(scale.shape, ROW_ZERO, np.int32))


def quantize_tensor(x: Array) -> Quantized:
    """All of it alike: scale = (max(x, 0) - min(x, 0)) / 255, zero point = -min(x, 0) / scale.

    Args:
        x: float32 [..., K], finite.

    Returns:
        The bytes, and one scale and zero point, repeated for each row. Zeros have the scale 1.

    Source: ONNX DynamicQuantizeLinear.
    """
    x = np.asarray(x, np.float32)
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = np.asarray((high - low) / np.float32(255) if high > low else 1, np.float32)
    zero = int(np.rint(np.clip(-low / scale, 0, 255)))
    rows = (*x.shape[:-1], 1)
    stored = quantize(x, scale, zero, np.uint8)
    return Quantized(stored, np.full(rows, scale, np.float32), np.full(rows, zero, np.int32))

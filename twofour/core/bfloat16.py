"""bfloat16: the upper half of a float32, 8 bits of significand; and how kernels sum its products.

numpy has no such type: an array of bfloat16 is its bits, uint16.

The dot product of kernels (`vdpbf16ps`) adds two products at a time to a float32 sum. A product of
two bfloat16 is exact in float32; every addition is rounded to nearest even. Numbers below 2**-126
count as zeros, of inputs as of results. With k products,

    |sum - exact| <= k 2**-24 sum |x w| + k 2**-126 max(1, |x|, |w|)

to first order: `dot_bound`.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VDPBF16PS, VCVTNEPS2BF16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.float_bits import INFINITE, MAGNITUDE, Bits, narrowed

Array = NDArray[Any]

ROUNDING = 2.0**-8
"""|round(x) - x| <= ROUNDING |x| for normal numbers: at most half of a last place."""
TINY = 2.0**-126
"""The smallest normal number; smaller ones may be taken for zero."""
_ONE_MORE = np.uint32(0x7FFF)


def to_bf16(x: Array) -> NDArray[np.uint16]:
    """The nearest bfloat16, ties to even; NaN stays NaN, made quiet; overflow is infinity.

    Args:
        x: float32, any shape.

    Returns:
        uint16 bits, the shape of `x`.
    """
    return narrowed(x, np.uint16, _rounded)


def _rounded(bits: Bits) -> Bits:
    """The upper halves of float32 [count]."""
    upper = bits >> np.uint32(16)
    rounded = (bits + _ONE_MORE + (upper & np.uint32(1))) >> np.uint32(16)
    return np.where(bits & MAGNITUDE > INFINITE, upper | np.uint32(0x40), rounded)


def from_bf16(bits: Array) -> NDArray[np.float32]:
    """The float32 of the same value.

    Args:
        bits: uint16, any shape.

    Returns:
        float32, the shape of `bits`.
    """
    wide = np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(np.shape(bits))


def round_bf16(x: Array) -> NDArray[np.float32]:
    """The float32 that is left of `x` once it was held as bfloat16."""
    return from_bf16(to_bf16(x))


def dot_bound(k: int, size: Array) -> Array:
    """How far a kernel's sum of k products of bfloat16 may be from the exact one.

    Args:
        k: number of products.
        size: sum of the products' absolute values.
    """
    return np.asarray(k * 2.0**-24 * size + 4 * k * TINY)

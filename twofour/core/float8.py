"""float8 e4m3fn: 4 bits of exponent, 3 of significand, no infinities; and how numbers become it.

numpy has no such type: an array of it is its bits, uint8.

Source: Micikevicius et al. 2022, arXiv:2209.05433, "FP8 formats for deep learning".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.float_bits import INFINITE, MAGNITUDE, Bits, narrowed

Array = NDArray[Any]

LARGEST = 448.0
"""The largest number; larger ones become it."""
ROUNDING = 2.0**-4
"""|round(x) - x| <= ROUNDING |x| for normal numbers up to LARGEST: half of a last place."""
SMALLEST = 2.0**-9
"""The smallest number above 0; numbers below 2**-6 are multiples of it."""
_NAN, _SIGN = 0x7F, 0x80


def _values() -> NDArray[np.float32]:
    """What each of the 256 patterns of bits stands for."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, (code & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    size = np.where(code & _NAN == _NAN, np.nan, size)
    return np.where(code & _SIGN, -size, size).astype(np.float32)


_VALUES = _values()
_CUT = np.uint32(20)
"""Bits of a float32's significand that float8 lacks."""
_BELOW_HALF = np.uint32((1 << 19) - 1)
_BIAS = np.uint32(127 - 7 << 3)
_NORMAL = np.float32(2.0**-6).view(np.uint32)
_WHOLE = np.float32(2.0**14)
"""The last place of sums with it is 2**-9, the unit of numbers below 2**-6."""


def to_fp8(x: Array) -> NDArray[np.uint8]:
    """The nearest float8, ties to even; beyond LARGEST that; NaN stays NaN.

    Args:
        x: float32, any shape.

    Returns:
        uint8 bits, the shape of `x`.
    """
    return narrowed(x, np.uint8, _codes)


def _codes(bits: Bits) -> Bits:
    """Those of float32 [count], rounded as integers, below 2**-6 by an addition."""
    size = bits & MAGNITUDE
    even = (size >> _CUT) & np.uint32(1)
    code = (size + _BELOW_HALF + even) >> _CUT
    code = np.minimum(np.maximum(code, _BIAS) - _BIAS, np.uint32(_NAN - 1))
    small = (size.view(np.float32) + _WHOLE).view(np.uint32) - _WHOLE.view(np.uint32)
    code = np.where(size < _NORMAL, small, code)
    code = np.where(size > INFINITE, np.uint32(_NAN), code)
    return code | bits >> np.uint32(24) & np.uint32(_SIGN)


def from_fp8(bits: Array) -> NDArray[np.float32]:
    """The float32 of the same value.

    Args:
        bits: uint8, any shape.

    Returns:
        float32, the shape of `bits`.
    """
    return np.asarray(_VALUES[np.asarray(bits, np.uint8)])


def round_fp8(x: Array) -> NDArray[np.float32]:
    """The nearest number that float8 holds, float32, the shape of `x`."""
    return from_fp8(to_fp8(x))

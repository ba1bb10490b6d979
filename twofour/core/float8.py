"""float8 e4m3fn: 4 bits of exponent, 3 of significand, no infinities; and how numbers become it.

numpy has no such type: an array of it is its bits, uint8.

Source: Micikevicius et al. 2022, arXiv:2209.05433, "FP8 formats for deep learning".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
_HALVES = (_VALUES[: _NAN - 1] + _VALUES[1:_NAN]) / 2


def to_fp8(x: Array) -> NDArray[np.uint8]:
    """The nearest float8, ties to even; beyond LARGEST that; NaN stays NaN.

    Args:
        x: float32, any shape.

    Returns:
        uint8 bits, the shape of `x`.
    """
    x = np.asarray(x, np.float32)
    size = np.abs(x)
    code = np.searchsorted(_HALVES, size)
    tie = size == _HALVES[np.minimum(code, _HALVES.size - 1)]
    code = code + (tie & (code % 2 == 1))
    code = np.where(np.isnan(x), _NAN, code)
    return (code + np.where(np.signbit(x), _SIGN, 0)).astype(np.uint8)


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

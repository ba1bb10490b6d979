"""The definition of an activation whose result becomes a byte at once: 16-bit integers and a table.

A gate is f(x) = x * g(x) with g(x) + g(-x) = 1: gelu, silu. So

    f(x) = max(x, 0) - T(|x|),  T(a) = a - f(a)

and T, which rises from 0 and falls to 0 again, is all that needs a table: SEGMENTS straight lines
on equal pieces of 0 to REACH. In units of y_scale / 2**bits,

    X = saturate_int16(round_half_even(v)),  a = min(|X|, limit),  n = (a * index) >> 16
    t = base[n] + ((a * slope[n] + 2**14) >> 15)
    y = saturate_uint8(((max(X, 0) + t + 2**(bits - 1)) >> bits) + zero_point)

A quantized residual that is added behind the activation is made units as well:

    s = saturate_int16(max(X, 0) + t + 2**bits * zero_point)
    s = saturate_int16(s + (((r - r_zero) * 2**7 * r_factor + 2**14) >> 15))
    y = saturate_uint8((s + 2**(bits - 1)) >> bits),    r_factor = round(2**(bits + 8) * r_scale)

There `bits` is at most 6, so that f(v) may be twice the range of a byte before s saturates, and
such that r_factor fits 16 bits; r adds no more than 1 / 2**bits steps to the error.

`bits` is the most, up to 7, with which REACH fits 16 bits: X then covers more than the 256 steps
of a byte, so its saturation is that of y, and what lies beyond REACH becomes what REACH becomes.
Before the last rounding, y is off the exact f(v) by at most

    ERROR / y_scale + 1.75 / 2**bits    steps

with ERROR 2.0e-4 for gelu and gelu_tanh, 7.5e-4 for silu. Where y_scale is 0.02, a byte spans 5,
and that is 0.024 and 0.065 steps. A y_scale below REACH / 1024 would leave fewer than 5 bits: there
is no table then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.functions import PLAIN

Array = NDArray[Any]

SEGMENTS = 64
REACH = {"Gelu": 3.9, "GeluTanh": 3.9, "Silu": 9.5}
"""The gates, and from where on T is as small as its error."""
_MOST, _MOST_BITS, _FEWEST_BITS = 2**15 - 1, 7, 5
R_BITS = 7
"""By which a residual is shifted before it is multiplied."""


@dataclass(frozen=True)
class Gate:
    """The table of a gate for one scale of its result.

    Attributes:
        bits: of a unit: it is y_scale / 2**bits.
        step: a unit, float64.
        limit: REACH in units, below 2**15.
        index: below 2**16; the line of `a` is (a * index) >> 16.
        base: int16 [SEGMENTS], minus T at 0 of each line, in units.
        slope: int16 [SEGMENTS], minus the slope of each line, times 2**15.
        r_factor: of a residual that is added behind the activation, below 2**15; 0 without one.
        r_zero: zero point of that residual as stored.
    """

    bits: int
    step: float
    limit: int
    index: int
    base: Array
    slope: Array
    r_factor: int = 0
    r_zero: int = 0

    @staticmethod
    def of(name: str, y_scale: float, r_scale: float = 0.0, r_zero: int = 0) -> Gate | None:
        """The table of an activation.

        Each line goes through T where the two zeros of a Chebyshev polynomial lie in its piece,
        which is near the best line for so short a piece.

        Args:
            name: of the activation.
            y_scale: of its result, > 0.
            r_scale: of a residual that is added behind it, divided by y_scale; 0 without one.
            r_zero: zero point of that residual as stored.

        Returns:
            None where it is no gate, or y_scale too small, or r_scale too large, for 16 bits.
        """
        if name not in REACH:
            return None
        bits = min(_MOST_BITS, math.floor(math.log2(_MOST * y_scale / REACH[name])))
        if r_scale:
            highest = math.floor(math.log2(_MOST / r_scale)) - R_BITS - 1
            bits = min(bits, _MOST_BITS - 1, highest)
        if bits < _FEWEST_BITS:
            return None
        step = y_scale / 2**bits
        limit = int(REACH[name] / step)
        index = min(2**16 - 1, SEGMENTS * 2**16 // (limit + 1))
        first = np.arange(SEGMENTS) * (2**16 / index)
        last = np.maximum(np.minimum(first + 2**16 / index, limit), first + 1)
        middle, aside = (first + last) / 2, (last - first) / math.sqrt(8)
        low, high = (_table(name, (middle + d) * step) / step for d in (-aside, aside))
        slope = np.rint((low - high) / (2 * aside) * 2**15)
        base = np.rint((low + high) / -2 - slope * middle / 2**15)
        factor = round(2 ** (bits + R_BITS + 1) * r_scale)
        table = base.astype(np.int16), slope.astype(np.int16)
        return Gate(bits, step, limit, index, *table, factor, r_zero)

    def apply(self, values: Array, zero_point: int, residual: Array | None = None) -> Array:
        """The activation, as bytes.

        Args:
            values: float32, any shape: real numbers divided by `step`.
            zero_point: of the result, as stored: 0 to 255.
            residual: uint8, the shape of `values`, to be added behind it; None for none.

        Returns:
            uint8, the shape of `values`; NaN counts as the smallest float.
        """
        whole = np.where(np.isnan(values), -np.inf, np.rint(values))
        x = np.clip(whole, -(2**15), _MOST).astype(np.int32)
        a = np.minimum(np.abs(x), self.limit)
        n = (a * self.index) >> 16
        t = self.base[n] + ((a * self.slope[n].astype(np.int32) + 2**14) >> 15)
        total = np.maximum(x, 0) + t + (zero_point << self.bits)
        if residual is not None:
            r = (residual.astype(np.int32) - self.r_zero) << R_BITS
            r = (r * self.r_factor + 2**14) >> 15
            total = np.clip(np.clip(total, -(2**15), _MOST) + r, -(2**15), _MOST)
        y = (total + 2 ** (self.bits - 1)) >> self.bits
        return np.asarray(np.clip(y, 0, 255), np.uint8)


def _table(name: str, a: Array) -> Array:
    """T(a), float64."""
    return np.asarray(a - PLAIN[name](a.astype(np.float32)), np.float64)

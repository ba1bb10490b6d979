"""The fused multiply-add, for CPUs and libraries without one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def fma(a: Array, b: Array, c: Array) -> Array:
    """A * b + c, rounded to float32 once; all float32, broadcast.

    The product is exact in float64. Its sum with c is rounded to odd there: of two neighbours that
    an inexact sum lies between, the one with an odd last bit. What float64 has to spare then holds
    enough for the rounding to float32 to come out as if the sum were exact.

    Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved
    algorithms using rounding to odd".
    """
    addend = np.asarray(c, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        total = np.asarray(product + addend)
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.view(np.int64)
        away = (error > 0) == (total > 0)
        uneven = (error != 0) & np.isfinite(error) & (bits % 2 == 0)
        bits = bits + np.where(uneven, np.where(away, 1, -1), 0)
        return bits.view(np.float64).astype(np.float32)

"""How float32 values become bytes, as functions that kernels of Triton call."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

FLOAT8_HIGH = tl.constexpr(448.0)
"""The largest float8e4m3fn."""
MIDDLE = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to |v| < 2**22 and taken away again it rounds v half to even."""


@triton.jit
def round_even(v):
    """The nearest whole number, of two the even one; |v| < 2**22."""
    return (v + MIDDLE) - MIDDLE


@triton.jit
def narrow(v, TYPE: tl.constexpr, ZERO: tl.constexpr):
    """Results in units of their scale, as the type that they are stored in.

    Args:
        v: float32, divided by the scale.
        TYPE: tl.int8 or tl.float8e4nv, which saturate; else v is rounded to it.
        ZERO: zero point of int8.
    """
    if TYPE == tl.int8:
        limited = tl.minimum(tl.maximum(v, -128.0 - ZERO), 127.0 - ZERO)
        return (round_even(limited) + ZERO).to(tl.int8)
    elif TYPE == tl.float8e4nv:
        return tl.minimum(tl.maximum(v, -FLOAT8_HIGH), FLOAT8_HIGH).to(tl.float8e4nv)
    else:
        return v.to(TYPE)

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
        return ((limited + MIDDLE) + ZERO).to(tl.int32, bitcast=True).to(tl.int8)
    elif TYPE == tl.float8e4nv:
        return tl.minimum(tl.maximum(v, -FLOAT8_HIGH), FLOAT8_HIGH).to(tl.float8e4nv)
    else:
        return v.to(TYPE)


@triton.jit
def saturated(share, span, first):
    """Bytes at a share of the way between two bounds, which bound them.

    Args:
        share: float32, bounded by 0 and 1 here.
        span: between the bounds, a whole number.
        first: the lower bound and MIDDLE; so the sum is whole, and its last byte is the result.
    """
    whole = tl.minimum(tl.maximum(share, 0.0), 1.0) * span + first
    return whole.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def scaled(v, FACTOR: tl.constexpr, TYPE: tl.constexpr, ZERO: tl.constexpr):
    """Results times FACTOR, as the type that they are stored in.

    Bytes are bounded by a multiply-add that saturates between 0 and 1 and rounded by another one,
    whose result is whole and has them in its last bits. So what is halfway between two of them
    becomes either: where that is common, as in averages of bytes, take `narrow`.

    Args:
        v: float32.
        FACTOR: 1 / scale.
        TYPE: tl.int8 or tl.float8e4nv, which saturate; else v is rounded to it.
        ZERO: zero point of int8.
    """
    if TYPE == tl.int8:
        share = v * (FACTOR / 255.0) + (ZERO + 128.0) / 255.0
        return saturated(share, 255.0, MIDDLE - 128.0)
    else:
        return narrow(v * FACTOR, TYPE, ZERO)

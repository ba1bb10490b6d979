"""One block of keys in attention, as functions that kernels of Triton call.

    s     = q k^T * SCALE + bias          in units of log2
    top'  = max(top, max s)
    p     = 2**(s - top')
    total = total * 2**(top - top') + sum p
    sums  = sums  * 2**(top - top') + p v

So no row of scores is ever whole, and memory does not grow with the length. Where no key was seen
yet, top is -inf: exponents are then taken from 0, which gives zeros.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest float32: a mask that is merely very small hides nothing by itself."""
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def load_rows(
    base,
    rows,
    channels,
    TOKEN: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A tile [rows, BLOCK] of a head; zeros beyond LENGTH rows (where EDGE) and WIDTH channels.

    Base is the address of the head's first channel of the first token, rows are the tokens,
    channels 0 ... BLOCK - 1.
    """
    places = base + rows[:, None] * TOKEN + channels[None, :]
    if EDGE:
        there = (rows[:, None] < LENGTH) & (channels[None, :] < WIDTH)
        return tl.load(places, mask=there, other=0.0)
    elif WIDTH == BLOCK:
        return tl.load(places)
    else:
        return tl.load(places, mask=channels[None, :] < WIDTH, other=0.0)


@triton.jit
def log2_mask(raw):
    """A mask in units of log2; -inf stays, the lowest float stays finite."""
    return tl.where(raw == NOTHING, raw, tl.maximum(raw * LOG2_E, LOWEST))


@triton.jit
def attend(
    state,
    q,
    k,
    v,
    bias,
    seen,
    SCALE: tl.constexpr,
    Q_ZERO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds a block of keys to a tile of queries.

    Args:
        state: (sums float32 [M, DV], totals float32 [M], tops float32 [M]).
        q: [M, D].
        k: [N, D].
        v: [N, DV].
        bias: float32, broadcastable to [M, N], in units of log2; or None.
        seen: bool, broadcastable to [M, N]; or None, where all keys are.
        SCALE: of the scores, > 0, in units of log2.
        Q_ZERO: zero point of q.
        PRECISION: of products of float32.

    Returns:
        The state after it.
    """
    sums, total, top = state
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if Q_ZERO != 0:
        s -= Q_ZERO * tl.sum(k.to(s.dtype), axis=1)[None, :]
    s = s.to(tl.float32)
    if bias is not None:
        s = s * SCALE + bias
    if seen is not None:
        s = tl.where(seen, s, NOTHING)
    if bias is None:
        high = tl.maximum(top, tl.max(s, axis=1) * SCALE)
        start = tl.where(high == NOTHING, 0.0, high)
        p = tl.exp2(s * SCALE - start[:, None])
    else:
        high = tl.maximum(top, tl.max(s, axis=1))
        start = tl.where(high == NOTHING, 0.0, high)
        p = tl.exp2(s - start[:, None])
    fade = tl.exp2(top - start)
    total = total * fade + tl.sum(p, axis=1)
    kind: tl.constexpr = tl.float16 if v.dtype.primitive_bitwidth == 8 else v.dtype
    sums = tl.dot(p.to(kind), v.to(kind), sums * fade[:, None], input_precision=PRECISION)
    return sums, total, high


@triton.jit
def shares(sums, total, FACTOR: tl.constexpr):
    """What attention gives: the sums divided by the totals, times FACTOR; zeros of no keys."""
    return sums * (FACTOR / tl.where(total == 0.0, 1.0, total))[:, None]

"""The definition of attention: softmax(q k^T * scale + mask) v, in float32 and in int8.

The int8 form holds the exponentials as bytes, in steps of 1/255 of the row's highest, and rounds
nothing else in between, so both products are sums of bytes times bytes:

    t = sum over d of (q - q_zero) * k                               exact, int32
    s = fma(float(t), score_scale * log2(e) * 1024, mask_steps)      1024 to a factor of 2
    e8 = exponential_bytes(s)                                        255 * 2**((s - max s) / 1024)
    y = requantize(sum over keys of e8 * v, exact)                   scale v / (y sum of e8)

The shares e8 / sum(e8) of a query add up to 1. Those of a softmax that QuantizeLinear rounds to
multiples of 1/255 do not: over K keys a share is 1/K as a rule, so it takes few of the 255 steps,
and below 1/510 it is lost, which over 512 even keys all are. Here a row always takes all the steps:
with m <= 1 the highest share, one is m / 255, and a share is lost below m / 510. So what is lost is
never more, and the rounding is 1 / m times finer. Over 512 normally distributed scores the results'
error is 0.0008 instead of 0.11 of v's deviation, over 4096 it is 0.0004 instead of 0.45
(tests/core/test_attention.py).

A masked key is one whose mask is -inf, or, if causal, one after the query's own position. A query
that has no other keys gets zeros: no key is attended to. A mask that is merely very small, down to
the lowest float, ranks below the others: a query that has only such keys attends to all of them
alike in float32, where the mask swallows the scores, and by their scores in int8.

Source: Vaswani et al. 2017, arXiv:1706.03762; ONNX Attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.approximations import LOG2_E
from twofour.core.fma import fma
from twofour.core.functions import exp
from twofour.core.norm import row_sum
from twofour.core.numerics import Epilogue, requantize

Array = NDArray[Any]

OCTAVE = 1024
"""Steps of a score for a factor of 2."""
MIDDLE = 12582912.0
"""1.5 * 2**23, what is added to a score: the sum is rounded to whole steps, and floats from 2**23
to 2**24, read as integers, are as far apart as they are as numbers. 2**22 steps on both sides, as
many as a factor of 2**4096, have room; beyond, the distance of scores counts half or double."""
MASK_STEPS = 2.0**21
"""The range of a mask, on both sides, in steps."""
AHEAD = 7 * OCTAVE
"""What is added to the highest score, so that all shifts of an exponential are by 7 or more."""
FARTHEST = 16 * OCTAVE - 1
"""The largest distance from it: less than half a step of the highest exponential is left."""
HALVING = (65167, 43478, 11008)
"""A minimax fit of 255 * 2**(8 - f) = a - f (b - f c), 0 <= f < 1: relative error 1.75e-3.

By least squares whose weights grow where the error is largest (Lawson), then all whole numbers
nearby, each computed as `exponential_bytes` does for its fractions."""
LOWEST = np.finfo(np.float32).min
"""What a row's maximum begins with: it is finite, so that a row of -inf alone gives no NaN."""


@dataclass(frozen=True)
class AttentionScales:
    """Scales and zero points of an int8 attention; zero points as stored (int8 plus 128).

    k and v are symmetric: their zero point, as stored, is 128.

    Attributes:
        score: q_scale * k_scale * the factor of the scores (1 / sqrt(d) as a rule).
        q_zero: zero point of q.
        v: scale of v.
        y: scale of y; 1 where y is float32.
        y_zero: zero point of y; None where y is float32.
    """

    score: float
    q_zero: int = 128
    v: float = 1.0
    y: float = 1.0
    y_zero: int | None = None

    @property
    def score_log2(self) -> np.float32:
        """From sums to exponents of 2."""
        return np.float32(np.float64(self.score) * LOG2_E)

    @property
    def out(self) -> np.float32:
        """From the sums of exponentials * v to y, before the division by the exponentials' sum.

        At most 2**23, so that results stay below 2**31: |v| is at most 128 steps.
        """
        return np.float32(min(np.float64(self.v) / self.y, 2.0**23))


def masked(scores: Array, mask: Array | None, causal: bool) -> Array:
    """Adds the mask; keys after the query's own position become -inf if causal.

    Args:
        scores: float32 [..., Q, K].
        mask: float32, broadcastable to `scores`, without NaN and +inf; or None.
        causal: whether query i sees the keys 0 ... i only.
    """
    if mask is not None:
        scores = scores + mask.astype(np.float32)
    if causal:
        query, key = np.ogrid[: scores.shape[-2], : scores.shape[-1]]
        scores = np.where(key <= query, scores, np.float32(-np.inf))
    return scores


def mask_steps(mask: Array) -> Array:
    """What is added to the scores of int8: the mask in steps, within `MASK_STEPS`, plus `MIDDLE`.

    Args:
        mask: float32, without NaN and +inf; -inf stays.
    """
    mask = mask.astype(np.float32)
    with np.errstate(over="ignore"):
        scaled = np.clip(mask * np.float32(LOG2_E * OCTAVE), -MASK_STEPS, MASK_STEPS)
    return np.where(mask == -np.inf, mask, scaled + np.float32(MIDDLE))


def exponentials(scores: Array) -> tuple[Array, Array]:
    """Returns p = exp(s - max s) along the last axis and what to divide it by, max(1, row_sum(p)).

    The maximum's own term is 1, so the sum is below 1 only where every key is masked; there the
    result of the division is 0.

    Args:
        scores: float32 [..., K].

    Returns:
        float32 [..., K] and [..., 1].
    """
    top = np.maximum(scores.max(axis=-1, keepdims=True), LOWEST)
    p = exp(scores - top)
    return p, np.maximum(row_sum(p), np.float32(1))


def softmax(x: Array) -> Array:
    """Normalises: y = exp(x - max x) * (1 / row_sum), zeros where a whole row is -inf.

    Args:
        x: float32 [..., K].

    Returns:
        float32, the shape of `x`.

    Source: ONNX Softmax.
    """
    p, total = exponentials(x)
    return np.asarray(p * (np.float32(1) / total))


def attention(
    q: Array, k: Array, v: Array, scale: float, mask: Array | None = None, causal: bool = False
) -> Array:
    """softmax(q k^T * scale + mask) v in float32; kernels may add and round in another order.

    Args:
        q: float32 [batch, heads, Q, D].
        k: float32 [batch, kv_heads, K, D]; head h uses h * kv_heads // heads.
        v: float32 [batch, kv_heads, K, DV].
        scale: of the scores.
        mask: float32, broadcastable to [batch, heads, Q, K], or None.
        causal: see `masked`.

    Returns:
        float32 [batch, heads, Q, DV].
    """
    k, v = (_for_each_head(x, q.shape[1]) for x in (k, v))
    scores = (q @ k.swapaxes(-1, -2)) * np.float32(scale)
    p, total = exponentials(masked(scores, mask, causal))
    return np.asarray((p @ v) * (np.float32(1) / total))


def attention_int8(
    q: Array,
    k: Array,
    v: Array,
    scales: AttentionScales,
    mask: Array | None = None,
    causal: bool = False,
) -> Array:
    """Attention on bytes, as the head of this file says; every kernel equals it bit for bit.

    Args:
        q: uint8 [batch, heads, Q, D], as stored.
        k: uint8 [batch, kv_heads, K, D], as stored; head h uses h * kv_heads // heads.
        v: uint8 [batch, kv_heads, K, DV], as stored.
        scales: scales and zero points.
        mask: float32, broadcastable to [batch, heads, Q, K], or None.
        causal: see `masked`.

    Returns:
        [batch, heads, Q, DV]; uint8 as stored, or float32 where `scales.y_zero` is None.
    """
    k, v = (_for_each_head(x, q.shape[1]) for x in (k, v))
    # float64 holds every partial sum exactly.
    t = (q.astype(np.float64) - scales.q_zero) @ (k.astype(np.float64) - 128).swapaxes(-1, -2)
    steps = np.asarray(scales.score_log2 * np.float32(OCTAVE))
    added = mask_steps(np.zeros(1) if mask is None else mask)
    scores = masked(fma(t.astype(np.float32), steps, added), None, causal)
    e8 = exponential_bytes(scores)
    sums = e8.astype(np.float64) @ (v.astype(np.float64) - 128)
    shares = scales.out / np.maximum(e8.sum(-1, keepdims=True), 1).astype(np.float32)
    none = np.zeros(1, np.float32)
    epilogue = Epilogue(shares, none, zero_point=scales.y_zero, unsigned=True)
    return requantize(sums.astype(np.int32), epilogue)


def exponential_bytes(scores: Array) -> Array:
    """round(255 * 2**((s - max s) / OCTAVE)), computed in 16 bits; zeros where no key is seen.

        x = bits(max s) + AHEAD - bits(s)                       floats, read as integers
        f = (x % OCTAVE) * 65536 / OCTAVE                       in 1/65536
        value = a - high(f * (b - high(f * c)))                 high(i) = i >> 16
        e8 = min(((value >> (x // OCTAVE)) + 1) >> 1, 255)      0 from x // OCTAVE = 16 on

    Args:
        scores: float32 [..., K], in steps, plus `MIDDLE`. Those below 0 are not seen.

    Returns:
        int32 [..., K], 0 ... 255; the maximum is 255. Apart from the exact one by half a step and,
        relatively, by the error of `HALVING` and half a step of the score: 1.75e-3 + 3.4e-4.
    """
    bits = scores.view(np.int32).astype(np.int64)
    x = np.maximum(bits.max(-1, keepdims=True), 0) + AHEAD - bits
    x = np.minimum(x & 0xFFFFFFFF, FARTHEST).astype(np.int64)
    fraction = (x % OCTAVE) * (65536 // OCTAVE)
    a, b, c = HALVING
    value = a - (fraction * (b - (fraction * c >> 16)) >> 16)
    return np.asarray(np.minimum(((value >> x // OCTAVE) + 1) >> 1, 255).astype(np.int32))


def _for_each_head(x: Array, heads: int) -> Array:
    """[batch, kv_heads, ...] to [batch, heads, ...]: neighbouring heads share one."""
    return np.repeat(x, heads // x.shape[1], axis=1)

"""The definition of attention: softmax(q k^T * scale + mask) v, in float32 and in int8.

The int8 form quantizes the probabilities and nothing else in between, so both products are sums of
bytes times bytes:

    t = sum over d of (q - q_zero) * k                               exact, int32
    s = float(t) * (score_scale * log2(e)) + mask_log2(mask)
    p = powers(s - max over keys of s)                               2**x, see there
    p8 = saturate(round(p * ((1 / p_scale) / row_sum(p))))           0 ... 255 - p_zero
    y = requantize(sum over keys of p8 * v, exact)

The keys are padded to a multiple of 16 with s = -inf. A masked key is one whose mask is -inf, or,
if causal, one after the query's own position. A query that has no other keys gets zeros: no key is
attended to. A mask that is merely very small, down to the lowest float, ranks below the others: a
query that has only such keys attends to all of them alike.

Source: Vaswani et al. 2017, arXiv:1706.03762; ONNX Attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.approximations import LOG2_E
from twofour.core.functions import exp
from twofour.core.norm import LANES, row_sum
from twofour.core.numerics import Epilogue, requantize

Array = NDArray[Any]

POWERS = (1.0, 0.693282939, 0.242210967, 0.0550088904)
"""A minimax fit of 2**f = 1 + f q(f), |f| <= 1/2: relative error 1.1e-4, a step is 1/255."""
POWERS_LOW = -125.0
"""Smallest exponent: with a factor of 0.7 before it the result is still a normal number."""
ROUND = 12582912.0
"""1.5 * 2**23: added to |v| < 2**22 it rounds half to even, and the low bits hold the integer."""
LOWEST = np.finfo(np.float32).min
"""What a row's maximum begins with: it is finite, so that a row of -inf alone gives no NaN."""


@dataclass(frozen=True)
class AttentionScales:
    """Scales and zero points of an int8 attention; zero points as stored (int8 plus 128).

    k and v are symmetric: their zero point, as stored, is 128.

    Attributes:
        score: q_scale * k_scale * the factor of the scores (1 / sqrt(d) as a rule).
        q_zero: zero point of q.
        p: scale of the probabilities.
        p_zero: zero point of the probabilities; they are at most 255 - p_zero steps.
        v: scale of v.
        y: scale of y; 1 where y is float32.
        y_zero: zero point of y; None where y is float32.
    """

    score: float
    q_zero: int = 128
    p: float = 1.0
    p_zero: int = 0
    v: float = 1.0
    y: float = 1.0
    y_zero: int | None = None

    @property
    def score_log2(self) -> np.float32:
        """From sums to exponents of 2."""
        return np.float32(np.float64(self.score) * LOG2_E)

    @property
    def inverse_p(self) -> np.float32:
        """1 / p, what kernels multiply by."""
        return np.float32(1) / np.float32(self.p)

    @property
    def epilogue(self) -> Epilogue:
        """From the sums of p8 * v to y."""
        scale = np.float32(np.float64(self.p) * self.v / self.y)
        bias = np.zeros(1, np.float32)
        return Epilogue(scale.reshape(1), bias, zero_point=self.y_zero, unsigned=True)


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


def mask_log2(mask: Array) -> Array:
    """Mask * log2(e) in float32, at least the lowest finite number unless it is -inf."""
    mask = mask.astype(np.float32)
    with np.errstate(over="ignore"):
        scaled = np.maximum(mask * np.float32(LOG2_E), LOWEST)
    return np.where(mask == -np.inf, mask, scaled)


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


def powers(x: Array) -> Array:
    """2**x of x <= 0 in 11 operations, for results that are rounded to 8 bits.

    Args:
        x: float32, any shape; limited to POWERS_LOW from below.

    Returns:
        float32, the shape of `x`; relative error below 1.2e-4, powers(0) == 1.
    """
    x = np.where(x > np.float32(POWERS_LOW), x, np.float32(POWERS_LOW))
    shifted = x + np.float32(ROUND)
    fraction = x - (shifted - np.float32(ROUND))
    value = np.full_like(x, POWERS[-1])
    for coefficient in POWERS[-2::-1]:
        value = value * fraction + np.float32(coefficient)
    return (value.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))).view(np.float32)


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
    mask = None if mask is None else mask_log2(mask)
    steps = probability_steps(
        masked(t.astype(np.float32) * scales.score_log2, mask, causal), scales
    )
    sums = steps.astype(np.float64) @ (v.astype(np.float64) - 128)
    return requantize(sums.astype(np.int32), scales.epilogue)


def probability_steps(scores: Array, scales: AttentionScales) -> Array:
    """The quantized probabilities, without their zero point.

    Args:
        scores: float32 [..., K], exponents of 2.
        scales: of the attention.

    Returns:
        int32 [..., K], 0 ... 255 - p_zero.
    """
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, -scores.shape[-1] % LANES)]
    padded = np.pad(scores, padding, constant_values=-np.inf)
    with np.errstate(over="ignore"):
        p = powers(padded - np.maximum(padded.max(-1, keepdims=True), LOWEST))
    total = np.maximum(row_sum(p), np.float32(1))
    steps = np.minimum(p * (scales.inverse_p / total), np.float32(255 - scales.p_zero))
    return np.asarray(np.rint(steps)[..., : scores.shape[-1]].astype(np.int32))


def _for_each_head(x: Array, heads: int) -> Array:
    """[batch, kv_heads, ...] to [batch, heads, ...]: neighbouring heads share one."""
    return np.repeat(x, heads // x.shape[1], axis=1)

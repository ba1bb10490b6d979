"""The definition of attention against float64, and int8 against float32."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.core.attention import (
    AHEAD,
    FARTHEST,
    HALVING,
    LOWEST,
    MIDDLE,
    OCTAVE,
    AttentionScales,
    attention,
    attention_int8,
    exponential_bytes,
    mask_steps,
    softmax,
)
from twofour.core.numerics import dequantize, quantize


def plain(q, k, v, scale, mask=0.0):
    """In float64."""
    s = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) * scale + mask
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v.astype(np.float64)


def floats(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_exponential_bytes_are_within_their_error() -> None:
    """Every distance from the maximum."""
    x = np.arange(FARTHEST + OCTAVE)
    scores = (np.float32(MIDDLE) - x).astype(np.float32)
    exact = 255 * 2.0 ** (-x / OCTAVE)
    got = exponential_bytes(scores)
    assert got[0] == 255
    assert (np.abs(got - exact) <= 0.5 + 1.75e-3 * exact).all()
    assert (np.diff(got) <= 0).all()
    assert not got[9 * OCTAVE + 10 :].any()
    a, b, c = HALVING
    assert a < 65536
    assert a - (65535 * (b - (65535 * c >> 16)) >> 16) < 2**15, "by 15 bits it shifts to 0"
    assert AHEAD + 9 * OCTAVE - 1 == FARTHEST


def test_scores_out_of_range_keep_their_order() -> None:
    """Beyond 2**22 steps distances count half or double; below 0 a key is not seen."""
    high = np.array([2**24 + 4 * OCTAVE, 2**24, MIDDLE], np.float32)
    assert exponential_bytes(high).tolist() == [255, 64, 0]
    low = np.array([2**22 + OCTAVE, 2**22, -1, -np.inf], np.float32)
    assert exponential_bytes(low).tolist() == [255, 64, 0, 0]
    assert not exponential_bytes(np.array([-1, -1e30, -np.inf], np.float32)).any()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_float64(causal: bool) -> None:
    q, k, v = (floats(i, 2, 4, 9, 16) for i in range(3))
    mask = np.where(np.tri(9) > 0, 0, -np.inf) if causal else floats(9, 2, 1, 9, 9)
    want = plain(q, k, v, 0.3, mask)
    got = attention(q, k, v, 0.3, None if causal else mask, causal)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_neighbouring_heads_share_keys_and_values() -> None:
    q, k, v = floats(0, 1, 4, 3, 8), floats(1, 1, 2, 5, 8), floats(2, 1, 2, 5, 8)
    want = plain(q, k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]], 0.5)
    np.testing.assert_allclose(attention(q, k, v, 0.5), want, atol=1e-5)


def bound_of_int8(scores, v, y):
    """Of one row's result, from the error e of each exponential: sum of e |v - y| / their sum.

    An exponential is off by half a step and by 1.75e-3 of itself; its score by half a step of
    1/1024 octaves, by as much again for the mask, and by float32.

    Args:
        scores: exact, in octaves.
        v: exact.
        y: the exact result.
    """
    x = 255 * 2.0 ** (scores - scores.max(-1, keepdims=True))
    off = 0.5 + x * (1.75e-3 + np.log(2) / 1024 * (1 + 1e-2))
    total = np.maximum(x.sum(-1, keepdims=True) - off.sum(-1, keepdims=True), 254)
    return np.einsum(
        "...qk,...qkd->...qd", off / total, np.abs(v[..., None, :, :] - y[..., None, :])
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 90),
    st.sampled_from([8, 32, 64]),
    st.sampled_from([1e-4, 3e-4, 1e-3, 6e-3]),
    st.sampled_from(["", "biases", "causal"]),
)
def test_int8_is_near_float64(seed, keys, d, step, mask) -> None:
    """Flat and steep softmaxes, with and without masks."""
    random = np.random.default_rng(seed)
    q = random.integers(0, 256, (1, 2, keys, d), np.uint8)
    k, v = (random.integers(0, 256, (1, 2, keys, d), np.uint8) for _ in "kv")
    added = None
    if mask == "biases":
        added = random.normal(0, 3, (1, 1, keys, keys)).astype(np.float32)
        added[random.random(added.shape) < 0.3] = -np.inf
        added[..., 0] = 0
    scales = AttentionScales(step, 117, 0.025)
    real = [dequantize(x, s, z) for x, s, z in ((q, 1, 117), (k, 1, 128), (v, 0.025, 128))]
    qf, kf, vf = (x.astype(np.float64) for x in real)
    s = qf @ kf.swapaxes(-1, -2) * step
    if added is not None:
        s = s + added
    if mask == "causal":
        s = np.where(np.tri(keys) > 0, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    want = p / p.sum(-1, keepdims=True) @ vf
    got = attention_int8(q, k, v, scales, added, mask == "causal")
    bound = bound_of_int8(s / np.log(2), vf, want)
    assert (np.abs(got - want) <= bound + 1e-5 * np.abs(vf).max()).all()


@pytest.mark.parametrize(("keys", "spread"), [(512, 0.3), (512, 1), (4096, 0.3), (4096, 1)])
def test_small_shares_of_many_keys_are_kept(keys, spread) -> None:
    """Steps of the highest share lose less than the steps of 1/255 that QuantizeLinear has."""
    random = np.random.default_rng(keys)
    s = random.normal(0, spread, (64, keys))
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    v = random.normal(0.5, 1, (keys, 8))
    e8 = exponential_bytes(np.float32(np.float32(MIDDLE) + s / np.log(2) * OCTAVE))
    ours = e8 / e8.sum(-1, keepdims=True) @ v
    theirs = quantize(p, 1 / 255, 0, np.uint8) / 255 @ v
    want = p @ v
    error, other = (np.sqrt(np.mean((y - want) ** 2)) for y in (ours, theirs))
    assert error < 0.01 * np.abs(want).mean()
    assert error < other / 10


def test_the_lowest_masks_leave_the_order_of_keys() -> None:
    """In float they leave all keys alike, in int8 as different as their scores are."""
    q, k, v = (floats(i, 1, 1, 1, 8) for i in range(3))
    k, v = (np.concatenate([x, -x, 2 * x], axis=2) for x in (k, v))
    mask = np.full((1, 3), LOWEST, np.float32)
    np.testing.assert_allclose(attention(q, k, v, 0.5, mask)[0, 0], v[0, 0].mean(0)[None], 1e-5)
    lowest = mask_steps(np.array([LOWEST, -1e9, -np.inf, 0], np.float32))
    assert lowest[0] == lowest[1] == MIDDLE - 2**21
    assert lowest[2] == -np.inf
    assert lowest[3] == MIDDLE
    scores = lowest[[0, 1, 2]] + np.array([0, OCTAVE, 0], np.float32)
    assert exponential_bytes(scores).tolist() == [127, 255, 0]
    assert exponential_bytes(lowest).tolist() == [0, 0, 0, 255]


def test_exponential_bytes_of_a_row() -> None:
    scores = np.float32(MIDDLE) + np.array([0, -np.inf, -1, -2, -8, -9.1], np.float32) * OCTAVE
    assert exponential_bytes(scores).tolist() == [255, 0, 127, 64, 1, 0]


def test_all_keys_masked_gives_zeros() -> None:
    q, k, v = (floats(i, 1, 1, 2, 8) for i in range(3))
    hidden = np.array([[-np.inf, -np.inf], [0, -np.inf]], np.float32)
    y = attention(q, k, v, 0.5, hidden)
    assert (y[0, 0, 0] == 0).all()
    assert (y[0, 0, 1] == v[0, 0, 0]).all()
    stored = [np.full((1, 1, 2, 8), 200, np.uint8)] * 3
    y = attention_int8(*stored, AttentionScales(1e-3, v=0.1, y=0.1, y_zero=99), hidden)
    assert (y[0, 0, 0] == 99).all()
    assert (y[0, 0, 1] == 99 + 72).all()
    assert (softmax(np.full((1, 3), -np.inf, np.float32)) == 0).all()

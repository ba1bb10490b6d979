"""The definition of attention against float64, and int8 against float32."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.core.attention import (
    AttentionScales,
    attention,
    attention_int8,
    mask_log2,
    powers,
    probability_steps,
    softmax,
)
from twofour.core.numerics import dequantize


def plain(q, k, v, scale, mask=0.0):
    """In float64."""
    s = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) * scale + mask
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v.astype(np.float64)


def floats(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_powers_are_within_their_error() -> None:
    x = np.linspace(-124.9, 0, 200001, dtype=np.float32)
    error = np.abs(powers(x) / 2.0 ** x.astype(np.float64) - 1)
    assert error.max() < 1.2e-4
    assert powers(np.zeros(1, np.float32)) == 1
    low = powers(np.array([-125, -126, -1e30, -np.inf], np.float32))
    assert (low == low[0]).all()
    assert np.finfo(np.float32).tiny <= low[0] < 3e-38


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


def test_int8_is_near_float32() -> None:
    """Apart by half a step of each probability, times v, and half a step of y."""
    random = np.random.default_rng(0)
    q, k, v = (random.integers(0, 256, (2, 3, 20, 32), np.uint8) for _ in range(3))
    mask = random.normal(size=(2, 1, 1, 20)).astype(np.float32)
    scales = AttentionScales(0.02 * 0.03 * 0.2, 117, 1 / 255, 0, 0.025, 0.03, 120)
    real = [dequantize(x, s, z) for x, s, z in ((q, 0.02, 117), (k, 0.03, 128), (v, 0.025, 128))]
    want = plain(*real, 0.2, mask)
    got = dequantize(attention_int8(q, k, v, scales, mask), 0.03, 120)
    bound = (0.5 / 255 + 3e-4 / 20) * np.abs(real[2]).sum(-2, keepdims=True) + 0.0151
    assert (np.abs(got - want) <= bound).all()
    # Rounding of the probabilities averages out: the result as a whole is much nearer.
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.02


def test_the_lowest_masks_leave_all_keys_alike() -> None:
    """As the float reference has it: exporters mask with the lowest float instead of -inf."""
    q, k, v = (floats(i, 1, 1, 1, 8) for i in range(3))
    k, v = (np.concatenate([x, -x, 2 * x], axis=2) for x in (k, v))
    mask = np.full((1, 3), np.finfo(np.float32).min, np.float32)
    np.testing.assert_allclose(attention(q, k, v, 0.5, mask)[0, 0], v[0, 0].mean(0)[None], 1e-5)
    steps = [
        probability_steps(mask_log2(m), AttentionScales(1, p=1 / 255)) for m in (mask, mask / 9)
    ]
    assert (steps[0] == 85).all()
    assert (steps[1] == 85).all()


def test_probability_steps_saturate_and_sum_to_one() -> None:
    scores = np.array([[0, -np.inf, -1, -2]], np.float32)
    steps = probability_steps(scores, AttentionScales(1, p=1 / 255))
    exact = 2.0 ** scores[0] / (2.0 ** scores[0]).sum() * 255
    assert (np.abs(steps[0] - exact) <= 0.55).all()
    assert probability_steps(scores, AttentionScales(1, p=1e-3, p_zero=128)).max() == 127


def test_all_keys_masked_gives_zeros() -> None:
    q, k, v = (floats(i, 1, 1, 2, 8) for i in range(3))
    hidden = np.array([[-np.inf, -np.inf], [0, -np.inf]], np.float32)
    y = attention(q, k, v, 0.5, hidden)
    assert (y[0, 0, 0] == 0).all()
    assert (y[0, 0, 1] == v[0, 0, 0]).all()
    stored = [np.full((1, 1, 2, 8), 200, np.uint8)] * 3
    y = attention_int8(*stored, AttentionScales(1e-3, p=1 / 255, v=0.1, y=0.1, y_zero=99), hidden)
    assert (y[0, 0, 0] == 99).all()
    assert (y[0, 0, 1] == 99 + 72).all()
    assert (softmax(np.full((1, 3), -np.inf, np.float32)) == 0).all()

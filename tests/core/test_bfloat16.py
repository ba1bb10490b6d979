"""bfloat16 against ml_dtypes, and the properties its callers rely on."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from twofour.core.bfloat16 import ROUNDING, TINY, from_bf16, round_bf16, to_bf16


def _floats() -> np.ndarray:
    """All upper halves with lower halves around the tie, and random bits."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    near = np.concatenate([upper | np.uint32(low) for low in lower])
    some = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint64).astype(np.uint32)
    return np.concatenate([near, some]).view(np.float32)


def test_rounds_to_nearest_even_like_ml_dtypes() -> None:
    x = _floats()
    real = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        expected = real.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(to_bf16(real), expected)


def test_nan_stays_a_quiet_nan() -> None:
    x = _floats()
    held = to_bf16(x[np.isnan(x)])
    assert np.isnan(from_bf16(held)).all()
    assert (held & 0x40 != 0).all()


def test_every_bfloat16_comes_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    real = ~np.isnan(from_bf16(bits))
    np.testing.assert_array_equal(to_bf16(from_bf16(bits))[real], bits[real])


def test_the_rounding_is_within_its_bound() -> None:
    x = _floats()
    x = x[~np.isnan(x)].astype(np.float64)
    x = x[(np.abs(x) >= TINY) & (np.abs(x) < 3e38)]
    error = np.abs(round_bf16(x.astype(np.float32)) - x)
    assert (error <= ROUNDING * np.abs(x)).all()
    assert (error > 0.49 * ROUNDING * np.abs(x)).any()


def test_shapes_are_kept() -> None:
    assert to_bf16(np.zeros((2, 3), np.float32).T).shape == (3, 2)
    assert from_bf16(np.zeros((), np.uint16)).shape == ()

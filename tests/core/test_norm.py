"""Row sums and layer normalisation against float64."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.core.norm import layer_norm, row_squares, row_sum

EPS = np.finfo(np.float32).eps


@pytest.mark.parametrize("k", [1, 15, 16, 17, 384, 1000])
def test_a_row_sum_is_within_its_bound(k: int) -> None:
    x = np.random.default_rng(k).normal(0, 100, (20, k)).astype(np.float32)
    exact = x.astype(np.float64).sum(-1, keepdims=True)
    bound = (k / 16 + 4) * EPS / 2 * np.abs(x).sum(-1, keepdims=True)
    assert row_sum(x).dtype == np.float32
    assert (np.abs(row_sum(x) - exact) <= bound).all()


@pytest.mark.parametrize("k", [1, 15, 16, 17, 384, 1000])
def test_a_sum_of_squares_is_within_its_bound(k: int) -> None:
    x = np.random.default_rng(k).normal(0, 100, (20, k)).astype(np.float32)
    exact = (x.astype(np.float64) ** 2).sum(-1, keepdims=True)
    assert row_squares(x).dtype == np.float32
    assert (np.abs(row_squares(x) - exact) <= (k / 16 + 4) * EPS / 2 * exact).all()


def test_a_square_is_rounded_with_the_sum() -> None:
    x = np.zeros(32, np.float32)
    x[[0, 16]] = 1, 1 + 2.0**-12  # the square of the second has a bit that float32 has not
    assert row_squares(x)[0] == np.float32(1 + (1 + 2.0**-12) ** 2)
    x[0] = 2.0**-24
    assert row_squares(x)[0] == np.float32((1 + 2.0**-12) ** 2 + 2.0**-48)


def test_a_row_sum_has_the_order_of_the_lanes() -> None:
    """2**24 swallows a 1 that is added alone; two ones in a lane survive."""
    x = np.zeros(48, np.float32)
    x[[0, 16, 32]] = 2.0**24, 1, 1
    assert row_sum(x)[0] == 2.0**24
    x[[0, 16, 32]] = 1, 1, 2.0**24
    assert row_sum(x)[0] == 2.0**24 + 2
    x[:] = 0
    x[[0, 8, 4]] = 2.0**24, 1, 1  # lanes 0 and 8 meet first, then 4
    assert row_sum(x)[0] == 2.0**24
    x[[0, 8, 4, 12]] = 2.0**24, 0, 1, 1
    assert row_sum(x)[0] == 2.0**24 + 2


@pytest.mark.parametrize("k", [1, 15, 64, 771])
def test_layer_norm_is_near_the_exact_one(k: int) -> None:
    """Each factor is off by a few roundings; the mean's error is scaled by the deviation."""
    random = np.random.default_rng(k)
    x = random.normal(5, 2, (9, k)).astype(np.float32)
    gamma, beta = random.normal(1, 0.5, (2, k)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    want = centred / deviation * gamma + beta
    steps = k / 16 + 5
    mean_error = steps * EPS * np.abs(wide).mean(-1, keepdims=True) / deviation
    relative = 2 * (steps + 4) * EPS
    bound = np.abs(gamma) * (mean_error * 2 + relative * np.abs(centred) / deviation)
    bound += np.abs(gamma) * np.abs(centred) / deviation * mean_error**2
    assert (np.abs(layer_norm(x, gamma, beta, 1e-5) - want) <= bound + EPS * np.abs(want)).all()


def test_a_constant_row_becomes_beta() -> None:
    beta = np.arange(20, dtype=np.float32)
    # 0.5 * 20 and the quotient are exact, so that x - mean is 0.
    y = layer_norm(np.full((2, 20), 0.5, np.float32), np.ones(20, np.float32), beta, 1e-5)
    assert (y == beta).all()

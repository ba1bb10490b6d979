"""Factors between layers: what they balance, and what int8 loses with and without them."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.core.equalize import MOST, columns, damage, smoothing
from twofour.core.ranges import RangeOptions

RANDOM = np.random.default_rng(0)
MINMAX = RangeOptions("minmax")


def test_alpha_one_makes_activations_equal_and_zero_makes_columns_equal() -> None:
    a, w = np.array([1.0, 4.0, 16.0, 2.0]), np.array([1.0, 0.5, 0.25, 2.0])
    assert np.allclose(np.ptp(a / smoothing(a, w, 1.0)), 0)
    assert np.allclose(np.ptp(w * smoothing(a, w, 0.0)), 0)


def test_half_makes_both_ranges_equal_as_cross_layer_equalization() -> None:
    """Nagel 2019, eq. 11: after s = sqrt(r1 / r2), r1 / s = r2 * s, but for one common factor."""
    first, second = RANDOM.uniform(0.5, 2, 8), RANDOM.uniform(0.5, 2, 8)
    s = smoothing(first, second, 0.5)
    ratio = (first / s) / (second * s)
    assert np.allclose(ratio, ratio[0])


def test_factors_have_mean_one_and_bounds_and_dead_channels_stay() -> None:
    s = smoothing(np.array([1e-9, 1.0, 1e9, 0.0]), np.ones(4), 1.0)
    assert s[3] == 1
    assert s.max() == pytest.approx(MOST)
    assert s.min() == pytest.approx(1 / MOST)
    assert np.log(smoothing(np.array([1.0, 2, 3]), np.ones(3), 0.7)).sum() == pytest.approx(0)
    assert (smoothing(np.zeros(3), np.ones(3), 0.5) == 1).all()


def test_columns_are_shares_of_their_rows() -> None:
    weight = np.array([[[[1.0], [-4.0]], [[3.0], [0.0]]]])  # 1 group, 2 rows, 2 channels
    assert columns(weight).tolist() == [1.0, 1.0]
    assert columns(weight[:, :1]).tolist() == [0.25, 1.0]
    assert (columns(RANDOM.normal(size=(6, 1, 1, 9))) == 1).all()  # depthwise


def test_damage_is_what_rounding_does_to_the_product() -> None:
    x = RANDOM.normal(size=(4000, 32)).astype(np.float32)
    w = RANDOM.normal(size=(1, 16, 32, 1)).astype(np.float32)
    scale = np.abs(x).max() / 127
    flat = w[0, :, :, 0]
    steps = np.abs(flat).max(axis=1, keepdims=True) / 127
    rounded = (np.rint(x / scale) * scale) @ (np.rint(flat / steps) * steps).T
    true = x @ flat.T
    share = np.square(rounded - true).sum() / np.square(true).sum()
    assert damage(x, w, np.ones(32), MINMAX) == pytest.approx(share, rel=0.1)


def test_an_outlier_channel_costs_less_with_factors() -> None:
    x = RANDOM.normal(size=(1000, 32)).astype(np.float32)
    x[:, 3] *= 40
    w = RANDOM.normal(size=(1, 16, 32, 1)).astype(np.float32)
    w[:, :, 3] /= 40
    s = smoothing(np.abs(x).max(axis=0).astype(np.float64), columns(w), 0.5)
    assert damage(x, w, s, MINMAX) < damage(x, w, np.ones(32), MINMAX) / 20
    assert damage(np.zeros_like(x), w, s, MINMAX) == 0

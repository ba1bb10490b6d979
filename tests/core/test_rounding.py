"""Rounding of weights against what trying all integers gives."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from twofour.core.descent import descend, fitted
from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask
from twofour.core.patterns import Pattern, is_pattern
from twofour.core.rounding import WEIGHT_MAX, quantize_weight, round_weight, rounding_factor
from twofour.core.settle import Settler
from twofour.core.sparsegpt import factor as factor_of

Array = NDArray[Any]


def inputs(features: int, samples: int = 4000, seed: int = 0) -> Array:
    """Correlated inputs: few causes, mixed, and a little noise."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((features, max(features // 2, 1)))
    x = mixed @ random.standard_normal((mixed.shape[1], samples))
    return np.asarray(x + 0.1 * random.standard_normal(x.shape))


def weight(*shape: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cost(w: Array, w8: Array, scale: Array, hessian: Array) -> Array:
    """(w - w8 * scale) H (w - w8 * scale)^T of each row; features in the order (tap, channel)."""
    along = (-1,) + (1,) * (w.ndim - 1)
    change = w.astype(np.float64) - w8 * scale.astype(np.float64).reshape(along)
    change = np.moveaxis(change, 1, -1).reshape(len(w), -1)
    return np.einsum("nk,kl,nl->n", change, hessian, change)


def nearest(w: Array, most: int) -> tuple[Array, Array]:
    scale = (np.abs(w).reshape(len(w), -1).max(axis=1) / most).astype(np.float32)
    return np.rint(w / scale.reshape((-1,) + (1,) * (w.ndim - 1))), scale


def found_of(x: Array) -> Any:
    return rounding_factor(x @ x.T, x.shape[1])


@pytest.mark.parametrize("most", [127, 7, 1])
@pytest.mark.parametrize("shape", [(9, 32), (300, 16), (6, 4, 3, 3), (1, 1), (2, 5, 7)])
def test_outputs_change_less_than_with_the_nearest_integers(
    shape: tuple[int, ...], most: int
) -> None:
    x, w = inputs(int(np.prod(shape[1:]))), weight(*shape)
    factor = found_of(x)
    rounded = round_weight(w, factor, most)
    assert rounded.w8.dtype == np.int8
    assert rounded.w8.shape == w.shape
    assert np.abs(rounded.w8.astype(int)).max() <= most
    assert rounded.scale.dtype == np.float32
    got, plain = (
        cost(w, w8, scale, factor.hessian)
        for w8, scale in [(rounded.w8, rounded.scale), nearest(w, most)]
    )
    # Two ways to the same sums of K^2 products in float64.
    assert np.allclose(rounded.cost, got, rtol=1e-6, atol=1e-12 * plain.max())
    assert np.allclose(rounded.nearest_cost, plain, rtol=1e-6, atol=1e-12 * plain.max())
    assert (rounded.cost <= rounded.nearest_cost).all()
    if x.shape[0] > 8 and most > 1:
        assert rounded.cost_left < 0.4


def test_no_integer_alone_can_be_better() -> None:
    """Every value of each integer, all others as they are."""
    w, factor = weight(4, 10), found_of(inputs(10))
    rounded = round_weight(w, factor, 7)
    for row, i, value in itertools.product(range(4), range(10), range(-7, 8)):
        w8 = rounded.w8.copy()
        w8[row, i] = value
        moved = cost(w, w8, rounded.scale, factor.hessian)[row]
        assert moved >= rounded.cost[row] * (1 - 1e-4)


def test_integers_of_tiny_weights_against_all_there_are() -> None:
    """Of rows of four weights in -2..2 at their step, most reach the very best of 625."""
    every = np.array(list(itertools.product(range(-2, 3), repeat=4)))
    w, factor = weight(40, 4), found_of(inputs(4))
    rounded = round_weight(w, factor, 2)
    best = np.array(
        [
            min(cost(np.tile(row, (len(every), 1)), every, np.full(len(every), s), factor.hessian))
            for row, s in zip(w, rounded.scale, strict=True)
        ]
    )
    assert (rounded.cost >= best * (1 - 1e-9)).all()
    assert np.isclose(rounded.cost, best, rtol=1e-9).mean() >= 0.8
    assert rounded.cost.sum() < 1.3 * best.sum()


@pytest.mark.parametrize("most", [127, 7])
def test_inputs_that_have_nothing_in_common_leave_the_nearest_integers(most: int) -> None:
    w, variances = weight(20, 12), np.random.default_rng(5).uniform(0.1, 10, 12)
    rounded = round_weight(w, rounding_factor(np.diag(variances), 1000), most)
    assert np.array_equal(rounded.w8, np.clip(np.rint(w / rounded.scale[:, None]), -most, most))
    zeros = round_weight(w, rounding_factor(np.zeros((12, 12)), 1), most)
    assert np.array_equal(zeros.w8, np.clip(np.rint(w / zeros.scale[:, None]), -most, most))


@pytest.mark.parametrize("pattern", ["2:4", "2:4/pair", "4:8", "2:4/2d"])
@pytest.mark.parametrize("shape", [(32, 16), (32, 8, 3, 3)])
def test_the_mask_is_kept_and_what_stays_makes_up_for_it(
    pattern: str, shape: tuple[int, ...]
) -> None:
    w = weight(*shape)
    mask = magnitude_mask(w, pattern)
    w[~mask] = 0
    factor = found_of(inputs(int(np.prod(shape[1:]))))
    for most in (127, 7):
        rounded = round_weight(w, factor, most)
        assert not rounded.w8[~mask].any()
        assert is_pattern(rounded.w8, pattern)
        assert rounded.cost_left < 0.65


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from([1, 3, 7, 127]),
    st.floats(-30, 30),
    st.integers(0, 2**16),
)
def test_any_weight_keeps_zeros_and_costs_no_more(
    features: int, rows: int, most: int, power: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    w = (weight(rows, features, seed=seed) * 10.0**power).astype(np.float32)
    w[random.random(w.shape) < 0.4] = 0
    x = inputs(features, 1 + seed % 50, seed)
    x[random.random(features) < 0.2] = 0
    rounded = round_weight(w, found_of(x), most)
    assert not rounded.w8[w == 0].any()
    assert np.abs(rounded.w8.astype(int)).max() <= most
    assert (rounded.cost <= rounded.nearest_cost).all()
    assert np.isfinite(rounded.scale).all()
    assert (rounded.scale > 0).all()
    assert (rounded.scale[~w.any(axis=1)] == 1).all()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_tiny_and_huge_weights(size: float) -> None:
    w = (weight(4, 16).clip(-1, 1) * size).astype(np.float32)
    rounded = round_weight(w, found_of(inputs(16)))
    assert np.isfinite(rounded.scale).all()
    off = np.abs(w - rounded.w8 * rounded.scale.astype(np.float64)[:, None])
    # No integer is moved by more than some steps.
    assert off.max() <= 8 * max(rounded.scale.max(), 2.0**-120)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_size_of_inputs_does_not_matter(size: float) -> None:
    x, w = inputs(16), weight(8, 16)
    rounded, same = round_weight(w, found_of(x)), round_weight(w, found_of(x * size))
    assert np.allclose(rounded.scale, same.scale, rtol=1e-6)
    assert (rounded.w8 == same.w8).mean() > 0.95


def test_weights_of_dead_inputs_are_rounded_to_the_nearest_and_not_clipped() -> None:
    x, w = inputs(16), weight(8, 16)
    x[[2, 7]] = 0
    w[:, 2] = 5  # the largest of each row
    rounded = round_weight(w, found_of(x))
    restored = rounded.w8 * rounded.scale[:, None]
    assert np.abs(restored[:, [2, 7]] - w[:, [2, 7]]).max() <= 0.51 * rounded.scale.max()


def test_few_samples_damp_more() -> None:
    x = inputs(64, samples=16)
    assert rounding_factor(x @ x.T, 16).damping == 4
    assert rounding_factor(x @ x.T, 10**9).damping == 1e-3
    test, w = inputs(64, samples=4000)[:, 2000:], weight(32, 64)
    few = inputs(64, samples=4000)[:, :16]
    rounded, (w8, scale) = round_weight(w, found_of(few)), quantize_weight(w)
    kept = cost(w, rounded.w8, rounded.scale, test @ test.T).sum()
    assert kept < cost(w, w8, scale, test @ test.T).sum()


def test_features_in_any_order_are_settled_by_the_size_of_their_inputs() -> None:
    x, w = inputs(12) * np.arange(1, 13)[:, None], weight(6, 12)
    order = np.random.default_rng(2).permutation(12)
    rounded, moved = (
        round_weight(w, found_of(x), 7),
        round_weight(w[:, order], found_of(x[order]), 7),
    )
    # Coordinates are then visited in another order, which decides between close ones only.
    assert (rounded.w8[:, order] == moved.w8).mean() > 0.9
    found = found_of(x[order])
    assert (np.diff(found.hessian.diagonal()[found.order]) <= 0).all()
    inverse = found.upper.T @ found.upper
    hessian = found.hessian[np.ix_(found.order, found.order)]
    assert np.allclose(inverse @ hessian, np.eye(12), atol=1e-9)


def test_descent_ends_where_the_best_is_a_draw() -> None:
    q = np.zeros((2, 1))
    b = np.eye(2) @ np.array([[0.5], [-0.5]])
    descend(np.eye(2), b, q, np.ones(1), np.ones((2, 1), np.bool_), 127)
    assert not q.any()


def test_the_best_scale_is_fitted() -> None:
    w, hessian = weight(3, 8).astype(np.float64).T, found_of(inputs(8)).hessian
    q = np.rint(w / 0.3)
    best = fitted(hessian, hessian @ w, q, np.full(3, 0.3))

    def total(step: Array) -> Array:
        change = w - q * step
        return np.einsum("kn,kl,ln->n", change, hessian, change)

    for factor in (0.999, 1.001):
        assert (total(best * factor) > total(best)).all()
    assert (fitted(hessian, hessian @ w, np.zeros((8, 3)), best) == best).all()


def test_the_cost_of_settled_columns_is_that_of_the_change() -> None:
    w, found = weight(5, 24).T.astype(np.float64), factor_of(inputs(24) @ inputs(24).T)
    step = np.full(5, 0.1)
    settler = Settler(found.upper, w.copy(), 8, w != 0, step, 127)
    settler.run(16)
    change = w - settler.w
    assert np.allclose(settler.cost, np.einsum("kn,kl,ln->n", change, found.hessian, change))
    assert np.allclose(np.rint(settler.w / step) * step, settler.w)


def test_pruned_and_rounded_in_one_pass() -> None:
    w, found = weight(32, 24).T.astype(np.float64), factor_of(inputs(24) @ inputs(24).T)
    step = np.abs(w).max(axis=0) / WEIGHT_MAX
    settler = Settler(found.upper, w.copy(), Pattern.parse("2:4"), None, step, WEIGHT_MAX)
    settler.run(24)
    assert is_pattern(settler.w.T, "2:4")
    assert np.allclose(np.rint(settler.w / step) * step, settler.w)


def test_bad_input_is_refused() -> None:
    found = found_of(inputs(8))
    with pytest.raises(InputError, match="expected 9 features"):
        round_weight(weight(4, 9), found)
    w = weight(4, 8)
    w[1, 2] = np.nan
    with pytest.raises(InputError, match="1 values are NaN"):
        round_weight(w, found)
    with pytest.raises(InputError, match="at least 1 row"):
        rounding_factor(np.eye(4), 0)
    with pytest.raises(InputError, match="expected \\[K, K\\]"):
        rounding_factor(np.ones((4, 3)), 10)

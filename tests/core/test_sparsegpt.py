"""SparseGPT against the formulas of the paper, spelled out with explicit inverses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask
from twofour.core.patterns import is_pattern
from twofour.core.sparsegpt import factor, sparsegpt

Array = NDArray[Any]
DAMPING = 0.01


def inputs(features: int, samples: int = 400, seed: int = 0, rank: int | None = None) -> Array:
    """Correlated inputs: few causes, mixed, and a little noise."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((features, rank or features // 2))
    x = mixed @ random.standard_normal((mixed.shape[1], samples))
    return np.asarray(x + 0.1 * random.standard_normal(x.shape))


def weight(*shape: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cost(w: Array, new: Array, x: Array) -> float:
    """||(w - w') X||^2; features in the order (tap, channel)."""
    change = np.moveaxis(w.astype(np.float64) - new, 1, -1).reshape(len(w), -1)
    return float(np.square(change @ x).sum())


def reference(w: Array, gram: Array, n: int, m: int) -> tuple[Array, Array]:
    """Section 3.2 of the paper: H of the features that are left is inverted anew at every step.

    For each row alone: dropping feature p changes the features i behind it by
    -w_p / [H^-1]_pp * [H^-1]_pi, and costs w_p^2 / [H^-1]_pp.
    """
    size = len(gram)
    hessian = gram + DAMPING * gram.diagonal().mean() * np.eye(size)
    inverses = [np.linalg.inv(hessian[i:, i:]) for i in range(size)]
    new, kept = w.astype(np.float64).copy(), np.zeros(w.shape, np.bool_)
    for row, mask in zip(new, kept, strict=True):
        for low in range(0, size, m):
            costs = [row[i] ** 2 / inverses[i][0, 0] for i in range(low, low + m)]
            mask[low + np.argsort(costs)[m - n :]] = True
            for i in (i for i in range(low, low + m) if not mask[i]):
                row[i:] -= row[i] / inverses[i][0, 0] * inverses[i][0]
                row[i] = 0
    return new, kept


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (2, 3)])
@pytest.mark.parametrize("block", [1, 8, 24, 128])
def test_it_is_what_the_paper_says(n: int, m: int, block: int) -> None:
    x, w = inputs(48), weight(5, 48)
    expected, kept = reference(w, x @ x.T, n, m)
    new, mask = sparsegpt(w, x @ x.T, f"{n}:{m}", block=block, fit=False)
    assert np.array_equal(mask, kept)
    assert new.dtype == np.float32
    # Two ways to the same numbers, in float64, then rounded: 2^-24 of each.
    assert np.allclose(new, expected, rtol=2**-23, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:4/pair", "2:4/2d"])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_change_less_than_by_magnitude_and_by_wanda(pattern: str, seed: int) -> None:
    x, w = inputs(64, seed=seed), weight(64, 64, seed=seed + 10)
    by_magnitude = np.where(magnitude_mask(w, pattern), w, 0)
    by_wanda = np.where(magnitude_mask(w * np.linalg.norm(x, axis=1), pattern), w, 0)
    new, mask = sparsegpt(w, x @ x.T, pattern)
    assert is_pattern(new, pattern)
    assert not new[~mask].any()
    assert cost(w, new, x) < 0.5 * cost(w, by_wanda, x)
    assert cost(w, new, x) < 0.5 * cost(w, by_magnitude, x)


def test_what_stays_is_the_best_that_its_mask_allows() -> None:
    """Row by row the least squares, solved exactly."""
    x, w = inputs(40, seed=3), weight(12, 40)
    found = factor(x @ x.T)
    new, mask = sparsegpt(w, found, "2:4")
    plain, same = sparsegpt(w, found, "2:4", fit=False)
    assert np.array_equal(mask, same)

    def error(values: Array, rows: slice = slice(None)) -> float:
        change = (values - w.astype(np.float64))[rows]
        return float(np.vdot(change @ found.hessian, change))

    best = np.zeros(w.shape)
    for row, kept, old in zip(best, mask, w.astype(np.float64), strict=True):
        system = found.hessian[np.ix_(kept, kept)]
        row[kept] = np.linalg.solve(system, found.hessian[kept] @ old)
    assert error(best) <= error(new) < 1.001 * error(best)
    assert error(new) < 0.8 * error(plain)
    for row in range(len(w)):
        assert error(new, slice(row, row + 1)) <= error(plain, slice(row, row + 1))


@pytest.mark.parametrize("shape", [(8, 16), (40, 8), (8, 8, 3), (8, 4, 3, 3), (40, 4, 2, 2, 2)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4/pair"])
def test_uncorrelated_inputs_are_magnitude(shape: tuple[int, ...], pattern: str) -> None:
    w = weight(*shape)
    new, mask = sparsegpt(w, np.eye(w[0].size), pattern)
    assert np.array_equal(mask, magnitude_mask(w, pattern))
    assert np.array_equal(new, np.where(mask, w, 0))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:4/pair"])
def test_a_weight_that_has_the_pattern_stays(pattern: str) -> None:
    x, w = inputs(32), weight(64, 32)
    w *= magnitude_mask(w, pattern)
    w[:, :4] = 0
    assert np.array_equal(sparsegpt(w, x @ x.T, pattern)[0], w)


def test_taps_come_before_channels() -> None:
    """The result of a convolution is that of a matrix with its columns in that order."""
    x, w = inputs(8 * 6), weight(5, 8, 2, 3)
    flat = w.transpose(0, 2, 3, 1).reshape(5, 48)
    new, mask = sparsegpt(w, x @ x.T, "2:4")
    flat_new, flat_mask = sparsegpt(flat, x @ x.T, "2:4")
    assert np.array_equal(new, flat_new.reshape(5, 2, 3, 8).transpose(0, 3, 1, 2))
    assert np.array_equal(mask, flat_mask.reshape(5, 2, 3, 8).transpose(0, 3, 1, 2))
    assert is_pattern(new, "2:4")


def test_many_rows_are_each_done_alone() -> None:
    x, w = inputs(16), weight(2100, 16)
    new, _ = sparsegpt(w, x @ x.T, "2:4")
    for rows in (slice(0, 32), slice(1020, 1030), slice(2090, 2100)):
        assert np.allclose(new[rows], sparsegpt(w[rows], x @ x.T, "2:4")[0], rtol=1e-6, atol=1e-7)
    pair, _ = sparsegpt(w, x @ x.T, "2:4/pair")
    assert is_pattern(pair, "2:4/pair")


def test_with_a_mask_given_what_stays_makes_up() -> None:
    x, w = inputs(32), weight(8, 32)
    mask = magnitude_mask(w, "2:4")
    before = mask.copy()
    new, same = sparsegpt(w, x @ x.T, "2:4", mask=mask, fit=False)
    assert np.array_equal(same, before)
    assert np.array_equal(mask, before)
    assert not new[~mask].any()
    assert cost(w, new, x) < 0.95 * cost(w, np.where(mask, w, 0), x)
    chosen = sparsegpt(w, x @ x.T, "2:4")
    again, _ = sparsegpt(w, x @ x.T, "2:4", mask=chosen[1])
    assert np.array_equal(again, chosen[0])
    tiles = magnitude_mask(w, "2:4/2d")
    assert is_pattern(sparsegpt(w, x @ x.T, "2:4/2d", mask=tiles)[0], "2:4/2d")


def test_tiles_that_do_not_divide_the_rows_done_at_a_time() -> None:
    x, w = inputs(10), weight(1030, 10)
    new, mask = sparsegpt(w, x @ x.T, "1:5/2d")
    assert is_pattern(new, "1:5/2d")
    assert mask.mean() == 1 / 5


def test_a_dead_input_loses_its_weights_first() -> None:
    x, w = inputs(16), weight(8, 16)
    x[[1, 6]] = 0
    new, mask = sparsegpt(w, x @ x.T, "3:4")
    assert not mask[:, [1, 6]].any()
    x[4:8] = 0
    new, mask = sparsegpt(w, x @ x.T, "2:4")
    assert np.array_equal(mask[:, 4:8], magnitude_mask(w[:, 4:8], "2:4"))
    assert np.array_equal(new[:, 4:8][mask[:, 4:8]], w[:, 4:8][mask[:, 4:8]])
    new, mask = sparsegpt(w, np.zeros((16, 16)), "2:4")
    assert np.array_equal(new, np.where(magnitude_mask(w, "2:4"), w, 0))


def test_fewer_samples_than_features() -> None:
    x, w = inputs(64, samples=5), weight(16, 64)
    new, _ = sparsegpt(w, x @ x.T, "2:4")
    assert np.isfinite(new).all()
    assert cost(w, new, x) < 0.2 * cost(w, np.where(magnitude_mask(w, "2:4"), w, 0), x)


def test_the_damping_grows_until_the_matrix_is_definite() -> None:
    gram = np.ones((8, 8)) - 0.02 * np.eye(8)  # one eigenvalue is -0.02, seven times
    found = factor(gram, 0.001)
    assert found.damping == pytest.approx(0.1)
    hessian = gram + 0.1 * 0.98 * np.eye(8)
    assert np.allclose(found.upper.T @ found.upper @ hessian, np.eye(8), atol=1e-12)
    assert factor(inputs(8) @ inputs(8).T, 0.001).damping == 0.001
    with pytest.raises(InputError, match="not positive definite"):
        factor(np.array([[1e-9, 1.0], [1.0, 1e-9]]), 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**16))
def test_the_factor_is_that_of_the_inverse(size: int, seed: int) -> None:
    x = inputs(size, samples=2 * size + 2, seed=seed, rank=max(size // 2, 1))
    gram = x @ x.T
    found = factor(gram, 0.05)
    assert np.array_equal(found.upper, np.triu(found.upper))
    hessian = gram + 0.05 * gram.diagonal().mean() * np.eye(size)
    inverse = found.upper.T @ found.upper
    # The condition number is at most size / 0.05: errors of some 1e-16 of that.
    assert np.allclose(inverse @ hessian, np.eye(size), atol=1e-9)


def test_a_factor_serves_several_weights() -> None:
    x, a, b = inputs(32), weight(8, 32), weight(4, 32, seed=3)
    shared = factor(x @ x.T, 0.1)
    for w in (a, b):
        new, _ = sparsegpt(w, shared, "2:4")
        assert np.array_equal(new, sparsegpt(w, factor(x @ x.T, 0.1), "2:4")[0])


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.full((8, 8), np.nan), "64 entries are NaN"),
        (np.diag([1.0] * 7 + [np.inf]), "1 entries are NaN or infinite"),
        (np.ones((8, 4)), "expected \\[K, K\\]"),
        (np.ones(8), "expected \\[K, K\\]"),
        (np.triu(np.ones((8, 8))), "not symmetric"),
        (-np.eye(8), "negative"),
        (np.eye(4), "expected 8 features"),
    ],
)
def test_a_matrix_that_is_none_is_refused(gram: Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sparsegpt(weight(4, 8), gram, "2:4")


def test_other_bad_input_is_refused() -> None:
    w = weight(4, 8)
    w[1, 2] = np.nan
    with pytest.raises(InputError, match="1 values are NaN"):
        sparsegpt(w, np.eye(8), "2:4")
    with pytest.raises(InputError, match="6 input channels"):
        sparsegpt(weight(4, 6), np.eye(6), "2:4")
    with pytest.raises(InputError, match="expected a mask bool"):
        sparsegpt(weight(4, 8), np.eye(8), "2:4", mask=np.ones((4, 4), np.bool_))
    with pytest.raises(InputError, match="damping above 0"):
        factor(np.eye(8), 0.0)

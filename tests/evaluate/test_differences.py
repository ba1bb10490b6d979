"""Sums over batches give what numpy gives over all at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twofour.core.errors import InputError
from twofour.evaluate.differences import Difference, Sums


def difference(a: np.ndarray, b: np.ndarray, batch: int) -> Difference:
    sums = Sums("y")
    for start in range(0, len(a), batch):
        sums.add(a[start : start + batch], b[start : start + batch], start)
    return sums.result()


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_sums_are_those_of_the_whole(batch: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((10, 4, 3)).astype(np.float32)
    b = a.copy()
    b[7] += rng.standard_normal((4, 3)).astype(np.float32)
    b[2, 1, 1] += 0.01
    found = difference(a, b, batch)
    x, y = a.astype(np.float64), b.astype(np.float64)
    noise = ((x - y) ** 2).sum()
    assert found.sqnr_db == pytest.approx(10 * math.log10((x**2).sum() / noise))
    assert found.cosine == pytest.approx((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))
    assert found.max_abs == np.abs(x - y).max()
    assert found.mean_abs == pytest.approx(np.abs(x - y).mean())
    assert found.equal == pytest.approx((a == b).mean())
    assert (found.worst_sample, found.shape, found.not_finite) == (7, (4, 3), 0)
    assert found.reference_max_abs == np.abs(x).max()


def test_equal_tensors_have_no_worst_sample() -> None:
    a = np.zeros((3, 2), np.float32)
    found = difference(a, a, 2)
    assert (found.sqnr_db, found.cosine, found.equal) == (math.inf, 1.0, 1.0)
    assert found.worst_sample is None


def test_what_is_not_finite_is_counted_and_spoils_nothing() -> None:
    a = np.array([[1.0, np.nan, np.inf, 2.0]])
    b = np.array([[1.0, np.nan, 5.0, np.nan]])
    found = difference(a, b, 1)
    assert (found.not_finite, found.equal, found.max_abs) == (2, 0.5, 0.0)
    assert found.sqnr_db == math.inf


def test_integers_and_booleans_compare() -> None:
    found = difference(np.array([[200], [7]], np.uint8), np.array([[100], [7]], np.uint8), 1)
    assert (found.max_abs, found.equal) == (100.0, 0.5)
    assert difference(np.array([True, False]), np.array([True, True]), 1).equal == 0.5


def test_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match="'y' has another shape"):
        difference(np.zeros((2, 3)), np.zeros((2, 4)), 2)

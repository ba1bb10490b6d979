"""Softmax kernels: equal to the definition bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.harness import targets
from tests.kernels.strided import Strided, compiled, in_parts
from twofour.core.attention import softmax
from twofour.kernels.cpu.softmax import SoftmaxProblem, emit_softmax

TARGETS = targets()
# (rows, columns): fewer rows than go together and more; columns around the vector.
SIZES = [(1, 1), (3, 15), (4, 16), (5, 17), (9, 128), (6, 1000)]


def run(kernel, x: np.ndarray, parts: int) -> np.ndarray:
    source, y = (Strided((*x.shape[:1], 1, 1, x.shape[1]), np.float32) for _ in range(2))
    source.values[...] = x[:, None, None]
    in_parts(kernel, (source.address, 0, y.address, 0), len(x), 1, parts)
    return y.take()[:, 0, 0]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_size_is_the_definition(target) -> None:
    texts = {
        f"s{i}_": emit_softmax(f"s{i}_", SoftmaxProblem(*size), target.isa)
        for i, size in enumerate(SIZES)
    }
    for size, kernel in zip(SIZES, compiled(texts, target, vectorize=False), strict=True):
        x = np.random.default_rng(0).normal(0, 20, size).astype(np.float32)
        for parts in (1, 3):
            got = run(kernel, x, parts)
            assert (got == softmax(x)).all(), size
        np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_extreme_rows(target) -> None:
    """Rows of minus infinity, of the largest numbers, of equal numbers, and with NaN."""
    x = np.zeros((7, 20), np.float32)
    x[0] = -np.inf
    x[1, ::2] = -np.inf
    x[2] = 3e38
    x[2, ::3] = -3e38
    x[3] = -1e9
    x[4, 5] = np.nan
    x[5, 3:] = np.linspace(-200, 100, 17)
    texts = {"s_": emit_softmax("s_", SoftmaxProblem(7, 20), target.isa)}
    (kernel,) = compiled(texts, target, vectorize=False)
    with np.errstate(all="ignore"):
        want = softmax(x)
    np.testing.assert_array_equal(run(kernel, x, 1), want)
    assert (want[0] == 0).all()
    assert np.isnan(want[4]).all()

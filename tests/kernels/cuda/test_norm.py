"""Layer normalization on a GPU, in Triton's interpreter: near the definition, whole rows only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.cuda.interpret import TORCH, interpret
from twofour.core.norm import layer_norm
from twofour.kernels.cuda.norm import MOST_CHANNELS, recipes, why_not
from twofour.kernels.cuda.problem import NormProblem

EPS = 1e-5
GAP = 3
"""Elements between two rows, which no kernel may touch."""
UNTOUCHED = 77
# (rows, channels): around a program's rows, and around powers of 2.
SIZES = [(1, 1), (3, 15), (5, 40), (9, 64), (2, 65), (3, 771)]


def of_rows(rows: int, channels: int, dtype: str) -> torch.Tensor:
    return torch.full((rows, channels + GAP), UNTOUCHED).to(TORCH[dtype])


def constants(channels: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(channels)
    return {
        "gamma": random.normal(1, 0.3, channels).astype(np.float32),
        "beta": random.normal(0, 1, channels).astype(np.float32),
    }


def check(problem: NormProblem, effort: int = 3) -> None:
    """All recipes of a problem against the definition."""
    rows, channels, held = problem.rows, problem.channels, constants(problem.channels)
    torch.manual_seed(rows)
    x = of_rows(rows, channels, problem.x[0])
    x[:, :channels] = torch.randn(rows, channels) * 2 + 3
    wanted = layer_norm(x[:, :channels].float().numpy(), held["gamma"], held["beta"], EPS)
    results = {name: out for name in ("y", "q") if (out := getattr(problem, name)) is not None}
    found = recipes(problem, held, 90, effort=effort)
    assert found
    for recipe in found:
        given = {name: of_rows(rows, channels, out[0]) for name, out in results.items()}
        interpret(recipe, {"x": x, **given})
        for name, got in given.items():
            where = f"{name} of {recipe.config}"
            assert (got[:, channels:].float() == UNTOUCHED).all() or got.element_size() == 1, where
            compare(got[:, :channels], wanted, problem, name, where)


def compare(got: torch.Tensor, wanted: np.ndarray, problem: NormProblem, name: str, where: str):
    """Floats to their own last bits; int8 equal, but for values that lie between two steps."""
    dtype = getattr(problem, name)[0]
    values = got.float().numpy()
    if name == "y":
        eps = {"float32": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
        bound = eps * np.maximum(np.abs(wanted), 1)
        assert (np.abs(values - wanted) <= bound).all(), where
        return
    exact = wanted.astype(np.float64) / problem.scale
    if dtype == "int8":
        clipped = np.clip(exact + problem.zero, -128, 127)
        assert (np.abs(values - clipped) <= 0.5 + 1e-3).all(), where
    else:
        limited = np.clip(exact, -448, 448)
        assert (np.abs(values - limited) <= np.maximum(np.abs(limited) / 16, 2.0**-10)).all(), where


@pytest.mark.parametrize("size", SIZES)
def test_both_results(size: tuple[int, int]) -> None:
    rows, channels = size
    row = channels + GAP
    check(
        NormProblem(rows, channels, EPS, ("float32", row), ("float32", row), ("int8", row), 0.03, 5)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("quantized", ["int8", "float8e4m3fn"])
def test_types(dtype: str, quantized: str) -> None:
    row = 48 + GAP
    zero = -7 if quantized == "int8" else 0
    check(NormProblem(4, 48, EPS, (dtype, row), (dtype, row)), effort=1)
    check(NormProblem(4, 48, EPS, (dtype, row), None, (quantized, row), 0.004, zero), effort=1)


def test_a_row_of_one_value_gives_beta() -> None:
    problem = NormProblem(2, 24, EPS, ("float32", 24), ("float32", 24))
    held = constants(24)
    (recipe,) = recipes(problem, held, 90, effort=0)
    y = torch.full((2, 24), 5.0)
    interpret(recipe, {"x": torch.full((2, 24), 1000.0), "y": y})
    np.testing.assert_array_equal(y.numpy(), np.tile(held["beta"], (2, 1)))


def test_many_channels_are_refused() -> None:
    wide = MOST_CHANNELS + 1
    problem = NormProblem(1, wide, EPS, ("float32", wide), ("float32", wide))
    assert "do not fit" in why_not(problem, 90)
    assert recipes(problem, constants(wide), 90) == ()


def test_float8_needs_a_gpu_that_has_it() -> None:
    problem = NormProblem(1, 16, EPS, ("float32", 16), None, ("float8e4m3fn", 16), 0.1)
    assert "8.9" in why_not(problem, 80)
    assert why_not(problem, 89) == ""

"""Pooling and the quantization of rows on a GPU, in Triton's interpreter: equal to numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.cuda.interpret import interpret
from tests.kernels.cuda.pool_cases import check_pool, check_rows, problem_of
from twofour.core.numerics import Window
from twofour.kernels.cuda import pool, quantize_rows
from twofour.kernels.cuda.kernel import compile_kernel
from twofour.kernels.cuda.problem import RowsProblem

DTYPES = ("int8", "float8e4m3fn", "float32", "float16", "bfloat16")
WINDOWS = [
    Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1)),
    Window((2, 2), (2, 2)),
    Window((3, 2), (1, 2), (1, 1), (2, 0, 1, 1)),
    Window((2, 3), (2, 1), (2, 2), (1, 2, 1, 2)),
]


WINDOWED = [*(("int8", window) for window in WINDOWS), *((d, WINDOWS[3]) for d in DTYPES[1:])]


@pytest.mark.parametrize(("dtype", "window"), WINDOWED, ids=str)
def test_a_maximum_is_that_of_what_lies_in_the_image(dtype: str, window: Window) -> None:
    check_pool(problem_of("max", dtype, (2, 6, 7, 17), window), interpret, effort=0)


@pytest.mark.parametrize(("dtype", "window"), WINDOWED, ids=str)
def test_an_average_divides_by_the_taps_there_are(dtype: str, window: Window) -> None:
    for include_pad in (False, True):
        problem = problem_of("average", dtype, (2, 6, 7, 5), window, include_pad=include_pad)
        check_pool(problem, interpret, effort=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 7, 65), (1, 1, 1, 8), (1, 33, 40, 20)])
def test_a_mean_of_the_image(dtype: str, shape: tuple[int, int, int, int]) -> None:
    check_pool(problem_of("mean", dtype, shape), interpret, effort=0)


def test_a_window_of_many_taps_is_no_long_program() -> None:
    window = Window((7, 5), (1, 2), (1, 1), (3, 2, 3, 2))
    for op in ("max", "average"):
        problem = problem_of(op, "int8", (1, 8, 9, 5), window)
        check_pool(problem, interpret, effort=0)
        (recipe,) = pool.recipes(problem, 90, effort=0)
        assert len(compile_kernel(recipe.calls[0], 90).cubin) < 60_000


def test_a_mean_of_few_channels_is_two_launches() -> None:
    problem = problem_of("mean", "int8", (1, 33, 40, 20))
    (recipe,) = pool.recipes(problem, 90, effort=0)
    assert len(recipe.calls) == 2
    assert recipe.scratch


def test_a_real_result_of_int8() -> None:
    check_pool(problem_of("mean", "int8", (2, 5, 5, 20), out="float16"), interpret)
    problem = problem_of("average", "int8", (2, 6, 6, 20), WINDOWS[0], out="float32")
    check_pool(problem, interpret, effort=2)


def test_a_pooling_that_has_no_kernel_says_why() -> None:
    assert "of one type" in pool.why_not(problem_of("max", "int8", (1, 4, 4, 8), out="float32"))
    assert "not float64" in pool.why_not(problem_of("mean", "float64", (1, 4, 4, 8)))
    assert "expected max" in pool.why_not(problem_of("median", "int8", (1, 4, 4, 8)))
    assert pool.recipes(problem_of("max", "float8e4m3fn", (1, 4, 4, 8)), 80) == ()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("to", ["int8", "float8e4m3fn"])
def test_rows_have_scales_of_their_own(dtype: str, to: str) -> None:
    for rows, channels in ((1, 1), (5, 40), (3, 129)):
        x = np.random.default_rng(rows).normal(0, 3, (rows, channels + 3)).astype(np.float32)
        x[0] = 0
        problem = RowsProblem(rows, channels, (dtype, channels + 3), (to, channels + 5))
        check_rows(problem, x, interpret)


def test_a_row_that_no_program_holds() -> None:
    x = np.random.default_rng(0).normal(0, 3, (2, 17000)).astype(np.float32)
    check_rows(RowsProblem(2, 17000, ("float32", 17000), ("int8", 17000)), x, interpret)


def test_what_is_no_number_is_stored_as_on_a_cpu() -> None:
    x = np.random.default_rng(0).normal(0, 3, (4, 40)).astype(np.float32)
    x[1, 3], x[2, 5] = np.nan, np.inf
    check_rows(RowsProblem(4, 40, ("float32", 40), ("int8", 40)), x, interpret)


def test_rows_that_have_no_kernel_say_why() -> None:
    problem = RowsProblem(4, 40, ("int8", 40), ("int8", 40))
    assert "from real numbers" in quantize_rows.why_not(problem)
    assert quantize_rows.recipes(problem, 90) == ()
    problem = RowsProblem(4, 40, ("float32", 40), ("float8e4m3fn", 40))
    assert quantize_rows.recipes(problem, 80) == ()


@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile(capability: int) -> None:
    for problem in (
        problem_of("max", "int8", (2, 8, 8, 64), WINDOWS[0]),
        problem_of("average", "int8", (2, 8, 8, 64), WINDOWS[0]),
        problem_of("mean", "float16", (1, 33, 40, 32)),
    ):
        (recipe,) = pool.recipes(problem, capability, effort=0)
        for call in recipe.calls:
            assert len(compile_kernel(call, capability).cubin) > 1000
    rows = RowsProblem(40, 768, ("float16", 768), ("int8", 768))
    (recipe,) = quantize_rows.recipes(rows, capability, effort=0)
    assert len(compile_kernel(recipe.calls[0], capability).cubin) > 1000

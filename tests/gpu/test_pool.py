"""Pooling and rows on a GPU: equal to numpy, and how fast the usual ones are (pytest -s)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from tests.gpu.launch import capability, launch, median_us, prepared
from tests.kernels.cuda.pool_cases import check_pool, check_rows, problem_of
from twofour.core.numerics import Window
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.pool import recipes
from twofour.kernels.cuda.problem import PoolProblem, RowsProblem, View
from twofour.kernels.cuda.quantize_rows import recipes as rows_recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is here"),
]
STEM = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1))
TORCH = {"int8": torch.int8, "float16": torch.float16}


def run(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> None:
    launch(recipe, tensors, capability())


@pytest.mark.parametrize("dtype", ["int8", "float8e4m3fn", "float16", "bfloat16"])
def test_windows_equal_numpy(dtype: str) -> None:
    check_pool(problem_of("max", dtype, (3, 9, 10, 65), STEM), run, effort=0, device="cuda")
    check_pool(problem_of("average", dtype, (3, 9, 10, 65), STEM), run, effort=0, device="cuda")


@pytest.mark.parametrize("dtype", ["int8", "float8e4m3fn", "float32"])
@pytest.mark.parametrize("shape", [(3, 7, 7, 300), (1, 60, 60, 20)])
def test_means_equal_numpy(dtype: str, shape: tuple[int, int, int, int]) -> None:
    check_pool(problem_of("mean", dtype, shape), run, effort=0, device="cuda")


@pytest.mark.parametrize("to", ["int8", "float8e4m3fn"])
@pytest.mark.parametrize("channels", [768, 17000])
def test_rows_equal_numpy(to: str, channels: int) -> None:
    x = np.random.default_rng(0).normal(0, 3, (9, channels)).astype(np.float32)
    x[0] = 0
    check_rows(RowsProblem(9, channels, ("float16", channels), (to, channels)), x, run,
               device="cuda")  # fmt: skip


def test_how_fast_the_usual_ones_are() -> None:
    """Bytes that have to be read and written, by the median time; each recipe, the best marked."""
    found = {}
    for dtype in ("int8", "float16"):
        x, y = (View.dense(dtype, n, n, 64) for n in (112, 56))
        found[f"max pool of ResNet-50, batch 256 {dtype}"] = recipes(
            PoolProblem("max", 256, 112, 112, 64, x, y, STEM), capability()
        ), (256 * 112 * 112 * 64, 256 * 56 * 56 * 64), dtype, dtype  # fmt: skip
    for batch, size, channels in ((1, 7, 2048), (256, 7, 2048), (1, 112, 32)):
        x, y = (View.dense("int8", n, n, channels) for n in (size, 1))
        found[f"mean of {batch} x {size} x {size} x {channels} int8"] = recipes(
            PoolProblem("mean", batch, size, size, channels, x, y), capability()
        ), (batch * size * size * channels, batch * channels), "int8", "int8"  # fmt: skip
    found["rows 4096 x 4096 fp16 to int8"] = rows_recipes(
        RowsProblem(4096, 4096, ("float16", 4096), ("int8", 4096)), capability()
    ), (4096 * 4096, 4096 * 4096), "float16", "int8"  # fmt: skip
    for name, (some, counts, dtype, out) in found.items():
        x_, y_ = (
            torch.zeros(n, dtype=TORCH[t], device="cuda")
            for n, t in zip(counts, (dtype, out), strict=True)
        )
        tensors = {"x": x_, "y": y_, "row_scale": torch.zeros(4096, device="cuda")}
        moved = x_.nbytes + y_.nbytes
        times = []
        for recipe in some:
            us = median_us(prepared(recipe, tensors, capability()), repeats=5, rounds=3)
            times.append((us, recipe.config))
        for us, config in times:
            mark = "*" if us == min(times)[0] else " "
            print(f"{mark} {name:40} {config:36} {us:9.1f} us {moved / us / 1e3:8.1f} GB/s")

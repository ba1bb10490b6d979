"""Pooling and rows with random operands, in the interpreter or on a GPU, compared with numpy."""

from __future__ import annotations

import numpy as np
import torch

from tests.kernels.cuda.interpret import Array, tensor_of, values_of
from tests.kernels.cuda.walk_cases import EPS, Runner, message
from twofour.core.dynamic import LEAST, quantize_rows
from twofour.core.numerics import Window
from twofour.core.pooling import average_pool, tap_factors
from twofour.kernels.cuda.pool import recipes as pool_recipes
from twofour.kernels.cuda.pool import why_not
from twofour.kernels.cuda.problem import POINT, PoolProblem, RowsProblem, View
from twofour.kernels.cuda.quantize_rows import recipes as rows_recipes

GAP = 3
"""Channels between two pixels that belong to others."""


def numbers(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Seeded values; exact in the smaller types."""
    random = np.random.default_rng(seed)
    if dtype == "int8":
        return random.integers(-128, 128, shape).astype(np.int8)
    found = (random.integers(-60, 60, shape) / 4).astype(np.float32)
    return values_of(tensor_of(found, dtype))


def view(dtype: str, shape: tuple[int, ...]) -> View:
    """Of pixels with a gap behind each."""
    return View.dense(dtype, shape[1], shape[2], shape[3] + GAP)


def problem_of(
    op: str,
    dtype: str,
    shape: tuple[int, ...],
    window: Window = POINT,
    *,
    out: str = "",
    include_pad: bool = False,
) -> PoolProblem:
    """Of x [N, H, W, C]; scales and zero points where they are quantized."""
    out = out or dtype
    size = (1, 1) if op == "mean" else window.output_size(*shape[1:3])
    scale = 1.0 if op == "max" or dtype not in ("int8", "float8e4m3fn") else 0.63
    zeros = [3 if kind == "int8" and op != "max" else 0 for kind in (dtype, out)]
    y = view(out, (shape[0], *size, shape[3]))
    return PoolProblem(
        *(op, *shape, view(dtype, shape), y, window, scale, zeros[0], -zeros[1], include_pad)
    )


def expected(problem: PoolProblem, x: Array) -> Array:
    """The definition; real where y is, or is float8."""
    n, c = problem.batch, problem.channels
    if problem.op == "mean":
        sums = (x.astype(np.float64) - problem.x_zero).sum((1, 2), keepdims=True)
        factor = np.float32(problem.scale / (problem.height * problem.width))
        return rounded(problem, sums.astype(np.float32) * factor)
    window = problem.window
    zeros = (problem.x_zero + 128, problem.y_zero + 128)
    if problem.op == "average" and problem.x.dtype == problem.y.dtype == "int8":
        stored = (x.astype(np.int16) + 128).astype(np.uint8)
        found = average_pool(stored, window, problem.scale, zeros, include_pad=problem.include_pad)
        return found.astype(np.int16) - 128
    out_h, out_w = window.output_size(problem.height, problem.width)
    y = np.empty((n, out_h, out_w, c), np.float32)
    factors = tap_factors(problem.scale, window.kernel[0] * window.kernel[1])
    for i, j in np.ndindex(out_h, out_w):
        rows, columns = (
            place * step - pad + dilation * np.arange(size)
            for place, step, pad, dilation, size in zip(
                (i, j), window.stride, window.pads[:2], window.dilation, window.kernel, strict=True
            )
        )
        rows = rows[(rows >= 0) & (rows < problem.height)]
        columns = columns[(columns >= 0) & (columns < problem.width)]
        seen = x[:, rows][:, :, columns].astype(np.float32)
        if problem.op == "max":
            y[:, i, j] = seen.max((1, 2))
        else:
            taps = len(rows) * len(columns)
            sums = seen.sum((1, 2)) - np.float32(taps * problem.x_zero)
            y[:, i, j] = sums * factors[-1 if problem.include_pad else taps]
    return y if problem.op == "max" else rounded(problem, y)


def rounded(problem: PoolProblem, real: Array) -> Array:
    """To int8, where y is that."""
    if problem.y.dtype != "int8":
        return np.asarray(real, np.float32)
    return np.clip(np.rint(real) + problem.y_zero, -128, 127)


def check_pool(problem: PoolProblem, run: Runner, *, effort: int = 1, device: str = "cpu") -> None:
    """All recipes: the definition, and the gaps as they were."""
    assert why_not(problem) == ""
    shape = (problem.batch, problem.height, problem.width, problem.channels)
    x = numbers(problem.x.dtype, (*shape[:3], shape[3] + GAP))
    wanted = expected(problem, x[..., : shape[3]])
    held = np.full((*wanted.shape[:3], shape[3] + GAP), 5, np.float32)
    held[..., : shape[3]] = wanted
    dtype = problem.y.dtype
    found = pool_recipes(problem, 90, effort=effort)
    assert found
    for recipe in found:
        fives = np.full(held.shape, 5, np.float32)
        y = tensor_of(fives, dtype).to(device)
        run(recipe, {"x": tensor_of(x, problem.x.dtype).to(device), "y": y})
        got = values_of(y).astype(np.float32)
        far = np.abs(got - held) > EPS.get(dtype, 0) * np.maximum(np.abs(held), 1)
        assert not far.any(), message(got, held, far, f"{problem.op} {dtype}, {recipe.config}")


def check_rows(problem: RowsProblem, x: Array, run: Runner, *, device: str = "cpu") -> None:
    """All recipes of rows [rows, step] of which the first channels count."""
    channels = problem.channels
    seen = values_of(tensor_of(x, problem.x[0]))[:, :channels]
    wanted = quantize_rows(seen)
    for recipe in rows_recipes(problem, 90):
        dtype = problem.y[0]
        y = tensor_of(np.full((problem.rows, problem.y[1]), 5, np.float32), dtype).to(device)
        scale = torch.full((problem.rows + 1,), 7.0, device=device)
        run(recipe, {"x": tensor_of(x, problem.x[0]).to(device), "y": y, "row_scale": scale})
        assert scale[-1] == 7, recipe.config
        scales, got = scale[:-1, None].cpu().numpy(), values_of(y)
        assert (got[:, channels:] == 5).all(), recipe.config
        if dtype == "int8":
            np.testing.assert_array_equal(scales, wanted.scale, recipe.config)
            stored = wanted.bytes.astype(np.int16) - 128
            np.testing.assert_array_equal(got[:, :channels], stored, recipe.config)
        else:
            highest = np.maximum(np.abs(seen).max(-1, keepdims=True), np.float32(LEAST))
            np.testing.assert_array_equal(scales, highest / np.float32(448), recipe.config)
            real = seen * (np.float32(448) / highest)
            exact = values_of(tensor_of(np.clip(real, -448, 448), dtype))
            np.testing.assert_array_equal(got[:, :channels], exact, recipe.config)

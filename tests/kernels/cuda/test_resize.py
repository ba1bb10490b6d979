"""Resizing and the moves of images on a GPU, in Triton's interpreter: equal to numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.cuda.interpret import interpret, tensor_of, values_of
from tests.kernels.cuda.pool_cases import GAP, numbers, view
from twofour.kernels.cpu.resize import Tap
from twofour.kernels.cuda.kernel import compile_kernel
from twofour.kernels.cuda.problem import View
from twofour.kernels.cuda.resize import ResizeProblem, recipes, tables, why_not
from twofour.kernels.cuda.walk import recipes as walk_recipes
from twofour.kernels.cuda.walk import why_not as why_no_walk
from twofour.kernels.cuda.walk_moves import slice_pad


def taps(before: int, after: int) -> tuple[Tap, ...]:
    """Half-pixel centres."""
    places = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    firsts = np.floor(places).astype(int)
    return tuple(
        Tap(int(a), min(int(a) + 1, before - 1), float(p - a))
        for a, p in zip(firsts, places, strict=True)
    )


def problem_of(dtype: str, before: tuple[int, int], after: tuple[int, int], channels: int):
    heights, widths = zip(before, after, strict=True)
    ends = [view(dtype, (2, *size, channels)) for size in (before, after)]
    return ResizeProblem(2, heights, widths, channels, *ends)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sizes", [((3, 5), (7, 10)), ((6, 6), (4, 3)), ((1, 4), (2, 4))])
def test_a_pixel_is_made_of_its_neighbours(dtype: str, sizes: tuple[tuple[int, int], ...]) -> None:
    channels = 19
    problem = problem_of(dtype, *sizes, channels)
    rows, columns = (taps(a, b) for a, b in zip(*sizes, strict=True))
    x = numbers(dtype, (2, *sizes[0], channels + GAP))
    torch_x = torch.from_numpy(x).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(torch_x, sizes[1], mode="bilinear")
    eps = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    found = recipes(problem, tables(rows, columns), 90)
    assert len(found) == 3
    for recipe in found:
        y = tensor_of(np.full((2, *sizes[1], channels + GAP), 5, np.float32), dtype)
        interpret(recipe, {"x": tensor_of(x, dtype), "y": y})
        got = values_of(y)
        assert (got[..., channels:] == 5).all()
        close = np.abs(got - wanted.permute(0, 2, 3, 1).numpy())[..., :channels]
        assert close.max() <= eps * 16, recipe.config


def test_a_resizing_of_bytes_has_no_kernel() -> None:
    problem = replace(problem_of("float32", (2, 2), (4, 4), 8), x=view("int8", (2, 2, 2, 8)))
    assert "real numbers" in why_not(problem)
    assert recipes(problem, tables(taps(2, 4), taps(2, 4)), 90) == ()


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles(capability: int) -> None:
    problem = problem_of("float16", (8, 8), (16, 16), 64)
    both = tables(taps(8, 16), taps(8, 16))
    (recipe,) = recipes(problem, both, capability, effort=0)
    assert len(compile_kernel(recipe.calls[0], capability).cubin) > 1000


@pytest.mark.parametrize("pads", [(0, 0), (2, 5), (0, 8)])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_pixels_are_left_out_and_channels_added(dtype: str, pads: tuple[int, int]) -> None:
    x = numbers(dtype, (2, 6, 7, 9))
    channels = 9 + sum(pads)
    y = torch.full((2, 3, 3, channels), 77.0).to(torch.int8 if dtype == "int8" else torch.float16)
    ends = View.dense(dtype, 6, 7, 9), View.dense(dtype, 3, 3, channels)
    for walk in slice_pad(*ends, (2, 3, 3, 9), (2, 3), pads, -4.0):
        assert why_no_walk(walk) == ""
        (recipe,) = walk_recipes(walk, {}, 90, effort=0)
        interpret(recipe, {"in0": tensor_of(x, dtype), "y": y})
    wanted = np.pad(x[:, ::2, ::3], ((0, 0), (0, 0), (0, 0), pads), constant_values=-4)
    assert (values_of(y) == wanted).all()

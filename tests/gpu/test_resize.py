"""Linear resizing on a GPU: equal to numpy, as the interpreter's tests have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.launch import capability, launch, median_us, prepared
from tests.kernels.cuda.test_resize import problem_of, taps
from twofour.kernels.cuda.problem import View
from twofour.kernels.cuda.resize import ResizeProblem, recipes, tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is here"),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_pixel_is_made_of_its_neighbours(dtype: str) -> None:
    before, after, channels = (6, 9), (13, 18), 40
    problem = problem_of(dtype, before, after, channels)
    rows, columns = (taps(a, b) for a, b in zip(before, after, strict=True))
    kind = torch.float32 if dtype == "float32" else torch.float16
    x = torch.randn(2, *before, problem.x.pixel).to(kind).cuda()
    y = torch.zeros(2, *after, problem.y.pixel, dtype=kind, device="cuda")
    (recipe,) = recipes(problem, tables(rows, columns), capability(), effort=0)
    launch(recipe, {"x": x, "y": y}, capability())
    images = x.float().permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(images, after, mode="bilinear").permute(0, 2, 3, 1)
    far = (y.float() - wanted)[..., :channels].abs().max().item()
    assert far <= (1e-5 if dtype == "float32" else 4e-3)
    assert not np.any(y[..., channels:].cpu().numpy())


def test_how_fast_it_is() -> None:
    x, y = View.dense("float16", 40, 40, 256), View.dense("float16", 80, 80, 256)
    problem = ResizeProblem(32, (40, 80), (40, 80), 256, x, y)
    sides = [torch.zeros(32, n, n, 256, dtype=torch.float16, device="cuda") for n in (40, 80)]
    moved = sum(side.nbytes for side in sides)
    both = tables(taps(40, 80), taps(40, 80))
    for recipe in recipes(problem, both, capability()):
        run = prepared(recipe, {"x": sides[0], "y": sides[1]}, capability())
        us = median_us(run, repeats=5, rounds=3)
        print(f"  resize 40 -> 80, 32 x 256 fp16 {recipe.config:32} {us:9.1f} us "
              f"{moved / us / 1e3:8.1f} GB/s")  # fmt: skip

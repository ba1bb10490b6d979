"""First layers on a GPU: equal to their definition, and how fast the usual one is (pytest -s)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.gpu.launch import capability, launch, median_us, prepared
from tests.kernels.cuda.test_conv_first import SMALL, STEM, STRANGE, arrays_of, problem_of
from twofour.core.functions import Activation
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv
from twofour.kernels.cuda.conv_first import recipes
from twofour.kernels.cuda.problem import View
from twofour.kernels.cuda.reference import conv_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is here"),
]


@pytest.mark.parametrize("y", ["int8", "float32"])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("window", [STEM, SMALL, STRANGE], ids=["7x7", "3x3", "strange"])
def test_every_tile(window: Window, channels: int, y: str) -> None:
    problem = problem_of(window, channels, 72, y=y)
    arrays = arrays_of(problem)
    wanted = conv_reference(problem, arrays | {"x": arrays["x"][..., :channels]})
    for recipe in recipes(problem, arrays, capability()):
        tensors = {"x": torch.from_numpy(arrays["x"]).cuda()}
        tensors["y"] = torch.full(wanted.shape, 77, dtype=getattr(torch, y), device="cuda")
        launch(recipe, tensors, capability())
        away = np.abs(tensors["y"].cpu().numpy().astype(np.float64) - wanted)
        assert away.max() <= (1 if y == "int8" else 1e-3), recipe.config
        assert (away > 0.5).mean() < 0.01, recipe.config


def test_speed() -> None:
    """No bound: these are figures for the log."""
    problem = replace(problem_of(STEM), batch=32, height=224, width=224)
    finish = replace(problem.finish, activation=Activation("Relu"))
    view = View("int8", 224 * 224 * 4, 224 * 4, 4)
    out = View.dense("int8", 112, 112, 64)
    problem = replace(problem, x=view, y=out, finish=finish, x_zero=0)
    arrays = arrays_of(replace(problem, batch=2))
    tensors = {
        "x": torch.randint(-100, 100, (32, 224, 224, 4), dtype=torch.int8, device="cuda"),
        "y": torch.zeros((32, 112, 112, 64), dtype=torch.int8, device="cuda"),
    }

    for name, found in (
        ("conv_first", recipes(problem, arrays, capability())),
        ("conv", conv.recipes(problem, arrays, capability(), effort=1)),
    ):
        for each in found:
            us = median_us(prepared(each, tensors, capability()))
            print(f"{name} {each.config}: {us:.1f} us")

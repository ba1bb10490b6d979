"""Layers of known networks, and what a table of their times needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.kernels.cuda.conv_cases import Size
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv, product_descriptors
from twofour.kernels.cuda.kernel import Kernel, Recipe, compile_kernel

THREE = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
STEM = Window((7, 7), (2, 2), (1, 1), (3, 3, 3, 3))
_MOST = 8


@dataclass(frozen=True)
class Layer:
    """A row of the table."""

    name: str
    size: Size
    dtypes: tuple[str, ...] = ("int8", "float8e4m3fn", "float16")


LAYERS = (
    Layer("stem b32", Size(32, 224, 224, 3, 64, STEM), ("int8", "float16")),
    Layer("stem of 4 b32", Size(32, 224, 224, 4, 64, STEM), ("int8", "float16")),
    Layer("3x3 64 56 b32", Size(32, 56, 56, 64, 64, THREE)),
    Layer("3x3 256 14 b32", Size(32, 14, 14, 256, 256, THREE)),
    Layer("3x3 512 7 b1", Size(1, 7, 7, 512, 512, THREE)),
    Layer("1x1 64-256 56 b32", Size(32, 56, 56, 64, 256)),
    Layer("1x1 1024-256 14 b256", Size(256, 14, 14, 1024, 256)),
    Layer("bert qkv b32", Size(4096, 1, 1, 768, 2304)),
    Layer("bert ffn1 b32", Size(4096, 1, 1, 768, 3072)),
    Layer("bert ffn2 b1", Size(128, 1, 1, 3072, 768)),
    Layer("4096^3", Size(4096, 1, 1, 4096, 4096)),
)


def recipes_of(layer: Layer, dtype: str, capability: int) -> tuple[Recipe, ...]:
    """The first candidates of a layer whose results have the type of its x."""
    problem = layer.size.problem(dtype, dtype)
    shape = (problem.out_channels, problem.channels, *problem.window.kernel)
    w = np.random.default_rng(0).integers(-127, 127, shape).astype(np.int8)
    ones = np.ones(problem.out_channels, np.float32)
    constants = {"w": w, "scale": ones * np.float32(1e-4), "bias": ones}
    found = conv.recipes(problem, constants, capability, effort=2)[:_MOST]
    return found + product_descriptors.recipes(problem, constants, capability, effort=2)


def compile_all(task: tuple[Layer, str, int]) -> int:
    """Compiles all kernels of a layer, a type and a capability; how many."""
    calls = [call for recipe in recipes_of(*task) for call in recipe.calls]
    for call in calls:
        assert isinstance(call, Kernel)
        compile_kernel(call, task[2])
    return len(calls)

"""Products and convolutions as compiled kernels on a GPU: right, and how fast."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.gpu.layers import LAYERS, STEM, THREE, Layer, compile_all, recipes_of
from tests.kernels.cuda.conv_cases import Case, Size
from twofour.core.cuda_program import DTYPES
from twofour.core.functions import Activation
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv, conv_depthwise, product_descriptors
from twofour.kernels.cuda.problem import ConvProblem, Finish

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
if torch.cuda.is_available():
    from tests.gpu.launch import capability, launch, median_us, prepared, require_alone

TYPES = ["int8", "float8e4m3fn", "float16", "bfloat16", "float32"]


def check(problem: ConvProblem, effort: int = 1, tactic: ModuleType = conv) -> None:
    """The first candidates of a problem, on random data; every wrong one is named."""
    case, wrong = Case.of(problem), []
    recipes = tactic.recipes(problem, case.arrays, capability(), effort=effort)
    assert recipes or capability() < 90
    for recipe in recipes:
        tensors = {role: tensor.cuda() for role, tensor in case.tensors().items()}
        launch(recipe, tensors, capability())
        found = case.wrong(tensors["y"])
        if found:
            wrong.append(f"{recipe.tactic} {recipe.config}: {found}")
    assert wrong == []


@pytest.mark.parametrize("dtype", TYPES)
def test_products(dtype: str) -> None:
    check(Size(200, 1, 1, 768, 328).problem(dtype, dtype, dtype))
    check(Size(1, 9, 7, 100, 33, gap=2).problem(dtype, "float32", "float32"), 0)


@pytest.mark.parametrize("dtype", TYPES[:4])
def test_products_by_descriptors(dtype: str) -> None:
    check(Size(3000, 1, 1, 768, 1544).problem(dtype, dtype, dtype), 2, product_descriptors)
    check(Size(4, 9, 7, 96, 40, gap=16).problem(dtype, dtype), 0, product_descriptors)


@pytest.mark.parametrize("dtype", TYPES)
def test_windows(dtype: str) -> None:
    check(Size(2, 14, 14, 128, 96, THREE, gap=16).problem(dtype, dtype))
    check(Size(2, 30, 30, 3, 32, STEM).problem(dtype, dtype), 0)
    check(Size(1, 8, 9, 24, 40, replace(THREE, stride=(2, 2))).problem(dtype, dtype), 0)


def test_few_rows_share_the_steps() -> None:
    check(Size(1, 1, 1, 2048, 1000).problem("int8", "float32"))
    check(Size(1, 7, 7, 512, 512, THREE).problem("int8", "int8", "int8"), 2)
    check(Size(1, 7, 7, 512, 512, THREE).problem("float16", "float16", "float16"), 1)


@pytest.mark.parametrize("groups", [2, 32])
def test_groups(groups: int) -> None:
    check(Size(2, 14, 14, 128, 256, THREE, groups).problem("int8", "int8"), 0)
    check(Size(2, 14, 14, 128, 256, THREE, groups).problem("float16", "float16"), 0)


@pytest.mark.parametrize("dtype", TYPES)
def test_depthwise(dtype: str) -> None:
    for window in (THREE, replace(THREE, stride=(2, 2)), Window((5, 5), pads=(2, 2, 2, 2))):
        problem = Size(2, 14, 14, 96, 96, window, 96, gap=16).problem(dtype, dtype)
        check(problem, 1, conv_depthwise)


@pytest.mark.parametrize(
    "name", ["HardSwish", "HardSigmoid", "Sigmoid", "Silu", "Gelu", "GeluTanh", "Tanh"]
)
def test_activations(name: str) -> None:
    finish = Finish(0.02, Activation(name), y_factor=20.0, y_zero=-60)
    check(Size(64, 1, 1, 64, 64).problem("int8", "int8", "int8", finish), 0)
    check(
        Size(64, 1, 1, 64, 64).problem(
            "float16", "float16", finish=Finish(activation=Activation(name))
        ),
        0,
    )


def test_rows_with_scales() -> None:
    check(Size(64, 1, 1, 256, 64).problem("int8", "float16", finish=Finish(by_rows=True)), 0)


def rival_us(size: Size, dtype: str) -> float:
    """Microseconds of what torch takes for the plain sums, without an end."""
    rows, k, n = size.batch * size.height * size.width, size.channels, size.outs
    if size.window.kernel != (1, 1):
        x = torch.randn(size.batch, k, size.height, size.width, device="cuda").half()
        w = torch.randn(n, k, *size.window.kernel, device="cuda").half()
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
        stride, pad = size.window.stride, size.window.pads[:2]
        return median_us(lambda: torch.nn.functional.conv2d(x, w, None, stride, pad))
    x = torch.randn(rows, k, device="cuda")
    w = torch.randn(n, k, device="cuda")
    if dtype == "int8":
        a, b = x.to(torch.int8), w.to(torch.int8)
        return median_us(lambda: torch._int_mm(a, b.t()))
    if dtype == "float8e4m3fn":
        a, b = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        call: Callable[[], object] = lambda: torch._scaled_mm(  # noqa: E731
            a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return median_us(call)
    a, b = x.half(), w.half()
    return median_us(lambda: a @ b.t())


@pytest.fixture(scope="module")
def compiled() -> None:
    """The compiler's cache holds all kernels of the table: many processes fill it."""
    require_alone()
    tasks = [(layer, dtype, capability()) for layer in LAYERS for dtype in layer.dtypes]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(14, len(os.sched_getaffinity(0)) - 1))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        print(sum(pool.map(compile_all, tasks)), "kernels")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_speed(layer: Layer, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints a row for each type; nothing is asserted of the figures."""
    lines = []
    for dtype in layer.dtypes:
        problem = layer.size.problem(dtype, dtype)
        sizes = {"x": problem.x.image, "y": problem.y.image}
        tensors = {
            role: torch.randint(0, 60, (problem.batch * size * DTYPES[dtype],), device="cuda")
            for role, size in sizes.items()
        }
        tensors = {role: tensor.to(torch.uint8) for role, tensor in tensors.items()}
        recipes = recipes_of(layer, dtype, capability())
        times = []
        for recipe in recipes:
            us = median_us(prepared(recipe, tensors, capability()), 10, 3)
            times.append((us, f"{recipe.tactic[:4]} {recipe.config}"))
        first, order = times[0], sorted(times)
        tera = 2e-6 * problem.rows * problem.k * problem.out_channels
        best, config = order[0]
        try:
            rival = rival_us(layer.size, dtype)
        except RuntimeError as error:
            rival = float("nan")
            lines.append(str(error)[:90])
        lines.append(
            f"{layer.name:20} {dtype:12} {best:8.1f} us {tera / best:6.0f} T/s, torch {rival:8.1f}"
            f" us {tera / rival:6.0f} T/s: {config}; first guess {first[0]:.1f} us"
        )
        lines.append("      " + "; ".join(f"{us:.1f} {config}" for us, config in order[1:]))
    with capsys.disabled():
        print("\n" + "\n".join(lines))

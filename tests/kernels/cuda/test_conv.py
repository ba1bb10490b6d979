"""Products and convolutions in Triton's interpreter, against the definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.cuda.conv_cases import Case, Size
from tests.kernels.cuda.interpret import interpret
from twofour.core.functions import Activation
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv, conv_depthwise
from twofour.kernels.cuda.conv_pack import (
    merged,
    pack,
    pad_constant,
    paired,
    stored,
    unpack,
    widened,
)
from twofour.kernels.cuda.conv_tiles import Tile, tiles_of
from twofour.kernels.cuda.finish import finish_constants
from twofour.kernels.cuda.kernel import SHARED_BYTES, compile_kernel, of_capability
from twofour.kernels.cuda.problem import ConvProblem, Finish

TYPES = ["int8", "float8e4m3fn", "float16", "bfloat16", "float32"]
THREE = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
SMALL = Tile(16, 32, 32, 4, 2)


def run(problem: ConvProblem, tile: Tile, seed: int = 0) -> None:
    """One tile on random data."""
    case = Case.of(problem, seed)
    dense, w = paired(*widened(*merged(problem, case.arrays["w"])))
    packed = {"w": pack(w, problem.x.dtype), **finish_constants(problem, case.arrays)}
    packed |= pad_constant(dense)
    tensors = case.tensors()
    real = problem.x.dtype != "int8" and dense.groups == 1 == problem.groups
    true = problem.channels if real else 0
    interpret(conv._recipe(dense, tile, packed, true), tensors)
    assert case.wrong(tensors["y"]) == ""


@pytest.mark.parametrize("dtype", TYPES)
def test_products(dtype: str) -> None:
    run(Size(19, 1, 1, 64, 40).problem(dtype, dtype), SMALL)
    run(Size(1, 3, 5, 70, 33, gap=2).problem(dtype, "float32", "float32"), SMALL)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [64, 24])
def test_windows(dtype: str, channels: int) -> None:
    """64 channels: a step has one tap; 24: every k has its own."""
    run(Size(2, 4, 5, channels, 20, THREE, gap=3).problem(dtype, dtype), SMALL)


@pytest.mark.parametrize(
    "window",
    [
        Window((7, 7), (2, 2), (1, 1), (3, 3, 3, 3)),
        Window((1, 1), (2, 2)),
        Window((3, 2), (1, 2), (2, 1), (0, 2, 3, 1)),
        Window((3, 3), (2, 2), (1, 1), (0, 0, 1, 1)),
        Window((2, 2)),
        Window((1, 1), (1, 1), (1, 1), (1, 2, 0, 1)),
    ],
)
@pytest.mark.parametrize("channels", [3, 32])
def test_strides_paddings_and_dilations(window: Window, channels: int) -> None:
    run(Size(2, 7, 8, channels, 9, window).problem("int8", "int8"), SMALL)


def test_several_programs_share_the_steps() -> None:
    for splits in (2, 3, 4):
        tile = replace(SMALL, splits=splits)
        run(Size(2, 3, 3, 32, 40, THREE).problem("int8", "int8"), tile)
        run(Size(5, 1, 1, 160, 40).problem("float16", "float16", "float16"), tile)


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_groups(groups: int) -> None:
    run(Size(1, 3, 3, 16, 32, THREE, groups).problem("int8", "int8"), SMALL)


def test_groups_too_large_to_be_merged() -> None:
    run(Size(1, 2, 3, 128, 80, THREE, 2).problem("int8", "int8"), SMALL)
    run(Size(1, 2, 3, 128, 80, THREE, 2).problem("float16", "float16"), replace(SMALL, splits=2))


def test_the_end_is_fused() -> None:
    finish = Finish(0.02, Activation("Silu"), y_factor=10.0, y_zero=-100)
    run(Size(2, 3, 3, 32, 20, THREE).problem("int8", "int8", "int8", finish), SMALL)
    by_rows = Finish(activation=Activation("Gelu"), by_rows=True)
    run(Size(20, 1, 1, 64, 20).problem("int8", "float16", finish=by_rows), SMALL)


def test_images_and_rows_may_lie_apart() -> None:
    problem = Size(2, 3, 4, 32, 20, THREE).problem("int8", "int8", "int8")
    x = replace(problem.x, row=problem.x.row + 40, image=4 * problem.x.image)
    y = replace(problem.y, row=problem.y.row + 11, image=3 * problem.y.image)
    run(replace(problem, x=x, y=y), SMALL)
    run(replace(problem, x=x, window=Window((1, 1))), SMALL)


@pytest.mark.parametrize("dtype", TYPES)
def test_gaps_count_as_channels(dtype: str) -> None:
    """What lies in the gaps is no number, where the type has such."""
    window = Window((5, 5), (2, 2), (1, 1), (2, 2, 2, 2))
    problem = Size(1, 7, 7, 3, 8, window, gap=1).problem(dtype, "float32")
    wide, w = widened(problem, np.ones((8, 3, 5, 5), np.int8))
    assert (wide.channels, w.shape) == (4, (8, 4, 5, 5))
    assert not w[:, 3].any()
    case = Case.of(problem)
    recipe = conv.recipes(problem, case.arrays, 90, effort=0)[0]
    tensors = case.tensors()
    pixels = tensors["x"].view(-1, 4)
    pixels[:, 3] = 99 if dtype == "int8" else torch.tensor(float("nan")).to(pixels.dtype)
    interpret(recipe, tensors)
    assert case.wrong(tensors["y"]) == ""
    dense = replace(problem, x=replace(problem.x, pixel=3))
    assert widened(dense, w)[0] is dense


@pytest.mark.parametrize("pads", [(3, 3, 3, 3), (0, 2, 1, 2), (1, 1, 0, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("kernel", [(7, 7), (3, 4), (2, 1)])
def test_pairs_of_pixels(kernel: tuple[int, int], pads: tuple[int, int, int, int]) -> None:
    """Pixels of 3 channels with room for 4, two at once; odd and even beginnings and ends."""
    window = Window(kernel, (2, 2), (1, 1), pads)
    problem = Size(2, 9, 10, 3, 12, window, gap=1).problem("int8", "int8", "int8")
    dense, _ = paired(*widened(problem, np.ones((12, 3, *kernel), np.int8)))
    assert dense.channels == 8
    assert dense.out_size == problem.out_size
    run(problem, SMALL)


def test_what_steps_over_one_pixel_has_no_pairs() -> None:
    for window, width in ((THREE, 8), (Window((3, 3), (2, 2)), 9)):
        problem = Size(1, 7, width, 3, 8, window, gap=1).problem("int8", "int8")
        assert paired(*widened(problem, np.ones((8, 3, 3, 3), np.int8)))[0].channels == 4


def test_weights_come_back_from_their_packing() -> None:
    w = np.random.default_rng(0).integers(-128, 128, (5, 6, 3, 2)).astype(np.int8)
    packed = pack(w, "int8")
    assert packed.shape == (5, 128)
    np.testing.assert_array_equal(unpack(packed, w.shape), w)


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("rows", [1, 49, 128, 3136, 802816])
@pytest.mark.parametrize("dtype", TYPES)
def test_tiles_fit_the_gpu(capability: int, rows: int, dtype: str) -> None:
    for channels, outs in ((3, 64), (64, 64), (768, 3072), (2048, 1000)):
        problem = Size(rows, 1, 1, channels, outs).problem(dtype, dtype)
        tiles = tiles_of(problem, capability)
        assert tiles
        room = of_capability(SHARED_BYTES, capability)
        for tile in tiles:
            each = np.dtype(stored(np.zeros(1, np.float32), dtype).dtype).itemsize
            assert (tile.m + tile.n) * tile.k * tile.stages * each <= room
            steps = -(-channels // tile.k)
            assert tile.splits <= max(1, steps // 2)


def test_no_float8_on_gpus_without_it() -> None:
    case = Case.of(Size(16, 1, 1, 64, 64).problem("float8e4m3fn", "float16"))
    assert conv.recipes(case.problem, case.arrays, 80) == ()
    assert len(conv.recipes(case.problem, case.arrays, 90, effort=0)) == 1


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_they_compile(capability: int, dtype: str) -> None:
    case = Case.of(Size(2, 8, 8, 64, 64, THREE).problem(dtype, dtype, dtype))
    recipe = conv.recipes(case.problem, case.arrays, capability, effort=0)[0]
    for call in recipe.calls:
        assert len(compile_kernel(call, capability).cubin) > 1000


@pytest.mark.parametrize("dtype", TYPES)
def test_depthwise(dtype: str) -> None:
    for size in (
        Size(2, 5, 4, 40, 40, THREE, 40, gap=3),
        Size(1, 5, 6, 8, 16, Window((5, 3), (2, 1), (1, 2), (2, 0, 1, 2)), 8),
        Size(1, 3, 3, 33, 33, Window((2, 2)), 33),
    ):
        case = Case.of(size.problem(dtype, dtype))
        recipe = conv_depthwise.recipes(case.problem, case.arrays, 90, effort=0)[0]
        tensors = case.tensors()
        interpret(recipe, tensors)
        assert case.wrong(tensors["y"]) == ""


def test_depthwise_compiles_and_leaves_other_groups_alone() -> None:
    case = Case.of(Size(2, 9, 9, 64, 64, THREE, 64).problem("int8", "int8"))
    for capability in (80, 90):
        recipe = conv_depthwise.recipes(case.problem, case.arrays, capability, effort=0)[0]
        assert len(compile_kernel(recipe.calls[0], capability).cubin) > 1000
    case = Case.of(Size(2, 9, 9, 64, 64, THREE, 32).problem("int8", "int8"))
    assert conv_depthwise.recipes(case.problem, case.arrays, 90) == ()

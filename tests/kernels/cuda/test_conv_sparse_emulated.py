"""The text of the 2:4 convolution, run on the CPU by an emulator that puts everything off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels.cuda.emulate import COMPILER, EmulatorError, emulate
from tests.kernels.cuda.test_conv_sparse import GROUPS, NARROW, WIDE, weight_of
from twofour.core.functions import Activation
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv_sparse_tiles
from twofour.kernels.cuda.conv_sparse import compressed_weight, dense_weight, pack, recipe
from twofour.kernels.cuda.conv_sparse_tiles import Tile, blocks_of, is_flat, workers
from twofour.kernels.cuda.kernel import NvidiaSource, Recipe
from twofour.kernels.cuda.problem import ConvProblem, Finish, View
from twofour.kernels.cuda.reference import conv_reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
Array = np.ndarray[Any, np.dtype[Any]]
ONE_GROUP = Tile(64, 64, 128, 4, wgmma=True)
DIRECT = Tile(128, 64, 128, 6, wgmma=True, direct=True)
THREE_GROUPS = Tile(192, 256, 384, 4, wgmma=True)
TWO_DIRECT = Tile(256, 32, 256, 4, wgmma=True, direct=True)
SAME = Window((3, 3), pads=(1, 1, 1, 1))
STRANGE = Window((3, 2), (2, 1), (1, 2), (0, 2, 1, 0))


def problem_of(window: Window, c: int, n: int, *, y: str = "int8", gap: int = 0) -> ConvProblem:
    """2 images of 5 x 6 pixels of int8."""
    out_h, out_w = window.output_size(5, 6)
    pixel = n + gap
    out = View(y, out_h * out_w * pixel + gap, out_w * pixel, pixel)
    finish = Finish(y_factor=0.5, y_zero=3, low=-90, high=100) if y == "int8" else Finish()
    x = View.dense("int8", 5, 6, c)
    return ConvProblem(2, 5, 6, c, n, x, out, window, finish=finish, x_zero=7)


def run(
    problem: ConvProblem,
    tile: Tile,
    folder: Path,
    *,
    change: str = "",
    recipe: Callable[..., Recipe] = recipe,
) -> Array:
    """The result, less what is expected; `change` is OLD -> NEW in the kernel's text."""
    rng, kind = np.random.default_rng(problem.k), problem.x.dtype
    n = problem.out_channels
    x = rng.integers(-100, 100, (2, 5, 6, problem.channels)).astype(np.int8)
    kernel_h, kernel_w = problem.window.kernel
    arrays: dict[str, Array] = {
        "x": x if kind == "int8" else (x / 64).astype(np.float16),
        "w": weight_of(n, problem.channels, 3)[:, :, :kernel_h, :kernel_w],
        "scale": rng.uniform(0.5, 1, n).astype(np.float32) / np.float32(50 * problem.k**0.5),
        "bias": rng.uniform(-20, 20, n).astype(np.float32),
    }
    if problem.r is not None:
        r = rng.integers(-60, 60, (2, *problem.out_size, n))
        arrays["r"] = r.astype(problem.r.dtype)
    arrays["row_scale"] = rng.uniform(0.5, 1, problem.rows).astype(np.float32)
    if tile.dense:
        arrays["w"] = rng.integers(-127, 128, arrays["w"].shape).astype(np.int8)
        weight: tuple[Array, ...] = (dense_weight(problem, arrays["w"]),)
    else:
        weight = compressed_weight(problem, arrays["w"])
    made = recipe(problem, arrays, tile, pack(weight, tile))
    if change:
        old, new = change.split(" -> ")
        made = changed(made, old, new)
    out_h, out_w = problem.out_size
    places = (
        np.arange(2)[:, None, None, None] * problem.y.image
        + np.arange(out_h)[:, None, None] * problem.y.row
        + np.arange(out_w)[:, None] * problem.y.pixel
        + np.arange(n)
    )
    found = []
    for eager in (False, True):
        stored = np.full(2 * problem.y.image, 77, problem.y.dtype)
        emulate(made, arrays | {"y": stored}, folder, kind, eager=eager)
        assert (np.delete(stored, places.reshape(-1)) == 77).all(), "wrote between the pixels"
        found.append(stored[places].astype(np.float64))
    if kind != "int8":
        arrays |= {"x": arrays["x"].astype(np.float32), "w": arrays["w"].astype(np.float32)}
    return np.stack(found) - conv_reference(problem, arrays)


def changed(made: Recipe, old: str, new: str) -> Recipe:
    """A recipe with other words in its kernels."""
    calls = [call for call in made.calls if isinstance(call, NvidiaSource)]
    assert all(old in call.text for call in calls)
    return replace(made, calls=tuple(replace(c, text=c.text.replace(old, new)) for c in calls))


@pytest.mark.parametrize(
    ("tile", "window"),
    [
        (WIDE, SAME),
        (GROUPS, STRANGE),
        (ONE_GROUP, SAME),
        (NARROW, STRANGE),
        (DIRECT, STRANGE),
        (TWO_DIRECT, SAME),
        (THREE_GROUPS, STRANGE),
    ],
    ids=["wide", "groups", "one group", "narrow", "direct", "two direct", "three groups"],
)
def test_convolutions(tile: Tile, window: Window, tmp_path: Path) -> None:
    """Padding, strides, dilation; ends of channels, pixels and K that fill nothing."""
    problem = problem_of(window, 48, 72, gap=8 if window is STRANGE else 0)
    assert np.abs(run(problem, tile, tmp_path)).max() <= 1


@pytest.mark.parametrize("tile", [THREE_GROUPS, GROUPS, NARROW, DIRECT], ids=str)
@pytest.mark.parametrize(("channels", "split", "zero"), [(48, 1, 7), (256, 1, 0), (256, 2, 0)])
def test_products(tile: Tile, channels: int, split: int, zero: int, tmp_path: Path) -> None:
    """Pixels that lie side by side, fewer than a block has; K ends within a step, or not."""
    problem = replace(problem_of(Window((1, 1)), channels, 200), x_zero=zero)
    assert is_flat(problem)
    assert np.abs(run(problem, replace(tile, split=split), tmp_path)).max() <= 1


@pytest.mark.parametrize("tile", [NARROW, ONE_GROUP, DIRECT], ids=str)
def test_split_sums_and_residuals(tile: Tile, tmp_path: Path) -> None:
    problem = problem_of(SAME, 128, 70)
    residual = View.dense("int8", 5, 6, 70)
    finish = replace(problem.finish, residual_scale=0.3)
    problem = replace(problem, r=residual, finish=finish)
    assert np.abs(run(problem, replace(tile, split=4), tmp_path)).max() <= 1


STAYING = [
    Tile(64, 8, 128, 8, wgmma=True, blocks=2, persistent=True),
    Tile(64, 16, 128, 4, wgmma=True, blocks=3, direct=True, persistent=True),
    Tile(128, 32, 256, 4, wgmma=True, persistent=True),
    Tile(128, 8, 128, 4, wgmma=True, blocks=2, persistent=True, held=True),
    Tile(64, 16, 128, 3, wgmma=True, blocks=4, persistent=True, held=True),
    Tile(64, 16, 128, 3, warps_m=2, persistent=True),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of one multiprocessor: blocks that stay have many parts of y."""
    monkeypatch.setattr(conv_sparse_tiles, "MULTIPROCESSORS", 1)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("tile", STAYING, ids=str)
@pytest.mark.parametrize("window", [SAME, STRANGE, Window((1, 1))], ids=["same", "strange", "flat"])
def test_blocks_that_stay(tile: Tile, window: Window, tmp_path: Path) -> None:
    """The next part of y is copied for while one is finished; channels end within a block."""
    problem = problem_of(window, 48, 200)
    residual = View.dense("int8", *problem.out_size, 200)
    problem = replace(problem, r=residual, finish=replace(problem.finish, residual_scale=0.3))
    assert 0 < workers(problem, tile) < blocks_of(problem, tile)
    assert np.abs(run(problem, tile, tmp_path)).max() <= 1


def test_bounds_between_steps(tmp_path: Path) -> None:
    """What bounds a result in steps is rounded as the result is."""
    problem = problem_of(SAME, 128, 70)
    finish = replace(problem.finish, low=-3.7, high=50.5, activation=Activation("Relu"))
    assert np.abs(run(replace(problem, finish=finish), NARROW, tmp_path)).max() == 0


@pytest.mark.parametrize("y", ["int8", "float32"])
def test_gelu(y: str, tmp_path: Path) -> None:
    """A result in steps has it by a polynomial, one that is real by an exponential."""
    problem = problem_of(SAME, 64, 24, y=y)
    finish = Finish(activation=Activation("Gelu"), y_factor=10.0 if y == "int8" else 1.0)
    away = np.abs(run(replace(problem, finish=finish), NARROW, tmp_path))
    assert away.max() <= (1 if y == "int8" else 1e-4)
    assert (away > 0.5).mean() < 0.01


@pytest.mark.parametrize("tile", [NARROW, ONE_GROUP, TWO_DIRECT], ids=str)
def test_half_precision(tile: Tile, tmp_path: Path) -> None:
    """One register of metadata serves two instructions."""
    problem = problem_of(SAME, 40, 24, y="float32")
    problem = replace(problem, x=View.dense("float16", 5, 6, 40), x_zero=0)
    assert np.abs(run(problem, tile, tmp_path)).max() <= 1e-3


@pytest.mark.parametrize(
    ("tile", "change"),
    [
        (NARROW, "wait_copies<STAGES - 2>() -> wait_copies<STAGES - 1>()"),
        (ONE_GROUP, "wait_copies<STAGES - 3>() -> wait_copies<STAGES - 2>()"),
        (ONE_GROUP, 'sync.aligned 1;" -> sync.aligned 3;"'),
        (DIRECT, "a[(i + 2) % 3] -> a[(i + 1) % 3]"),
        (NARROW, "half * 4 + (lane >> 3) -> half * 4 + (lane >> 4)"),
        (NARROW, "  wait_for_others(); -> (void)0;"),
        (ONE_GROUP, "  wait_for_others(); -> (void)0;"),
    ],
    ids=[
        *("copies", "copies of groups", "products of groups", "registers", "pieces"),
        *("others", "others of groups"),
    ],
)
def test_the_emulator_finds_mistakes(tile: Tile, change: str, tmp_path: Path) -> None:
    problem = problem_of(SAME, 128, 64)
    try:
        worst = np.abs(run(problem, tile, tmp_path, change=change)).max()
    except EmulatorError:
        return
    assert worst > 1


@pytest.mark.usefixtures("few")
def test_copies_that_come_too_early_are_found(tmp_path: Path) -> None:
    """Those for the next part replace the last step, which others still read."""
    change = "__syncthreads();  // all have read the last steps -> (void)0;"
    problem = problem_of(Window((1, 1)), 7 * 128, 64)
    with contextlib.suppress(EmulatorError):
        assert np.abs(run(problem, STAYING[-1], tmp_path, change=change)).max() > 1

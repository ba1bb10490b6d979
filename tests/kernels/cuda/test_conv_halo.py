"""2:4 convolutions that read x with its halo: run on the CPU by the emulator; what they take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.cuda.emulate import COMPILER, EmulatorError
from tests.kernels.cuda.test_conv_sparse_emulated import SAME, problem_of, run
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv_sparse_tiles
from twofour.kernels.cuda.conv_halo import (
    cells_of,
    chunk_bytes,
    halo_text,
    lines_of,
    parts_of,
    recipe,
    recipes,
    takes,
    tiles,
    workers,
)
from twofour.kernels.cuda.conv_sparse_tiles import Tile
from twofour.kernels.cuda.nvrtc import cubin_of
from twofour.kernels.cuda.problem import ConvProblem, View

emulated = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
WINDOWS = {
    "same": SAME,
    "far": Window((3, 3), dilation=(1, 2), pads=(1, 2, 1, 2)),
    "aside": Window((3, 2), pads=(0, 1, 2, 0)),
    "inside": Window((3, 1)),
    "wide": Window((1, 3), pads=(0, 2, 0, 2)),
}
TILES = [
    Tile(64, 16, 128, 2, wgmma=True, held=True),
    Tile(64, 24, 128, 2, wgmma=True, direct=True),
    Tile(128, 16, 256, 2, wgmma=True, held=True),
    Tile(128, 64, 128, 2, wgmma=True, direct=True),
    Tile(64, 32, 128, 2, wgmma=True, held=True, direct=True),
]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of one multiprocessor: blocks that stay have several parts of y."""
    monkeypatch.setattr(conv_sparse_tiles, "MULTIPROCESSORS", 2)
    yield


@emulated
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows(window: Window, tile: Tile, tmp_path: Path) -> None:
    """Padding on any side or none, dilation; channels that end within a block; a residual."""
    problem = problem_of(window, 64, 70, gap=8)
    residual = View.dense("int8", *problem.out_size, 70)
    problem = replace(problem, r=residual, finish=replace(problem.finish, residual_scale=0.3))
    assert takes(problem)
    assert np.abs(run(problem, tile, tmp_path, recipe=recipe)).max() <= 1


@emulated
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("channels", [128, 384])
def test_chunks(channels: int, tile: Tile, tmp_path: Path) -> None:
    """Channels of one chunk of 128 bytes, or of three, the next one copied meanwhile."""
    problem = problem_of(SAME, channels, 130)
    if not workers(problem, tile) or (tile.held and tile.direct):
        tile = replace(tile, held=False, direct=True)
    assert np.abs(run(problem, tile, tmp_path, recipe=recipe)).max() <= 1


@emulated
@pytest.mark.parametrize("r", ["int8", "float16", "float32"])
@pytest.mark.parametrize("y", ["int8", "float32"])
def test_residuals(y: str, r: str, tmp_path: Path) -> None:
    """In the room of y or in its own; factors of rows; pieces of 16 bytes."""
    problem = problem_of(SAME, 64, 80, y=y)
    finish = replace(problem.finish, residual_scale=0.3, by_rows=True)
    problem = replace(problem, r=View.dense(r, 5, 6, 80), finish=finish)
    worst = np.abs(run(problem, TILES[2], tmp_path, recipe=recipe)).max()
    assert worst <= (1 if y == "int8" else 1e-3)


@emulated
@pytest.mark.parametrize("channels", [32, 128])
def test_half_precision(channels: int, tmp_path: Path) -> None:
    problem = problem_of(SAME, channels, 24, y="float32")
    problem = replace(problem, x=View.dense("float16", 5, 6, channels), x_zero=0)
    for number, tile in enumerate(TILES[:2]):
        (folder := tmp_path / str(number)).mkdir()
        assert np.abs(run(problem, tile, folder, recipe=recipe)).max() <= 1e-3


TWO_GROUPS = Tile(128, 16, 256, 2, wgmma=True, direct=True)


@emulated
@pytest.mark.parametrize(
    ("tile", "change"),
    [
        (TILES[1], "wait_copies<0>() -> wait_copies<1>()"),
        (TWO_GROUPS, "__syncthreads();  // this chunk -> (void)0;  //"),
        (TWO_GROUPS, "__syncthreads();  // all are done with the chunk -> (void)0;  //"),
        (TILES[1], 'sync.aligned 0;" -> sync.aligned 1;"'),
        (TILES[1], "a[(step + 2) % 3] -> a[(step + 1) % 3]"),
        (TILES[1], "row & 7 -> row & 3"),
        (TILES[1], "  wait_for_others(); -> (void)0;"),
    ],
    ids=["copies", "arrival", "room", "products", "registers", "swizzle", "others"],
)
def test_the_emulator_finds_mistakes(tile: Tile, change: str, tmp_path: Path) -> None:
    problem = problem_of(SAME, 256, 128)
    with contextlib.suppress(EmulatorError):
        assert np.abs(run(problem, tile, tmp_path, change=change, recipe=recipe)).max() > 1

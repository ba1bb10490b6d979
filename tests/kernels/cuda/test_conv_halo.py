"""Convolutions that read x with its halo: what they take; run on the CPU by the emulator."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.kernels.cuda.emulate import COMPILER, EmulatorError
from tests.kernels.cuda.test_conv_sparse import weight_of
from tests.kernels.cuda.test_conv_sparse_emulated import SAME, problem_of, run
from twofour.core.numerics import Window, patches
from twofour.kernels.cuda import conv_sparse_tiles
from twofour.kernels.cuda.conv_halo import (
    cells_of,
    dense_recipes,
    halo_text,
    lines_of,
    parts_of,
    recipe,
    recipes,
    resident,
    shared_bytes,
    takes,
    tiles,
    workers,
)
from twofour.kernels.cuda.conv_sparse_tiles import Tile
from twofour.kernels.cuda.kernel import divided
from twofour.kernels.cuda.nvrtc import cubin_of
from twofour.kernels.cuda.problem import ConvProblem, View

EMULATED = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
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
DENSE = [replace(tile, dense=True) for tile in TILES]


def name_of(tile: Tile) -> str:
    """Of a test."""
    return f"{tile}, dense" if tile.dense else str(tile)


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of two multiprocessors: blocks stay for several parts of y."""
    monkeypatch.setattr(conv_sparse_tiles, "MULTIPROCESSORS", 2)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 4)] * 4),
)
def test_cells(
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    """A tap lies as many cells further for every pixel of y, in what an image is around it."""
    window = Window(kernel, dilation=dilation, pads=pads)
    out_h, out_w = window.output_size(*size)
    assume(out_h > 0 and out_w > 0)
    problem = replace(problem_of(SAME, 64, 64), height=size[0], width=size[1], window=window)
    lines, pitch = lines_of(problem)
    x = np.arange(1, 1 + 2 * size[0] * size[1]).reshape(2, *size, 1)
    cells = np.zeros((2, lines, pitch), int)
    cells[:, pads[0] : pads[0] + size[0], pads[1] : pads[1] + size[1]] = x[..., 0]
    flat = np.append(cells.reshape(-1), np.zeros(20 * pitch, int))
    wanted = patches(x, window, 0)[..., 0]
    image, oh, ow, kh, kw = np.indices(wanted.shape)
    first = (image * lines + oh) * pitch + ow
    assert first.max() < cells_of(problem)
    assert len(np.unique(first)) == 2 * out_h * out_w
    found = flat[first + kh * dilation[0] * pitch + kw * dilation[1]]
    assert (found == wanted).all()


LAYERS = [(64, 56), (128, 28), (256, 14), (512, 7)]


@pytest.mark.parametrize(("channels", "size"), LAYERS)
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("dense", [False, True])
def test_tiles_of_resnet(channels: int, size: int, batch: int, dtype: str, dense: bool) -> None:
    """They fit the GPU, and all parts of y have a block; the weight is held where it is short."""
    problem = layer(channels, size, batch, dtype)
    found = tiles(problem, 90, dense=dense)
    assert found
    for tile in found:
        assert shared_bytes(problem, tile) <= 227 * 1024
        assert 1 <= resident(problem, tile) <= tile.blocks
        started = workers(problem, tile)
        assert 0 < started <= parts_of(problem, tile)
        if tile.held:
            assert started % divided(channels, tile.channels) == 0
    if (channels, dtype) == (64, "int8"):
        assert any(tile.held and tile.direct for tile in found)


def layer(channels: int, size: int, batch: int, dtype: str) -> ConvProblem:
    """3x3 of ResNet."""
    view = View.dense(dtype, size, size, channels)
    return ConvProblem(batch, size, size, channels, channels, view, view, SAME)


def test_fewer_pixels_give_all_multiprocessors_as_much() -> None:
    """256 images of 14 x 14: with 224 pixels 516 parts are four rounds of 132; with 256 just so."""
    found = tiles(layer(256, 14, 256, "int8"), 90)
    assert any((tile.channels, tile.pixels) == (128, 224) for tile in found)


def test_what_is_not_taken() -> None:
    """Strides, other windows and channels, other GPUs, a weight that is not 2:4."""
    plain = problem_of(SAME, 64, 64)
    constants = {"w": weight_of(64, 64, 3), "scale": np.ones(64, np.float32)}
    assert recipes(plain, constants, 90)
    assert not recipes(plain, constants, 80)
    assert not recipes(plain, constants, 100)
    assert not recipes(plain, {**constants, "w": np.ones((64, 64, 3, 3), np.int8)}, 90)
    assert dense_recipes(plain, {**constants, "w": np.ones((64, 64, 3, 3), np.int8)}, 90)
    assert not dense_recipes(plain, constants, 80)
    assert not takes(problem_of(Window((3, 3), (2, 2), pads=(1, 1, 1, 1)), 64, 64))
    assert not takes(problem_of(Window((1, 1), (2, 2)), 64, 64))
    assert not takes(problem_of(Window((1, 1)), 1024, 64))
    for window in (SAME, Window((1, 1))):
        assert takes(of_bytes(window, 2**34))
        assert not takes(of_bytes(window, 2**36))
    assert not takes(problem_of(Window((2, 2)), 64, 64))
    assert not takes(problem_of(SAME, 96, 64))


def of_bytes(window: Window, size: int) -> ConvProblem:
    """Images of 64 channels of int8 by 512 x 512, so many bytes of them."""
    view = View.dense("int8", 512, 512, 64)
    return ConvProblem(size // view.image, 512, 512, 64, 64, view, view, window)


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float8e4m3fn"])
def test_it_compiles(dtype: str) -> None:
    """For all types: two chunks of channels, or one of 64 bytes whose weight registers hold."""
    size = 2 if "16" in dtype else 1
    for channels in (64 // size, 256 // size):
        view = View.dense(dtype, 14, 14, channels)
        problem = ConvProblem(2, 14, 14, channels, channels, view, view, SAME, r=view)
        chosen = tiles(problem, 90) + tiles(problem, 90, dense=True)
        for tile in {(t.held, t.direct, t.dense): t for t in chosen}.values():
            assert cubin_of(halo_text(problem, tile, "conv_halo"), 90)


@EMULATED
@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("tile", TILES + DENSE, ids=name_of)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows(window: Window, tile: Tile, tmp_path: Path) -> None:
    """Padding on any side or none, dilation; channels that end within a block; a residual."""
    problem = problem_of(window, 64, 70, gap=8)
    residual = View.dense("int8", *problem.out_size, 70)
    problem = replace(problem, r=residual, finish=replace(problem.finish, residual_scale=0.3))
    assert takes(problem)
    assert np.abs(run(problem, tile, tmp_path, recipe=recipe)).max() <= 1


@EMULATED
@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("tile", TILES + DENSE, ids=name_of)
@pytest.mark.parametrize("channels", [128, 384])
def test_chunks(channels: int, tile: Tile, tmp_path: Path) -> None:
    """Channels of one chunk of 128 bytes, or of three, the next one copied meanwhile."""
    problem = problem_of(SAME, channels, 130)
    if not workers(problem, tile) or (tile.held and tile.direct):
        tile = replace(tile, held=False, direct=True)
    assert np.abs(run(problem, tile, tmp_path, recipe=recipe)).max() <= 1


@EMULATED
@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("tile", TILES + DENSE, ids=name_of)
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_products(channels: int, tile: Tile, tmp_path: Path) -> None:
    """All channels in one chunk, of up to four planes; pixels and channels that end in a block."""
    problem = problem_of(Window((1, 1)), channels, 120)
    residual = View.dense("int8", 5, 6, 120)
    problem = replace(problem, r=residual, finish=replace(problem.finish, residual_scale=0.3))
    assert np.abs(run(problem, tile, tmp_path, recipe=recipe)).max() <= 1


@EMULATED
@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("r", ["int8", "float16", "float32"])
@pytest.mark.parametrize("y", ["int8", "float32"])
def test_residuals(y: str, r: str, tmp_path: Path) -> None:
    """In the room of y or in its own; factors of rows; pieces of 16 bytes."""
    problem = problem_of(SAME, 64, 80, y=y)
    finish = replace(problem.finish, residual_scale=0.3, by_rows=True)
    problem = replace(problem, r=View.dense(r, 5, 6, 80), finish=finish)
    worst = np.abs(run(problem, TILES[2], tmp_path, recipe=recipe)).max()
    assert worst <= (1 if y == "int8" else 1e-3)


@EMULATED
@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("channels", [32, 128])
def test_half_precision(channels: int, tmp_path: Path) -> None:
    problem = problem_of(SAME, channels, 24, y="float32")
    problem = replace(problem, x=View.dense("float16", 5, 6, channels), x_zero=0)
    for number, tile in enumerate(TILES[:2] + DENSE[:2]):
        (folder := tmp_path / str(number)).mkdir()
        assert np.abs(run(problem, tile, folder, recipe=recipe)).max() <= 1e-3


TWO_GROUPS = Tile(128, 16, 256, 2, wgmma=True, direct=True)


@EMULATED
@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize(
    ("tile", "channels", "change"),
    [
        (TILES[1], 256, "wait_copies<0>() -> wait_copies<1>()"),
        (DENSE[1], 256, "rows + (32 >> 4) -> rows + (64 >> 4)"),
        (DENSE[1], 256, "a[(step + 2) % 3] -> a[(step + 1) % 3]"),
        (TWO_GROUPS, 256, "__syncthreads();  // this chunk -> (void)0;  //"),
        (TWO_GROUPS, 256, "__syncthreads();  // all are done with the chunk -> (void)0;  //"),
        (TILES[1], 256, 'sync.aligned 0;" -> sync.aligned 1;"'),
        (TILES[1], 256, "a[(step + 2) % 3] -> a[(step + 1) % 3]"),
        (TILES[1], 256, "? phase & 7 -> ? phase & 3"),
        (TILES[1], 256, "  wait_for_others(); -> (void)0;"),
        (TILES[1], 256, "is_last ? part + WORKERS : part -> part + WORKERS"),
        (TWO_GROUPS, 256, "__syncthreads();  // places -> (void)0;  //"),
        (TILES[1], 256, "step != 0 || chunk != 0 -> chunk != 0"),
        (TILES[1], 128, "wait_copies<1>() -> wait_copies<2>()"),
        (TWO_GROUPS, 128, "__syncthreads();  // the residual -> (void)0;  //"),
    ],
    ids=[
        *("copies", "second half", "dense registers"),
        *("arrival", "room", "products", "registers", "swizzle", "others"),
        *("places", "places of others", "sums", "residual", "residual of others"),
    ],
)
def test_the_emulator_finds_mistakes(
    tile: Tile, channels: int, change: str, tmp_path: Path
) -> None:
    """With one chunk the residual's copies are the last but one."""
    problem = problem_of(SAME, channels, 128)
    r = View.dense("int8", 5, 6, 128)
    problem = replace(problem, r=r, finish=replace(problem.finish, residual_scale=0.9))
    with contextlib.suppress(EmulatorError):
        assert np.abs(run(problem, tile, tmp_path, change=change, recipe=recipe)).max() > 1


@EMULATED
@pytest.mark.usefixtures("_few")
def test_what_is_read_behind_the_weight_is_found(tmp_path: Path) -> None:
    """A weight of one step has no second one to be fetched."""
    problem, change = problem_of(Window((1, 1)), 64, 64), "if (STEPS > 1)  -> "
    assert np.abs(run(problem, TILES[1], tmp_path, recipe=recipe)).max() <= 1
    (other := tmp_path / "other").mkdir()
    with pytest.raises(EmulatorError, match="belongs to no operand"):
        run(problem, TILES[1], other, change=change, recipe=recipe)

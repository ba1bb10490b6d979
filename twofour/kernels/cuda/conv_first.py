"""Convolutions of int8 over pixels of four bytes: first layers, of images with few channels.

The code is conv_first.cu: x is copied to shared memory once for a tile of y, and the operands of
the tensor cores are read from it as they lie, a word of four channels for each tap. Elsewhere such
layers are bound by gathering their taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from twofour.kernels.cuda.conv_pack import stored
from twofour.kernels.cuda.conv_sparse_text import (
    C_TYPES,
    end_parameters,
    end_roles,
    ends_of,
    joined,
    source_of,
)
from twofour.kernels.cuda.finish import finish_constants
from twofour.kernels.cuda.kernel import Array, NvidiaSource, Recipe, divided
from twofour.kernels.cuda.problem import ConvProblem

NAME = "conv_first"
BODY = source_of("conv_first.cu")
WORD, LANE_TAPS, MOST_TAPS, MOST_SIDE = 4, 8, 64, 16
_MULTIPROCESSORS, _MOST_SHARED = 132, 96 * 1024


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        rows: of y, that a block computes at a time.
        columns: of y, a multiple of 8.
        channels: of a block, a multiple of 16.
        threads: of a block.
        blocks: of a multiprocessor.
        together: times 8 pixels that a warp goes on with at once.
    """

    rows: int
    columns: int
    channels: int
    threads: int
    blocks: int
    together: int = 1

    def __str__(self) -> str:
        """Such as 8x32 pixels, 16 at once, 64 channels, 128 threads."""
        pixels = f"{self.rows}x{self.columns} pixels, {8 * self.together} at once"
        return f"{pixels}, {self.channels} channels, {self.threads} threads"


_SHAPES = (
    (8, 32, 128, 2, 2),
    (8, 32, 128, 2, 1),
    (8, 16, 128, 2, 2),
    (8, 16, 128, 2, 1),
    (16, 32, 256, 1, 2),
    (4, 32, 128, 2, 2),
    (4, 64, 256, 1, 2),
)
"""(rows, columns, threads, blocks, together)."""


def refusals(problem: ConvProblem, capability: int) -> tuple[str, ...]:
    """Why the kernel does not take the problem; () where it does.

    Args:
        problem: the convolution.
        capability: of the GPU, 90 for 9.0.
    """
    x, found = problem.x, []
    if x.dtype != "int8" or x.pixel != WORD or x.row % WORD or x.image % WORD:
        found.append("pixels of x are not words of four bytes")
    if capability < 80:
        found.append("the GPU has no such tensor cores")
    if problem.groups != 1 or problem.r is not None or problem.finish.by_rows:
        found.append("it has groups, a residual or scales of rows")
    kernel_h, kernel_w = problem.window.kernel
    if kernel_h * kernel_w > MOST_TAPS or max(kernel_h, kernel_w) > MOST_SIDE:
        found.append(f"a window of {kernel_h}x{kernel_w} taps")
    if problem.y.dtype not in C_TYPES or (problem.y.dtype == "float8e4m3fn" and capability < 89):
        found.append(f"no conversion to {problem.y.dtype}")
    return tuple(found)


def recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """The candidates, the best guess first; none where the kernel does not take the problem.

    Roles: those of a `ConvProblem`, and constants of the recipe.

    Args:
        problem: the convolution.
        constants: "w" [N, C, KH, KW] int8; "scale" and "bias" float32 [N], where there are such.
        capability: of the GPU, 90 for 9.0.
        effort: 0 for the best guess alone, 2 for all.
    """
    if refusals(problem, capability):
        return ()
    chosen = tiles(problem)[: (1, 4, None)[min(effort, 2)]]
    return tuple(recipe(problem, constants, tile) for tile in chosen)


def tiles(problem: ConvProblem) -> list[Tile]:
    """Those that fit, the best guess first; many channels are shared out to several blocks."""
    wide = 64 if problem.out_channels > 32 else 32 if problem.out_channels > 16 else 16
    found = [
        Tile(rows, columns, channels, threads, blocks * (64 // channels), together)
        for channels in dict.fromkeys((wide, min(wide, 32)))
        for rows, columns, threads, blocks, together in _SHAPES
    ]
    return [tile for tile in found if shared_bytes(problem, tile) <= _MOST_SHARED]


def recipe(problem: ConvProblem, constants: Mapping[str, Array], tile: Tile) -> Recipe:
    """The kernel with one tile.

    Args:
        problem: the convolution.
        constants: as of `recipes`.
        tile: how the work is cut.
    """
    biased = "bias" in constants
    ends = [(role, "float32") for role in end_roles(problem, biased)[:-1]]
    call = NvidiaSource(
        _text(problem, tile, biased),
        NAME,
        (("x", "int8"), ("w", "uint8"), *ends, ("y", problem.y.dtype)),
        (_workers(problem, tile) * _channel_blocks(problem, tile), 1, 1),
        tile.threads,
        shared_bytes(problem, tile),
    )
    held = {**finish_constants(problem, constants), "w": pack(constants["w"], tile)}
    return Recipe(NAME, str(tile), (call,), held)


def pack(w: Array, tile: Tile) -> Array:
    """The weight as the lanes of a warp hold it.

    Args:
        w: [N, C, KH, KW], of four channels at most.
        tile: of the kernel.

    Returns:
        uint8 [blocks of channels, blocks of 8 taps, tiles of 16 channels, lanes, 16]: words of
        rows g and g + 8 at tap t, then at tap t + 4, where the lane is 4 g + t. Rows g and g + 8 of
        tile m are the channels g * run + 2 m and the next one, run being twice as many as tiles.
    """
    n, c, *kernel = w.shape
    taps = int(np.prod(kernel))
    blocks, steps = divided(n, tile.channels), divided(taps, LANE_TAPS)
    words = np.zeros((blocks * tile.channels, steps * LANE_TAPS, WORD), np.int8)
    words[:n, :taps, :c] = stored(w, "int8").reshape(n, c, taps).transpose(0, 2, 1)
    count = tile.channels // 16
    # channel -> (g, m, half), tap -> (step, later, t)
    parts = words.reshape(blocks, 8, count, 2, steps, 2, 4, WORD)
    lanes = parts.transpose(0, 4, 2, 1, 6, 5, 3, 7)  # block, step, m, g, t, later, half, byte
    return np.ascontiguousarray(lanes).reshape(blocks, steps, count, 32, 16).view(np.uint8)


def shared_bytes(problem: ConvProblem, tile: Tile) -> int:
    """Shared memory of a block: a part of x, and the next one."""
    rows, columns = _input_size(problem, tile)
    return 2 * divided(rows * columns * WORD, 16) * 16


def _input_size(problem: ConvProblem, tile: Tile) -> tuple[int, int]:
    """Rows and columns of x that a tile of y looks at."""
    window, sizes = problem.window, (tile.rows, tile.columns)
    rows, columns = (
        (size - 1) * window.stride[axis] + (window.kernel[axis] - 1) * window.dilation[axis] + 1
        for axis, size in enumerate(sizes)
    )
    return rows, columns


def _channel_blocks(problem: ConvProblem, tile: Tile) -> int:
    return divided(problem.out_channels, tile.channels)


def _tile_counts(problem: ConvProblem, tile: Tile) -> tuple[int, int]:
    out_h, out_w = problem.out_size
    return divided(out_h, tile.rows), divided(out_w, tile.columns)


def _workers(problem: ConvProblem, tile: Tile) -> int:
    """Blocks for the same channels, each with every so manieth tile."""
    down, across = _tile_counts(problem, tile)
    most = divided(_MULTIPROCESSORS * tile.blocks, _channel_blocks(problem, tile))
    return min(problem.batch * down * across, most)


def _text(problem: ConvProblem, tile: Tile, biased: bool) -> str:
    """The source. Parameters: x, w, then `end_roles`."""
    parameters = [f"const char* __restrict__ {name}" for name in ("x", "w")]
    down, across = _tile_counts(problem, tile)
    rows, columns = _input_size(problem, tile)
    kernel_h, kernel_w = problem.window.kernel
    constants = {
        "SYMBOL": NAME,
        "PARAMETERS": ", ".join(parameters + end_parameters(problem, biased)),
        "ENDS": ends_of(problem, biased),
        "THREADS": tile.threads,
        "BLOCKS": tile.blocks,
        "TR": tile.rows,
        "TC": tile.columns,
        "TOGETHER": tile.together,
        "BM": tile.channels,
        "TILES_M": tile.channels // 16,
        "CHANNEL_BLOCKS": _channel_blocks(problem, tile),
        "K_BLOCKS": divided(kernel_h * kernel_w, LANE_TAPS),
        "IN_ROWS": rows,
        "IN_COLUMNS": columns,
        "AREAS_Y": down,
        "AREAS_X": across,
        "AREAS": problem.batch * down * across,
        "WORKERS": _workers(problem, tile),
    }
    return joined(constants, problem, biased, "", BODY)

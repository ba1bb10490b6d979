"""Products on Hopper and later, in Triton: blocks come by descriptors, programs stay for all tiles.

The GPU's copy unit fetches a block of x or w by a descriptor of the whole tensor (TMA), which a
program writes to scratch memory first: threads compute no addresses, and what lies outside is 0.
There are as many programs as run at once; each goes from tile to tile, and the blocks of the next
one are on their way while the last one's results are stored.

    for tile in range(program, tiles, programs):
        for step in range(steps): sums += x[m ... m + BM, k ... k + BK] @ w[n ..., k ...].T
        y = finish(sums)

Weights as in conv.py. What it refuses: windows, groups, rows of x that are no multiple of 16 bytes
apart, float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import triton
import triton.language as tl

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.conv import Geometry, tile_at
from twofour.kernels.cuda.conv_pack import pack
from twofour.kernels.cuda.conv_tiles import MULTIPROCESSORS, Tile, guess
from twofour.kernels.cuda.finish import (
    Ends,
    finish,
    finish_constants,
    finish_operands,
    kernel_of,
)
from twofour.kernels.cuda.kernel import SHARED_BYTES, Array, Recipe, divided, of_capability
from twofour.kernels.cuda.problem import ConvProblem

_CAPABILITY = 90
_DESCRIPTORS_BYTES = 2 * 128
_ROW_BYTES = 16
_STEP_BYTES = 128
_AT_ONCE = 2
_SHAPES = (
    (128, 256, 8),
    (256, 128, 8),
    (128, 128, 8),
    (128, 128, 4),
    (64, 256, 4),
    (256, 64, 8),
    (128, 64, 4),
    (64, 128, 4),
    (64, 64, 4),
)
"""(m, n, warps)."""


def recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """Ways to run a product, the best guess first.

    Args:
        problem: what is computed.
        constants: see `conv.recipes`.
        capability: of the GPU, 90 for 9.0.
        effort: how many: 1, 2, 5, 12 for 0 to 3.

    Returns:
        None for what the file's text says it refuses.
    """
    dtype = problem.x.dtype
    uneven = problem.x.pixel * DTYPES[dtype] % _ROW_BYTES != 0
    if capability < _CAPABILITY or not problem.is_product or uneven or dtype == "float32":
        return ()
    packed = {"w": pack(constants["w"], dtype), **finish_constants(problem, constants)}
    found = _tiles(problem, capability)[: (1, 2, 5, 12)[min(effort, 3)]]
    return tuple(_recipe(problem, tile, packed, capability) for tile in found)


def _tiles(problem: ConvProblem, capability: int) -> list[Tile]:
    """Tiles that make sense, the best guess first."""
    k = _STEP_BYTES // DTYPES[problem.x.dtype]
    room = of_capability(SHARED_BYTES, capability)
    found = []
    for m, n, warps in _SHAPES:
        if (m > 64 and m // 2 >= problem.rows) or (n > 64 and n // 2 >= problem.out_channels):
            continue
        tiles = [Tile(m, n, k, warps, stages) for stages in (4, 3)]
        four, three = (room // _shared_bytes(tile) for tile in tiles)
        found += tiles[:1] * (four > 0) + tiles[1:] * (min(three, _AT_ONCE) > four)
    return sorted(found, key=lambda tile: (guess(problem, tile, capability), -tile.stages))


def _shared_bytes(tile: Tile) -> int:
    """Of a program: blocks that are loaded, and room to bring results into the order of y."""
    return tile.stages * (tile.m + tile.n) * _STEP_BYTES + tile.m * tile.n


def _programs(problem: ConvProblem, tile: Tile, capability: int) -> int:
    """As many programs as run at once, or as there are tiles."""
    tiles = divided(problem.rows, tile.m) * divided(problem.out_channels, tile.n)
    at_once = min(of_capability(SHARED_BYTES, capability) // _shared_bytes(tile), _AT_ONCE)
    return min(tiles, at_once * of_capability(MULTIPROCESSORS, capability))


def _recipe(
    problem: ConvProblem, tile: Tile, constants: dict[str, Array], capability: int
) -> Recipe:
    """One way: its kernel and its constants."""
    programs = _programs(problem, tile, capability)
    operands = {
        "x": ("x", problem.x.dtype),
        "w": ("w", problem.x.dtype),
        **finish_operands(problem, "bias" in constants),
        "y": ("y", problem.y.dtype),
    }
    numbers = {
        "G": Geometry.of(problem),
        "ENDS": Ends.of(problem),
        "T": replace(tile, warps=0, stages=0),
        "PROGRAMS": programs,
    }
    grid = (programs, 1, 1)
    call = kernel_of(_product, operands, numbers, grid, warps=tile.warps, stages=tile.stages)
    call = replace(call, own=("descriptors", _DESCRIPTORS_BYTES))
    scratch = {"descriptors": _DESCRIPTORS_BYTES * programs}
    return Recipe("product_descriptors", tile.text, (call,), constants, scratch)


@triton.jit
def _product(
    x,
    w,
    scale,
    row_scale,
    bias,
    r,
    numbers,
    y,
    G: tl.constexpr,
    ENDS: tl.constexpr,
    T: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    BM: tl.constexpr = T.m
    BN: tl.constexpr = T.n
    BK: tl.constexpr = T.k
    BAND: tl.constexpr = T.band
    tiles_m: tl.constexpr = (G.rows + BM - 1) // BM
    tiles_n: tl.constexpr = (G.outs + BN - 1) // BN
    steps: tl.constexpr = (G.k + BK - 1) // BK
    whole: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    of_x = tl.make_tensor_descriptor(
        x, shape=[G.rows, G.k], strides=[G.x.pixel, 1], block_shape=[BM, BK]
    )
    of_w = tl.make_tensor_descriptor(
        w, shape=[G.outs, G.k_packed], strides=[G.k_packed, 1], block_shape=[BN, BK]
    )
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, BAND)
        sums = tl.zeros((BM, BN), dtype=whole)
        for step in range(steps):
            a = of_x.load([tile_m * BM, step * BK])
            b = of_w.load([tile_n * BN, step * BK])
            sums = tl.dot(a, b.T, sums, out_dtype=whole)
        m = tile_m * BM + tl.arange(0, BM)
        n = tile_n * BN + tl.arange(0, BN)
        finish(sums, m, n, n < G.outs, scale, row_scale, bias, r, numbers, y, ENDS)

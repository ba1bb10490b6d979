"""Convolutions that step by one pixel, on Hopper: x is read with its halo, once for all taps.

What bounds a 3x3 convolution on tensor cores is how many bytes its blocks fetch: as an implicit
product it reads x nine times. Here a block copies its pixels and those around them, their halo,
once, and takes each tap from the same place in shared memory. Products of few channels are bound by
y and its residual, which here go by shared memory, in pieces of 16 bytes: a product is a window
without a halo. See conv_halo.cu.

The weight is 2:4, packed as for conv_sparse.py, or dense: both by the same kernel but for the
instruction, of which a dense weight needs twice as many.

What it takes: windows of 3, 6 or 9 taps with strides of 1, over channels of 64 bytes or of a
multiple of 128; products over 64, 128, 256 or 512 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda import conv_sparse_tiles
from twofour.kernels.cuda.conv_sparse import (
    WGMMA,
    compressed_weight,
    dense_weight,
    end_operands,
    packs,
    refusals,
    unsuitable,
)
from twofour.kernels.cuda.conv_sparse_text import (
    end_parameters,
    ends_of,
    joined,
    source_of,
    wgmma_text,
)
from twofour.kernels.cuda.conv_sparse_tiles import Tile, is_flat
from twofour.kernels.cuda.finish import finish_constants
from twofour.kernels.cuda.kernel import (
    SHARED_BYTES,
    Array,
    NvidiaSource,
    Recipe,
    divided,
    of_capability,
)
from twofour.kernels.cuda.problem import ConvProblem
from twofour.kernels.cuda.sparse_fragments import ROWS, STEP_BYTES, record_bytes, steps_of

DENSE = "wgmma"
BODY = source_of("conv_halo.cu")
_TAPS = (3, 6, 9)
_PRODUCT_BYTES = (64, 128, 256, 512)
_MOST_X_BYTES = 16 * 2**31
"""Places of cells are counted in pieces of 16 bytes, in 32 bits with a sign."""
_SHAPES = (
    (128, 256, 256, 1),
    (128, 128, 128, 2),
    (256, 128, 256, 1),
    (64, 256, 128, 2),
    (64, 192, 128, 2),
    (64, 128, 128, 3),
    (128, 64, 128, 3),
    (64, 64, 128, 3),
)
"""(channels, most pixels, threads, blocks of a multiprocessor)."""
_MOST_SETS = 5
"""Steps of a weight, of 16 channels for each warp, that registers hold."""
_REGISTERS, _SHARE_HELD = 65536, 0.8
"""Of a multiprocessor; how much of a thread's sums and a dense weight may take: more is spilled."""
_PIXELS_MULTIPLE, _LEAST_SHARE = 16, 0.75
_SLOWER, _SLOWER_DENSE, _FINISH_CYCLES, _PART_CYCLES = 1.35, 2.2, 0.12, 1500.0
"""Fitted to times of an H200: times that of sparse tensor cores; cycles of a value of y, a part."""


def takes(problem: ConvProblem) -> bool:
    """Whether its window and channels are such as this file takes."""
    window, size = problem.window, problem.channels * DTYPES[problem.x.dtype]
    if problem.batch * problem.x.image * DTYPES[problem.x.dtype] > _MOST_X_BYTES:
        return False
    if is_flat(problem):
        return size in _PRODUCT_BYTES
    taps = window.kernel[0] * window.kernel[1]
    channels = size == STEP_BYTES // 2 or size % STEP_BYTES == 0
    return taps in _TAPS and window.stride == (1, 1) and channels and cells_of(problem) < 2**31


def lines_of(problem: ConvProblem) -> tuple[int, int]:
    """Rows of cells of an image, and cells of a row.

    So many that what a window reads behind a row is the padding in front of the next one.
    """
    sizes = (problem.height, problem.width)
    window, outs = problem.window, problem.out_size
    found = []
    for size, out, kernel, dilation, pad in zip(
        sizes, outs, window.kernel, window.dilation, window.pads[:2], strict=True
    ):
        reach = (kernel - 1) * dilation
        found.append(max(pad + size, out + reach - pad, out))
    return found[0], found[1]


def cells_of(problem: ConvProblem) -> int:
    """From the first cell that a pixel of y begins at to behind the last."""
    if is_flat(problem):
        return problem.rows
    lines, pitch = lines_of(problem)
    out_h, out_w = problem.out_size
    return ((problem.batch - 1) * lines + out_h - 1) * pitch + out_w


def parts_of(problem: ConvProblem, tile: Tile) -> int:
    """Parts of y, as blocks compute them."""
    channels = divided(problem.out_channels, tile.channels)
    return channels * divided(cells_of(problem), tile.pixels)


def row_bytes(problem: ConvProblem) -> int:
    """Of the channels of a cell that lie side by side in shared memory."""
    return min(STEP_BYTES, problem.channels * DTYPES[problem.x.dtype])


def planes_of(problem: ConvProblem) -> int:
    """Rows that a block copies of each cell at once."""
    size = problem.channels * DTYPES[problem.x.dtype]
    return size // row_bytes(problem) if is_flat(problem) else 1


def shared_bytes(problem: ConvProblem, tile: Tile) -> int:
    """Of a block: two chunks of x, a weight that it holds there, rows of y, each pixel's place."""
    window, size = problem.window, DTYPES[problem.x.dtype]
    _, pitch = lines_of(problem)
    down, right = ((k - 1) * d for k, d in zip(window.kernel, window.dilation, strict=True))
    cells = tile.pixels + down * pitch + right
    plane = divided(cells * row_bytes(problem), 1024) * 1024
    in_shared = tile.held and not tile.direct
    held = steps_of(problem.k, size) * tile.weight_bytes(size) if in_shared else 0
    sizes = {DTYPES[view.dtype] for view in (problem.y, problem.r) if view is not None}
    rows = sum(tile.channels * each + 16 for each in sizes)
    return 2 * planes_of(problem) * plane + held + tile.pixels * (rows + 4) + 4 * cells


def tiles(problem: ConvProblem, capability: int, *, dense: bool = False) -> list[Tile]:
    """All that fit the GPU, the best guess first."""
    room = of_capability(SHARED_BYTES, capability)
    steps = steps_of(problem.k, DTYPES[problem.x.dtype])
    found: dict[Tile, float] = {}
    for channels, pixels, threads, blocks in _SHAPES:
        shape = Tile(channels, pixels, threads, 2, wgmma=True, blocks=blocks, dense=dense)
        ways = [replace(shape, held=True), replace(shape, direct=True)]
        if steps * shape.tiles_m <= _MOST_SETS:
            ways = [replace(shape, held=True, direct=True)]
        for way in ways:
            fitting = {
                tile: cost(problem, tile)
                for tile in _narrower(way)
                if shared_bytes(problem, tile) <= room
                and registers(problem, tile) <= _SHARE_HELD * _REGISTERS / threads / blocks
                and workers(problem, tile)
            }
            if fitting:
                best = min(fitting, key=fitting.__getitem__)
                found[best] = fitting[best]
    return sorted(found, key=found.__getitem__)


def _narrower(tile: Tile) -> list[Tile]:
    """The tile, and with fewer pixels: of some all multiprocessors get as many parts."""
    least = int(tile.pixels * _LEAST_SHARE)
    return [
        replace(tile, pixels=pixels) for pixels in range(tile.pixels, least - 1, -_PIXELS_MULTIPLE)
    ]


def registers(problem: ConvProblem, tile: Tile) -> int:
    """Of a thread, for its sums and steps of a dense weight."""
    sets = steps_of(problem.k, DTYPES[problem.x.dtype]) if tile.held and tile.direct else 3
    return tile.tiles_m * (tile.pixels // 2 + (16 * sets if tile.dense else 0))


def resident(problem: ConvProblem, tile: Tile) -> int:
    """Blocks that a multiprocessor has room for."""
    each = shared_bytes(problem, tile) + conv_sparse_tiles.RESERVED
    return min(tile.blocks, conv_sparse_tiles.SHARED // each)


def workers(problem: ConvProblem, tile: Tile) -> int:
    """Blocks that are started: as many as there is room for, if there are so many parts.

    Where each holds its weight, all of its parts have the same channels: 0 where there is no room
    for a block of each.
    """
    parts = parts_of(problem, tile)
    most = conv_sparse_tiles.MULTIPROCESSORS * resident(problem, tile)
    if tile.held:
        most -= most % divided(problem.out_channels, tile.channels)
    return min(parts, most)


def cost(problem: ConvProblem, tile: Tile) -> float:
    """A guess of the time in cycles, by which candidates are put in order.

    Blocks beside each other finish their parts while tensor cores work for the others.
    """
    size = DTYPES[problem.x.dtype]
    beside, area = resident(problem, tile), tile.channels * tile.pixels
    rounds = divided(parts_of(problem, tile), conv_sparse_tiles.MULTIPROCESSORS * beside)
    slower = _SLOWER_DENSE if tile.dense else _SLOWER
    products = slower * area / 64 * steps_of(problem.k, size)
    part = products + _FINISH_CYCLES * area / beside + _PART_CYCLES / beside
    return rounds * beside * part


def recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """The candidates for a 2:4 weight, the best guess first; none where none would be right.

    Roles and constants: as of `conv_sparse.recipes`.

    Args:
        problem: the convolution.
        constants: "w" [N, C, KH, KW], int8 or float32; "scale" and "bias" float32 [N], where the
            problem has such.
        capability: of the GPU, 90 for 9.0.
        effort: 0 for the best guess alone, 2 for up to 8.
    """
    if not _is_here(problem, capability) or refusals(problem, constants["w"], capability):
        return ()
    return _recipes(problem, constants, effort, dense=False)


def dense_recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """Those that take any weight; arguments as of `recipes`."""
    if not _is_here(problem, capability) or unsuitable(problem, capability):
        return ()
    return _recipes(problem, constants, effort, dense=True)


def _is_here(problem: ConvProblem, capability: int) -> bool:
    return capability == conv_sparse_tiles.WGMMA_CAPABILITY and takes(problem)


def _recipes(
    problem: ConvProblem, constants: Mapping[str, Array], effort: int, *, dense: bool
) -> tuple[Recipe, ...]:
    w = constants["w"]
    weight = (dense_weight(problem, w),) if dense else compressed_weight(problem, w)
    found = tiles(problem, conv_sparse_tiles.WGMMA_CAPABILITY, dense=dense)
    packed = packs(weight, found[: (1, 4, 8)[min(effort, 2)]])
    return tuple(recipe(problem, constants, *each) for each in packed)


def recipe(
    problem: ConvProblem, constants: Mapping[str, Array], tile: Tile, packed: Array
) -> Recipe:
    """The kernel with one tile.

    Args:
        problem: the convolution.
        constants: as of `recipes`.
        tile: how the work is cut.
        packed: the weight, of `conv_sparse.pack`.
    """
    biased = "bias" in constants
    call = NvidiaSource(
        halo_text(problem, tile, "conv_halo", biased=biased),
        "conv_halo",
        (("x", problem.x.dtype), ("w", "uint8"), *end_operands(problem, biased)),
        (workers(problem, tile), 1, 1),
        tile.threads,
        shared_bytes(problem, tile),
    )
    held = {**finish_constants(problem, constants), "w": packed}
    way = "y staged" if is_flat(problem) else "halo"
    return Recipe(DENSE if tile.dense else WGMMA, f"{tile}, {way}", (call,), held)


def halo_text(problem: ConvProblem, tile: Tile, symbol: str, *, biased: bool = True) -> str:
    """The CUDA C++. Parameters: x, w (records), then `end_roles`."""
    parameters = ["const char* __restrict__ x", "const char* __restrict__ w"]
    size = DTYPES[problem.x.dtype]
    lines, pitch = lines_of(problem)
    channel_blocks = divided(problem.out_channels, tile.channels)
    constants = {
        "SYMBOL": symbol,
        "PARAMETERS": ", ".join(parameters + end_parameters(problem, biased)),
        "ENDS": ends_of(problem, biased),
        "DIRECT": int(tile.direct),
        "BM": tile.channels,
        "BN": tile.pixels,
        "THREADS": tile.threads,
        "BLOCKS": tile.blocks,
        "TILES_M": tile.tiles_m,
        "HELD": int(tile.held),
        "IMAGES": problem.batch,
        "IMAGE_LINES": lines,
        "PITCH": pitch,
        "ROW": row_bytes(problem),
        "PLANES": planes_of(problem),
        "STEPS": steps_of(problem.k, size),
        "PARTS": parts_of(problem, tile),
        "WORKERS": workers(problem, tile),
        "CHANNEL_BLOCKS": channel_blocks,
        "M_TILES": channel_blocks * tile.channels // ROWS,
        "RECORD": record_bytes(size, dense=tile.dense),
        "QUADS": 4 if tile.dense else 2,
        "META_HALF": 128 if size == 1 else 0,
    }
    emitted = wgmma_text(problem, tile.pixels, dense=tile.dense, begins=True)
    return joined(constants, problem, biased, emitted, BODY)

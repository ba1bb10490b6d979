"""Convolutions and products whose weight is 2:4 along its channels, on sparse tensor cores.

An implicit product: no patches are copied anywhere, blocks read x itself, one tap after the other.
The tensor core skips the zeros: each of its instructions does twice the products of a dense one. It
takes the sparse operand first, so it computes y^T = w x^T. Two kernels, alike but for the
instruction:

    2:4 wgmma.sp    Hopper's, issued by four warps at once; x comes from shared memory
    2:4 mma.sp      Ampere's and later, one warp each; on Hopper it reaches about 60 % of the other

The code is conv_sparse.cu. The weight is packed here as records of what each lane of a warp holds,
in the order (step along K, 16 channels, record): see sparse_fragments.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from twofour.core.bfloat16 import to_bf16
from twofour.core.cuda_program import DTYPES
from twofour.core.float8 import to_fp8
from twofour.kernels.cuda.conv_sparse_text import (
    C_TYPES,
    INSTRUCTION_TYPES,
    MULTIPROCESSORS,
    Tile,
    conv_text,
    end_roles,
    finish_text,
    is_flat,
    sums_pitch,
    taps_inside,
    workers,
)
from twofour.kernels.cuda.finish import finish_constants
from twofour.kernels.cuda.kernel import Array, NvidiaSource, Recipe, divided
from twofour.kernels.cuda.problem import ConvProblem
from twofour.kernels.cuda.sparse_fragments import (
    NOTHING,
    STEP_BYTES,
    compress,
    is_two_four,
    padded,
    records,
    steps_of,
)

MMA, WGMMA = "2:4 mma.sp", "2:4 wgmma.sp"
WGMMA_CAPABILITY = 90
_LEAST_CAPABILITY = {"float8e4m3fn": 89}
_MMA_TILES = (
    Tile(128, 128, 256, 3, warps_m=2),
    Tile(128, 64, 256, 4, warps_m=4, blocks=2),
    Tile(64, 128, 256, 4, warps_m=2, blocks=2),
    Tile(64, 64, 128, 4, warps_m=2, blocks=3),
    Tile(64, 32, 128, 4, warps_m=2, blocks=4),
    Tile(64, 8, 128, 8, warps_m=4, blocks=4),
)
_THREE_GROUPS = Tile(192, 256, 384, 4, wgmma=True)
"""The most sums that registers hold, with no room for places in x: of flat pixels it needs one."""
_THREE_GROUPS_COST = 1.15
"""It reads the least, and was yet the fastest of hardly any product (on an H200 of none of equal
sizes, and of one of BERT's layers, in fp8, by 3 %): where nothing is timed, it is not the guess.
"""
_WGMMA_TILES = (
    _THREE_GROUPS,
    Tile(128, 256, 256, 4, wgmma=True),
    Tile(256, 128, 256, 4, wgmma=True),
    Tile(128, 128, 256, 4, wgmma=True, blocks=2),
    Tile(128, 128, 128, 4, wgmma=True, blocks=2),
    Tile(128, 64, 128, 4, wgmma=True, blocks=3),
    Tile(64, 256, 128, 4, wgmma=True),
    Tile(64, 128, 128, 4, wgmma=True, blocks=3),
    Tile(128, 64, 256, 4, wgmma=True, blocks=2),
    Tile(64, 64, 128, 4, wgmma=True, blocks=4),
    Tile(64, 32, 128, 4, wgmma=True, blocks=4),
    # Few pixels leave the tensor cores idle: the weight decides, and how much of it is on its way.
    Tile(128, 128, 256, 8, wgmma=True),
    Tile(64, 64, 128, 8, wgmma=True, blocks=2),
    Tile(64, 32, 128, 8, wgmma=True, blocks=3),
    Tile(64, 16, 128, 8, wgmma=True, blocks=3),
    Tile(64, 8, 128, 8, wgmma=True, blocks=4),
    Tile(64, 8, 128, 16, wgmma=True, blocks=2),
    Tile(128, 256, 256, 4, wgmma=True, direct=True),
    Tile(256, 128, 256, 8, wgmma=True, direct=True),
    Tile(128, 128, 256, 4, wgmma=True, blocks=2, direct=True),
    Tile(128, 128, 128, 4, wgmma=True, blocks=2, direct=True),
    Tile(128, 64, 128, 8, wgmma=True, blocks=3, direct=True),
    Tile(64, 128, 128, 4, wgmma=True, blocks=3, direct=True),
    Tile(64, 64, 128, 4, wgmma=True, blocks=4, direct=True),
    # Short sums are over before the next copies come: they begin earlier.
    Tile(256, 128, 256, 4, wgmma=True, persistent=True),
    Tile(128, 256, 256, 4, wgmma=True, persistent=True),
    Tile(128, 128, 256, 4, wgmma=True, blocks=2, persistent=True),
    Tile(128, 128, 128, 4, wgmma=True, blocks=2, persistent=True),
    Tile(64, 128, 128, 4, wgmma=True, blocks=3, persistent=True),
    Tile(64, 128, 128, 4, wgmma=True, blocks=3, direct=True, persistent=True),
    Tile(128, 64, 128, 4, wgmma=True, blocks=3, persistent=True),
)
_SHORT_STEPS = 12
_SPLITS = (1, 2, 4, 8)
_STEP_CYCLES, _START_CYCLES, _BYTES_CYCLE = 700.0, 3000.0, 36.0
_FINISH_THREADS = 256
_MAX_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 120: 99 * 1024}
_HOPPER_SHARED = 227 * 1024


def refusals(problem: ConvProblem, w: Array, capability: int) -> tuple[str, ...]:
    """Why no kernel here takes the problem; () where one does.

    Args:
        problem: the convolution.
        w: [N, C, KH, KW].
        capability: of the GPU, 90 for 9.0.
    """
    x, size, found = problem.x, DTYPES[problem.x.dtype], []
    if x.dtype not in INSTRUCTION_TYPES:
        found.append(f"x is {x.dtype}, sparse tensor cores take {', '.join(INSTRUCTION_TYPES)}")
    if capability < _LEAST_CAPABILITY.get(x.dtype, 80):
        found.append(f"the GPU has no sparse tensor cores for {x.dtype}")
    if problem.groups != 1:
        found.append(f"{problem.groups} groups, expected one")
    if x.pixel != problem.channels or any(s * size % 16 for s in (x.image, x.row, x.pixel)):
        found.append("pixels of x do not begin at multiples of 16 bytes")
    ends = [problem.y, *([] if problem.r is None else [problem.r])]
    found += [f"no conversion for {view.dtype}" for view in ends if view.dtype not in C_TYPES]
    if any(view.dtype == "float8e4m3fn" for view in ends) and capability < 89:
        found.append("the GPU does not know float8")
    if not is_two_four(np.moveaxis(w, 1, -1)):
        found.append("the weight is not 2:4 along its channels")
    return tuple(found)


def recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """The candidates, the best guess first; none where a kernel would not be right.

    Roles: those of a `ConvProblem`, and constants of the recipe.

    Args:
        problem: the convolution.
        constants: "w" [N, C, KH, KW], int8 or float32; "scale" and "bias" float32 [N], where the
            problem has such.
        capability: of the GPU, 90 for 9.0.
        effort: 0 for the best guess alone, 2 for up to 20.
    """
    if refusals(problem, constants["w"], capability):
        return ()
    compressed = compressed_weight(problem, constants["w"])
    chosen = tiles(problem, capability)[: (1, 8, 20)[min(effort, 2)]]
    packed: dict[bytes, Array] = {}  # many tiles want the weight in the same order
    found = []
    for tile in chosen:
        order = tile.order.tobytes()
        if order not in packed:
            packed[order] = pack(compressed, tile)
        found.append(recipe(problem, constants, tile, packed[order]))
    return tuple(found)


def tiles(problem: ConvProblem, capability: int) -> list[Tile]:
    """All that fit the GPU, the best guess first."""
    shared = _MAX_SHARED.get(capability, _HOPPER_SHARED if capability >= 90 else 99 * 1024)
    found = [
        replace(tile, split=split)
        for tile in candidates(problem, capability)
        for split in _SPLITS
        if tile.shared_bytes(DTYPES[problem.x.dtype]) <= shared
        and _is_split_fit(problem, tile, split)
    ]
    # A weight that goes past shared memory comes from the same cache: it gains little if anything.
    return sorted(found, key=lambda tile: (cost(problem, _shared(tile)), tile.direct))


def candidates(problem: ConvProblem, capability: int) -> tuple[Tile, ...]:
    """Tiles for a GPU. Hopper computes products of float8 with `wgmma` alone."""
    wgmma = list(_WGMMA_TILES if capability == WGMMA_CAPABILITY else ())
    if wgmma and not is_flat(problem):
        wgmma.remove(_THREE_GROUPS)
    no_mma = capability == WGMMA_CAPABILITY and problem.x.dtype == "float8e4m3fn"
    return (*wgmma, *(() if no_mma else _MMA_TILES))


def _shared(tile: Tile) -> Tile:
    """The same tile with its weight in shared memory: past it, two steps are on their way."""
    return replace(tile, direct=False, stages=4) if tile.direct else tile


def _is_split_fit(problem: ConvProblem, tile: Tile, split: int) -> bool:
    """Sums are split where there are too few blocks, and each part is some steps long."""
    steps = steps_of(problem.k, DTYPES[problem.x.dtype])
    if tile.persistent:
        parts, size = _blocks(problem, tile), DTYPES[problem.x.dtype]
        return split == 1 and steps <= _SHORT_STEPS and parts > workers(tile, parts, size)
    if split == 1:
        return True
    return _blocks(problem, tile) * split <= 2 * MULTIPROCESSORS and steps >= 4 * split


def _blocks(problem: ConvProblem, tile: Tile) -> int:
    """How many cover the result."""
    return divided(problem.out_channels, tile.channels) * divided(problem.rows, tile.pixels)


def cost(problem: ConvProblem, tile: Tile) -> float:
    """A guess of the time in cycles, by which candidates are put in order.

    A step is bound by the tensor cores, by what comes from the L2 cache, or, where few blocks share
    a multiprocessor, by how long that takes to come.
    """
    size = DTYPES[problem.x.dtype]
    steps = divided(steps_of(problem.k, size), tile.split)
    area = tile.channels * tile.pixels
    products = area / (64 if tile.wgmma else 32)
    wait = _STEP_CYCLES * 2 / max(tile.stages - 2, 2) / tile.blocks
    step = max(products, tile.stage_bytes(size) / _BYTES_CYCLE, wait)
    block = steps * step + area / 8
    blocks = _blocks(problem, tile) * tile.split
    rounds = divided(blocks, MULTIPROCESSORS * tile.blocks) * tile.blocks
    held = min(rounds, divided(blocks, MULTIPROCESSORS))
    whole = block * held + _START_CYCLES * (2 if tile.split > 1 else 1)
    return whole * (_THREE_GROUPS_COST if tile.threads == _THREE_GROUPS.threads else 1)


def compressed_weight(problem: ConvProblem, w: Array) -> tuple[Array, Array]:
    """What is kept of the weight, and its metadata, for all tiles.

    Args:
        problem: the convolution.
        w: [N, C, KH, KW], 2:4 along C.

    Returns:
        values [N, K / 2] and metadata [N, K / 4], K up to a whole step.
    """
    rows = in_order(problem, w)
    return compress(padded(converted(rows, problem.x.dtype)))


def in_order(problem: ConvProblem, w: Array) -> Array:
    """The weight [N, C, KH, KW] as rows [N, K] in the order of the kernel's steps."""
    n, channels, *_ = w.shape
    chunk = STEP_BYTES // DTYPES[problem.x.dtype] if taps_inside(problem) else channels
    parts = w.reshape(n, channels // chunk, chunk, *problem.window.kernel)
    return parts.transpose(0, 1, 3, 4, 2).reshape(n, -1)


def pack(compressed: tuple[Array, Array], tile: Tile) -> Array:
    """The weight as a kernel reads it.

    Args:
        compressed: of `compressed_weight`.
        tile: of the kernel.

    Returns:
        uint8 [steps, tiles of 16 channels, bytes of a record].
    """
    blocks = divided(compressed[0].shape[0], tile.channels)
    order = (np.arange(blocks)[:, None] * tile.channels + tile.order).reshape(-1)
    found = []
    for array, fill in zip(compressed, (0, NOTHING), strict=True):
        missing = order.size - array.shape[0]
        found.append(np.pad(array, ((0, missing), (0, 0)), constant_values=fill)[order])
    return records(*found)


def converted(w: Array, dtype: str) -> Array:
    """The weight in the type of x; the bits of bfloat16 and float8 as unsigned integers."""
    if dtype == "int8":
        return w.astype(np.int8)
    real = w.astype(np.float32) + np.float32(0)  # -0 becomes 0, which is not kept
    if dtype == "float16":
        return real.astype(np.float16)
    return to_bf16(real) if dtype == "bfloat16" else to_fp8(real)


def recipe(
    problem: ConvProblem,
    constants: Mapping[str, Array],
    tile: Tile,
    packed: Array,
) -> Recipe:
    """The kernel with one tile, or two kernels where sums are split.

    Args:
        problem: the convolution.
        constants: as of `recipes`.
        tile: how the work is cut.
        packed: the weight, of `pack`.
    """
    calls, scratch = sources(problem, tile, biased="bias" in constants)
    held = {**finish_constants(problem, constants), "w": packed}
    return Recipe(WGMMA if tile.wgmma else MMA, str(tile), calls, held, scratch)


def sources(
    problem: ConvProblem, tile: Tile, *, biased: bool
) -> tuple[tuple[NvidiaSource, ...], dict[str, int]]:
    """The kernels with one tile, and the bytes they need in between, by role."""
    x, y = problem.x, problem.y
    kinds = {"r": problem.r.dtype if problem.r is not None else "", "y": y.dtype}
    ends = [(role, kinds.get(role, "float32")) for role in end_roles(problem, biased)]
    sums = ("sums", "int32" if x.dtype == "int8" else "float32")
    inputs = [("x", x.dtype), ("w", "uint8")]
    conv = NvidiaSource(
        conv_text(problem, tile, "conv_sparse", biased=biased),
        "conv_sparse",
        tuple(inputs + ([sums] if tile.split > 1 else ends)),
        (workers(tile, _blocks(problem, tile), DTYPES[x.dtype]), 1, tile.split),
        tile.threads,
        tile.shared_bytes(DTYPES[x.dtype]),
    )
    calls, scratch = [conv], {}
    if tile.split > 1:
        pitch = sums_pitch(problem.out_channels)
        text = finish_text(problem, tile, "conv_finish", _FINISH_THREADS, biased=biased)
        grid = (divided(problem.rows * pitch // 4, _FINISH_THREADS), 1, 1)
        calls.append(NvidiaSource(text, "conv_finish", (sums, *ends), grid, _FINISH_THREADS))
        scratch["sums"] = tile.split * problem.rows * pitch * 4
    return tuple(calls), scratch

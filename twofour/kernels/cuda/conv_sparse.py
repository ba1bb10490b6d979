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

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from twofour.core.bfloat16 import to_bf16
from twofour.core.cuda_program import DTYPES
from twofour.core.float8 import to_fp8
from twofour.kernels.cuda.conv_sparse_text import (
    C_TYPES,
    INSTRUCTION_TYPES,
    conv_text,
    end_roles,
    finish_text,
    sums_pitch,
    taps_inside,
)
from twofour.kernels.cuda.conv_sparse_tiles import Tile, shared_bytes, tiles, workers
from twofour.kernels.cuda.finish import finish_constants
from twofour.kernels.cuda.kernel import Array, NvidiaSource, Recipe, divided
from twofour.kernels.cuda.problem import ConvProblem
from twofour.kernels.cuda.sparse_fragments import (
    NOTHING,
    STEP_BYTES,
    compress,
    dense_records,
    is_two_four,
    padded,
    records,
)

MMA, WGMMA = "2:4 mma.sp", "2:4 wgmma.sp"
_LEAST_CAPABILITY = {"float8e4m3fn": 89}
_FINISH_THREADS = 256


def refusals(problem: ConvProblem, w: Array, capability: int) -> tuple[str, ...]:
    """Why no kernel here takes the problem; () where one does.

    Args:
        problem: the convolution.
        w: [N, C, KH, KW].
        capability: of the GPU, 90 for 9.0.
    """
    two_four = is_two_four(np.moveaxis(w, 1, -1))
    pattern = () if two_four else ("the weight is not 2:4 along its channels",)
    return (*unsuitable(problem, capability), *pattern)


def unsuitable(problem: ConvProblem, capability: int) -> tuple[str, ...]:
    """Why no kernel here takes the problem, whatever its weight; arguments as of `refusals`."""
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
    packed = packs(compressed, chosen)
    return tuple(recipe(problem, constants, *each) for each in packed)


def packs(weight: tuple[Array, ...], tiles: Sequence[Tile]) -> Iterator[tuple[Tile, Array]]:
    """Each tile with its weight of `pack`; many want it in the same order, which is made once.

    Args:
        weight: as of `pack`.
        tiles: all of them 2:4, or all dense.
    """
    made: dict[bytes, Array] = {}
    for tile in tiles:
        order = tile.order.tobytes()
        if order not in made:
            made[order] = pack(weight, tile)
        yield tile, made[order]


def compressed_weight(problem: ConvProblem, w: Array) -> tuple[Array, Array]:
    """What is kept of the weight, and its metadata, for all tiles.

    Args:
        problem: the convolution.
        w: [N, C, KH, KW], 2:4 along C.

    Returns:
        values [N, K / 2] and metadata [N, K / 4], K up to a whole step.
    """
    return compress(dense_weight(problem, w))


def dense_weight(problem: ConvProblem, w: Array) -> Array:
    """The weight [N, C, KH, KW] in the type of x, in the order of the kernel's steps.

    Returns:
        [N, K], K up to a whole step.
    """
    return padded(converted(in_order(problem, w), problem.x.dtype))


def in_order(problem: ConvProblem, w: Array) -> Array:
    """The weight [N, C, KH, KW] as rows [N, K] in the order of the kernel's steps."""
    n, channels, *_ = w.shape
    chunk = STEP_BYTES // DTYPES[problem.x.dtype] if taps_inside(problem) else channels
    parts = w.reshape(n, channels // chunk, chunk, *problem.window.kernel)
    return parts.transpose(0, 1, 3, 4, 2).reshape(n, -1)


def pack(weight: tuple[Array, ...], tile: Tile) -> Array:
    """The weight as a kernel reads it.

    Args:
        weight: of `compressed_weight`; of a dense tile that of `dense_weight` alone.
        tile: of the kernel.

    Returns:
        uint8 [steps, tiles of 16 channels, bytes of a record].
    """
    blocks = divided(weight[0].shape[0], tile.channels)
    order = (np.arange(blocks)[:, None] * tile.channels + tile.order).reshape(-1)
    found = []
    for array, fill in zip(weight, (0, NOTHING), strict=not tile.dense):
        missing = order.size - array.shape[0]
        found.append(np.pad(array, ((0, missing), (0, 0)), constant_values=fill)[order])
    return dense_records(*found) if tile.dense else records(*found)


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
    x, ends = problem.x, end_operands(problem, biased)
    sums = ("sums", "int32" if x.dtype == "int8" else "float32")
    inputs = [("x", x.dtype), ("w", "uint8")]
    conv = NvidiaSource(
        conv_text(problem, tile, "conv_sparse", biased=biased),
        "conv_sparse",
        tuple(inputs + ([sums] if tile.split > 1 else ends)),
        (workers(problem, tile), 1, tile.split),
        tile.threads,
        shared_bytes(problem, tile),
    )
    calls, scratch = [conv], {}
    if tile.split > 1:
        pitch = sums_pitch(problem.out_channels)
        text = finish_text(problem, tile, "conv_finish", _FINISH_THREADS, biased=biased)
        grid = (divided(problem.rows * pitch // 4, _FINISH_THREADS), 1, 1)
        calls.append(NvidiaSource(text, "conv_finish", (sums, *ends), grid, _FINISH_THREADS))
        scratch["sums"] = tile.split * problem.rows * pitch * 4
    return tuple(calls), scratch


def end_operands(problem: ConvProblem, biased: bool) -> list[tuple[str, str]]:
    """Roles of what follows the sums, and the types of their elements."""
    kinds = {"r": problem.r.dtype if problem.r is not None else "", "y": problem.y.dtype}
    return [(role, kinds.get(role, "float32")) for role in end_roles(problem, biased)]

"""Linear resizing of channels-last images on a GPU: each pixel from its four neighbours.

    y[i, j, c] = r0 (c0 x[a, p, c] + c1 x[a, q, c]) + r1 (c0 x[b, p, c] + c1 x[b, q, c])

The numbers are those of kernels/cpu/resize.py: rows a, b and columns p, q with their weights stand
in two tables beside the weights, so that any scale and any way to count coordinates is the same
kernel. A program has a block of pixels times channels.

Roles: x, places (int32 [height + width, 2], rows of y first), taps (float32, likewise), y.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cpu.resize import Tap
from twofour.kernels.cuda.finish import Pixels, pixel_offsets
from twofour.kernels.cuda.kernel import Array, Kernel, Recipe, divided
from twofour.kernels.cuda.problem import REAL, View

TACTIC = "resize"


@dataclass(frozen=True)
class ResizeProblem:
    """One resizing.

    Attributes:
        batch: images.
        height: rows of x and of y.
        width: columns of x and of y.
        channels: number of channels.
        x: input.
        y: output.
    """

    batch: int
    height: tuple[int, int]
    width: tuple[int, int]
    channels: int
    x: View
    y: View


def why_not(problem: ResizeProblem) -> str:
    """Why a resizing has no kernel here; "" where it has one."""
    kinds = (problem.x.dtype, problem.y.dtype)
    if not set(kinds) <= set(REAL):
        return f"linear resizing on a GPU is of real numbers, not {kinds[0]} to {kinds[1]}"
    return ""


def tables(rows: Sequence[Tap], columns: Sequence[Tap]) -> dict[str, Array]:
    """The constants of a resizing: places and taps.

    Args:
        rows: what each row of y is made of.
        columns: what each column is made of.
    """
    taps = (*rows, *columns)
    second = np.array([tap.weight for tap in taps], np.float32)
    return {
        "places": np.array([(tap.first, tap.second) for tap in taps], np.int32),
        "taps": np.stack([np.float32(1) - second, second], 1),
    }


def recipes(
    problem: ResizeProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """Ways to resize, the best guess first.

    Args:
        problem: what is computed.
        constants: `tables`.
        capability: of the GPU, 90 for 9.0.
        effort: 0 for the best guess alone, 1 for a few, 2 for all.

    Returns:
        Nothing where it has no kernel, see `why_not`.
    """
    if why_not(problem):
        return ()
    pixels = problem.batch * problem.height[1] * problem.width[1]
    size = DTYPES[problem.y.dtype]
    side = min(triton.next_power_of_2(problem.channels), 256 // size)
    operands = (("x", problem.x.dtype), ("places", "int32"), ("taps", "float32"),
                ("y", problem.y.dtype))  # fmt: skip
    found = []
    for elements, warps in ((1024, 4), (2048, 4), (512, 2))[: (1, 2, 3)[min(effort, 2)]]:
        across = max(1, min(elements // side, triton.next_power_of_2(pixels)))
        numbers = {
            "SIZE": (problem.height[1], problem.width[1]),
            "X": Pixels.of(problem.x, problem.batch, problem.height[0], problem.width[0]),
            "Y": Pixels.of(problem.y, problem.batch, problem.height[1], problem.width[1]),
            "PIXELS": pixels,
            "CHANNELS": problem.channels,
            "BLOCK": (across, side),
        }
        grid = (divided(problem.channels, side) * divided(pixels, across), 1, 1)
        kernel = Kernel(_resize, operands, numbers, grid, warps)
        found.append(Recipe(TACTIC, f"block {across}x{side}, {warps} warps", (kernel,), constants))
    return tuple(found)


@triton.jit
def _resize(
    x,
    places,
    taps,
    y,
    SIZE: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (CHANNELS + BLOCK[1] - 1) // BLOCK[1]
    turn = tl.program_id(0)
    c = (turn % blocks) * BLOCK[1] + tl.arange(0, BLOCK[1])
    m = (turn // blocks) * BLOCK[0] + tl.arange(0, BLOCK[0])
    there = m < PIXELS
    inside = there[:, None] & (c < CHANNELS)[None, :]
    line = m // SIZE[1]
    image = line // SIZE[0]
    if X.wide:
        image = image.to(tl.int64)
    row = 2 * (line % SIZE[0])
    column = 2 * (SIZE[0] + m % SIZE[1])
    left = tl.load(places + column, mask=there, other=0) * X.pixel
    right = tl.load(places + column + 1, mask=there, other=0) * X.pixel
    left_share = tl.load(taps + column, mask=there)[:, None]
    right_share = tl.load(taps + column + 1, mask=there)[:, None]
    total = tl.full(BLOCK, 0.0, tl.float32)
    for which in tl.static_range(2):
        at = image * X.image + tl.load(places + row + which, mask=there, other=0) * X.row
        share = tl.load(taps + row + which, mask=there)[:, None]
        one = tl.load(x + (at + left)[:, None] + c[None, :], mask=inside).to(tl.float32)
        other = tl.load(x + (at + right)[:, None] + c[None, :], mask=inside).to(tl.float32)
        total += share * (left_share * one + right_share * other)
    result = total.to(y.dtype.element_ty)
    tl.store(y + pixel_offsets(m, Y)[:, None] + c[None, :], result, mask=inside)

"""Rows quantized at run time on a GPU, each with a scale of its own: "row" of core/dynamic.py.

    highest = max(|x|, 2**-100);  y = round_half_even(x * (127 / highest));  row_scale = highest/127

int8 as such, without the 128 of a CPU. To float8e4m3fn 448 stands for 127, and nothing is rounded
to whole steps. A program has some whole rows; a longer one is read twice, the second time from the
cache. Magnitudes are compared as integers: so they order as the floats do, with NaN above all.

Roles: x, y, row_scale (float32 [rows]).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import struct

import triton
import triton.language as tl

from twofour.core.cuda_program import DTYPES
from twofour.core.dynamic import LEAST, STEPS
from twofour.kernels.cuda.kernel import Kernel, Recipe, divided
from twofour.kernels.cuda.problem import QUANTIZED, REAL, RowsProblem
from twofour.kernels.cuda.rounding import FLOAT8_HIGH, round_even
from twofour.kernels.cuda.rows import FLOAT8_SINCE, unaligned

TACTIC = "quantize_rows"
_AT_ONCE = 16384
_PROGRAMS = 264
_LEAST_BITS = tl.constexpr(struct.unpack("<i", struct.pack("<f", LEAST))[0])
_STEPS = tl.constexpr(STEPS)


def why_not(problem: RowsProblem) -> str:
    """Why rows have no kernel here; "" where they have one."""
    x, y = problem.x[0], problem.y[0]
    if x not in REAL or y not in QUANTIZED:
        return f"rows on a GPU are quantized from real numbers to int8 or float8, not {x} to {y}"
    return ""


def recipes(problem: RowsProblem, capability: int, *, effort: int = 2) -> tuple[Recipe, ...]:
    """Ways to quantize rows, the best guess first.

    Args:
        problem: what is computed.
        capability: of the GPU, 90 for 9.0.
        effort: 0 for the best guess alone, 1 for a few, 2 for all.

    Returns:
        Nothing where it has no kernel, see `why_not`.
    """
    small = problem.y[0] == "float8e4m3fn" and capability < FLOAT8_SINCE
    if why_not(problem) or small:
        return ()
    block = min(triton.next_power_of_2(problem.channels), _AT_ONCE)
    several = max(1, min(4, triton.next_power_of_2(problem.rows // _PROGRAMS), 4096 // block))
    warps = max(1, min(16, block * several // 512))
    found = [(several, warps), (1, warps), (several, min(2 * warps, 16)), (1, max(warps // 2, 1))]
    made = [_recipe(problem, rows, block, count) for rows, count in dict.fromkeys(found)]
    return tuple(made[: (1, 2, 4)[min(effort, 2)]])


def _recipe(problem: RowsProblem, rows: int, block: int, warps: int) -> Recipe:
    (x, x_step), (y, y_step), channels = problem.x, problem.y, problem.channels
    constants = {
        "ROWS": problem.rows,
        "CHANNELS": channels,
        "X_STEP": x_step,
        "Y_STEP": y_step,
        "BLOCK": (rows, block),
        "WIDE": problem.rows * max(x_step, y_step) >= 2**31,
    }
    distances = {"x": (x_step, channels), "y": (y_step, channels)}
    sizes = {"x": DTYPES[x], "y": DTYPES[y]}
    apart = [
        role
        for role, steps in distances.items()
        if unaligned(*(step * sizes[role] for step in steps))
    ]
    operands = (("x", x), ("y", y), ("row_scale", "float32"))
    grid = (divided(problem.rows, rows), 1, 1)
    kernel = Kernel(_quantize_rows, operands, constants, grid, warps, unaligned=tuple(apart))
    return Recipe(TACTIC, f"{rows} rows of {block}, {warps} warps", (kernel,))


@triton.jit
def _quantize_rows(
    x,
    y,
    row_scale,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    X_STEP: tl.constexpr,
    Y_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK[0] + tl.arange(0, BLOCK[0])
    there = row < ROWS
    at = row.to(tl.int64) if WIDE else row
    from_, to = x + (at * X_STEP)[:, None], y + (at * Y_STEP)[:, None]
    block: tl.constexpr = BLOCK[1]
    bits = tl.full([BLOCK[0]], _LEAST_BITS, tl.int32)
    for first in tl.static_range(0, CHANNELS, block):
        c = first + tl.arange(0, BLOCK[1])
        inside = there[:, None] & (c < CHANNELS)[None, :]
        value = tl.load(from_ + c[None, :], mask=inside, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=1))
    highest = bits.to(tl.float32, bitcast=True)
    steps: tl.constexpr = _STEPS if y.dtype.element_ty == tl.int8 else FLOAT8_HIGH
    most = tl.full([BLOCK[0]], steps, tl.float32)
    factor = tl.div_rn(most, highest)[:, None]
    tl.store(row_scale + row, tl.div_rn(highest, most), mask=there)
    for first in tl.static_range(0, CHANNELS, block):
        c = first + tl.arange(0, BLOCK[1])
        inside = there[:, None] & (c < CHANNELS)[None, :]
        if BLOCK[1] < CHANNELS:  # else it is still there
            value = tl.load(from_ + c[None, :], mask=inside, other=0.0).to(tl.float32)
        scaled = value * factor
        if y.dtype.element_ty == tl.int8:
            whole = tl.where(scaled == scaled, round_even(scaled), -128.0).to(tl.int8)
            tl.store(to + c[None, :], whole, mask=inside)
        else:
            limited = tl.minimum(tl.maximum(scaled, -FLOAT8_HIGH), FLOAT8_HIGH)
            tl.store(to + c[None, :], limited.to(tl.float8e4nv), mask=inside)

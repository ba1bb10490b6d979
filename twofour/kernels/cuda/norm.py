"""Layer normalization: whole rows in registers, so that x is read once.

A program takes some rows of all their channels, rounded up to a power of 2. Mean and variance are
sums over the registers: the variance that of x - mean, as the definition has it (core/norm.py),
not a difference of two large sums. Floats for the residual stream and bytes for the next product
are written by the same program.

Roles: x, gamma, beta, y and/or q, see `problem.NormProblem`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from twofour.kernels.cuda.kernel import Kernel, Recipe, divided
from twofour.kernels.cuda.problem import REAL, NormProblem
from twofour.kernels.cuda.rounding import scaled
from twofour.kernels.cuda.rows import FLOAT8_SINCE

Array = NDArray[Any]

MOST_CHANNELS = 65536
"""64 registers for each of 1024 threads."""
_PROGRAM = 4096  # channels of a program, if rows are short: 32 for each of 128 threads
_LANES = 32
_CONFIGS = {0: 1, 1: 3, 2: 6, 3: 12}


@triton.jit
def norm_rows(
    x,
    gamma,
    beta,
    first,
    second,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EPSILON: tl.constexpr,
    X_ROW: tl.constexpr,
    FIRST_ROW: tl.constexpr,
    SECOND_ROW: tl.constexpr,
    FIRST_SCALE: tl.constexpr,
    SECOND_SCALE: tl.constexpr,
    FIRST_ZERO: tl.constexpr,
    SECOND_ZERO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Normalizes BLOCK_ROWS rows of x.

    Results are divided by FIRST_SCALE and rounded to the type of `first`, likewise those of
    `second`, which may be None.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    inside = channel < CHANNELS
    there = inside & (row < ROWS)
    values = tl.load(x + row * X_ROW + channel, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1) / CHANNELS
    centred = tl.where(inside, values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / CHANNELS
    inverse = 1.0 / tl.sqrt(variance + EPSILON)
    factor = tl.load(gamma + channel, mask=inside, other=0.0)
    added = tl.load(beta + channel, mask=inside, other=0.0)
    v = centred * inverse[:, None] * factor + added
    kind: tl.constexpr = first.dtype.element_ty
    result = scaled(v, 1.0 / FIRST_SCALE, kind, FIRST_ZERO)
    tl.store(first + row * FIRST_ROW + channel, result, mask=there)
    if second is not None:
        other: tl.constexpr = second.dtype.element_ty
        bytes_ = scaled(v, 1.0 / SECOND_SCALE, other, SECOND_ZERO)
        tl.store(second + row * SECOND_ROW + channel, bytes_, mask=there)


def why_not(problem: NormProblem, capability: int) -> str:
    """Why the kernel cannot take a problem; "" if it can."""
    if problem.channels > MOST_CHANNELS:
        return f"{problem.channels} channels do not fit registers: {MOST_CHANNELS} at most"
    if problem.x[0] not in REAL:
        return f"x is {problem.x[0]}: expected one of {', '.join(REAL)}"
    if problem.y is None and problem.q is None:
        return "it has no result"
    if problem.q is not None and problem.q[0] == "float8e4m3fn" and capability < FLOAT8_SINCE:
        return f"float8 needs a GPU of compute capability 8.9, this one has {capability / 10}"
    return ""


def recipes(
    problem: NormProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """Rows of a program and its warps, the best guess first.

    Args:
        problem: what is normalized.
        constants: gamma and beta.
        capability: of the GPU, 90 for 9.0.
        effort: 0 to 3, how many.
    """
    if why_not(problem, capability):
        return ()
    held = {name: np.asarray(constants[name], np.float32) for name in ("gamma", "beta")}
    return tuple(
        Recipe("norm", f"{rows} rows, {warps} warps", (_kernel(problem, rows, warps),), held)
        for rows, warps in _configs(problem)[: _CONFIGS[effort]]
    )


def _configs(problem: NormProblem) -> list[tuple[int, int]]:
    """(Rows, warps); about 16 channels for each thread are best, as a rule.

    A row of one warp has nobody to wait for.
    """
    channels = triton.next_power_of_2(problem.channels)
    found = []
    for rows in (1, 4, 2, 8, 16):
        for per_thread in (16, 8, 32, 4):
            warps = rows * channels // (per_thread * _LANES)
            small = rows > 1 and (rows * channels > _PROGRAM or rows >= 2 * problem.rows)
            if not small and 1 <= warps <= 32 and rows * channels // (warps * _LANES) <= 64:
                found.append((rows, warps))
    return found or [(1, min(32, max(1, channels // (64 * _LANES))))]


def _kernel(problem: NormProblem, rows: int, warps: int) -> Kernel:
    """One start of the kernel."""
    results = {name: out for name, out in (("y", problem.y), ("q", problem.q)) if out is not None}
    names = list(results)
    scales = {"y": 1.0, "q": problem.scale}
    zeros = {"y": 0, "q": problem.zero}
    first, second = names[0], names[-1]
    numbers = {
        "ROWS": problem.rows,
        "CHANNELS": problem.channels,
        "EPSILON": problem.epsilon,
        "X_ROW": problem.x[1],
        "FIRST_ROW": results[first][1],
        "SECOND_ROW": results[second][1],
        "FIRST_SCALE": scales[first],
        "SECOND_SCALE": scales[second],
        "FIRST_ZERO": zeros[first],
        "SECOND_ZERO": zeros[second],
        "BLOCK_ROWS": rows,
        "BLOCK_CHANNELS": triton.next_power_of_2(problem.channels),
    }
    operands = [("x", problem.x[0]), ("gamma", "float32"), ("beta", "float32")]
    operands += [(name, results[name][0]) for name in names]
    if len(names) == 1:
        numbers["second"] = None
    grid = (divided(problem.rows, rows), 1, 1)
    return Kernel(norm_rows, tuple(operands), numbers, grid, warps, 1)

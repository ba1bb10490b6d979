"""Pooling on a GPU: maximum and average over windows, and the mean of each channel.

A program of the windows has a block of pixels of y times channels and goes over the taps; those
outside the image are not read, and neighbours find each other's pixels in the cache. A program of
the mean has a block of channels of one image. Where images and channels are too few to fill a GPU,
the pixels are shared out as well, and a second launch adds the sums up.

Sums of int8 are int32, all others float32. Results are those of core/pooling.py, bit for bit.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl

from twofour.core.cuda_program import DTYPES
from twofour.core.pooling import tap_factors
from twofour.kernels.cuda.finish import Pixels, pixel_offsets
from twofour.kernels.cuda.kernel import Kernel, Recipe, divided
from twofour.kernels.cuda.problem import QUANTIZED, REAL, PoolProblem
from twofour.kernels.cuda.rounding import narrow
from twofour.kernels.cuda.rows import FLOAT8_SINCE

TACTIC = "pool"
_PROGRAMS = 264
_PIXELS = 64  # of the mean, a program at once
_LEAST_SHARE = 256  # pixels: fewer are not worth a second launch
_UNROLLED = tl.constexpr(25)  # taps: more take the compiler too long


def why_not(problem: PoolProblem) -> str:
    """Why a pooling has no kernel here; "" where it has one."""
    x, y = problem.x.dtype, problem.y.dtype
    if x not in (*QUANTIZED, *REAL) or y not in (*QUANTIZED, *REAL):
        return f"pooling on a GPU is of int8, float8e4m3fn and real numbers, not {x} to {y}"
    if problem.op not in ("max", "average", "mean"):
        return f"no pooling {problem.op!r} on a GPU: expected max, average or mean"
    if problem.op == "max" and x != y:
        return f"a maximum is of one type on a GPU, not {x} to {y}"
    return ""


def recipes(problem: PoolProblem, capability: int, *, effort: int = 2) -> tuple[Recipe, ...]:
    """Ways to pool, the best guess first.

    Args:
        problem: what is computed.
        capability: of the GPU, 90 for 9.0.
        effort: 0 for the best guess alone, 1 for a few, 2 for all.

    Returns:
        Nothing where it has no kernel, see `why_not`.
    """
    small = "float8e4m3fn" in (problem.x.dtype, problem.y.dtype)
    if why_not(problem) or (small and capability < FLOAT8_SINCE):
        return ()
    found = _means(problem) if problem.op == "mean" else _windows(problem)
    most = (1, 2, 6)[min(effort, 2)]
    return tuple(recipe for recipe, _ in zip(found, range(most), strict=False))


def _windows(problem: PoolProblem) -> Iterator[Recipe]:
    """Of a maximum or an average."""
    out_h, out_w = problem.window.output_size(problem.height, problem.width)
    pixels = problem.batch * out_h * out_w
    size = max(DTYPES[problem.x.dtype], DTYPES[problem.y.dtype])
    constants: dict[str, Any] = {}
    if problem.op == "average":
        kh, kw = problem.window.kernel
        factors = tap_factors(problem.scale, kh * kw)
        constants["factors"] = factors[-1:].repeat(kh * kw + 1) if problem.include_pad else factors
    operands = [("x", problem.x.dtype), ("y", problem.y.dtype)]
    if constants:
        operands.insert(1, ("factors", "float32"))
    side = min(triton.next_power_of_2(problem.channels), 512 // size)
    for channels, elements, warps in ((side, 2048, 4), (side, 1024, 4), (side, 4096, 8),
                                      (max(side // 4, 16), 2048, 4), (side, 512, 2)):  # fmt: skip
        across = max(1, min(elements // size // channels, triton.next_power_of_2(pixels)))
        numbers = {
            **({} if constants else {"factors": None}),
            "WINDOW": problem.window,
            "SIZES": (problem.height, problem.width, out_h, out_w),
            "X": Pixels.of(problem.x, problem.batch, problem.height, problem.width),
            "Y": Pixels.of(problem.y, problem.batch, out_h, out_w),
            "PIXELS": pixels,
            "CHANNELS": problem.channels,
            "X_ZERO": problem.x_zero,
            "Y_ZERO": problem.y_zero,
            "BLOCK": (across, channels),
        }
        grid = (divided(problem.channels, channels) * divided(pixels, across), 1, 1)
        kernel = Kernel(_pool_windows, tuple(operands), numbers, grid, warps)
        yield Recipe(TACTIC, f"block {across}x{channels}, {warps} warps", (kernel,), constants)


def _means(problem: PoolProblem) -> Iterator[Recipe]:
    """Of a mean: in one launch, or in two."""
    pixels, sums = problem.height * problem.width, _sums_of(problem)
    all_ = triton.next_power_of_2(problem.channels)
    sides = dict.fromkeys(min(channels, all_) for channels in (32, 64, 128, 16))
    for channels in sides:
        blocks = divided(problem.channels, channels)
        shares = min(divided(_PROGRAMS, blocks * problem.batch), pixels // _LEAST_SHARE)
        shares = max(shares, 1)
        share = divided(divided(pixels, shares), _PIXELS) * _PIXELS
        shares = divided(pixels, share)
        numbers = {
            "X": Pixels.of(problem.x, problem.batch, problem.height, problem.width),
            "Y_IMAGE": problem.y.image,
            "PIXELS": pixels,
            "CHANNELS": problem.channels,
            "SHARE": share,
            "FACTOR": float(np.float32(problem.scale / pixels)),
            "LESS": pixels * problem.x_zero,
            "Y_ZERO": problem.y_zero,
            "BLOCK": (min(_PIXELS, triton.next_power_of_2(pixels)), channels),
        }
        warps = 4 if channels > 16 else 2
        grid = (blocks, problem.batch, shares)
        one = "y" if shares == 1 else "sums"
        dtype = problem.y.dtype if shares == 1 else sums
        first = Kernel(_pool_mean, (("x", problem.x.dtype), (one, dtype)),
                       {**numbers, "SHARES": shares}, grid, warps)  # fmt: skip
        calls, scratch = [first], {}
        if shares > 1:
            calls.append(_added(problem, numbers, sums, shares))
            scratch = {"sums": 4 * shares * problem.batch * problem.channels}
        config = f"{shares} shares, {channels} channels, {warps} warps"
        yield Recipe(TACTIC, config, tuple(calls), scratch=scratch)


def _sums_of(problem: PoolProblem) -> str:
    return "int32" if problem.x.dtype == "int8" else "float32"


def _added(problem: PoolProblem, numbers: dict[str, Any], sums: str, shares: int) -> Kernel:
    """The second launch of a mean."""
    block = min(128, triton.next_power_of_2(problem.channels))
    kept = ("CHANNELS", "Y_IMAGE", "FACTOR", "LESS", "Y_ZERO")
    constants = {name: numbers[name] for name in kept}
    constants |= {"SHARES": shares, "BATCH": problem.batch, "BLOCK": block}
    grid = (divided(problem.channels, block), problem.batch, 1)
    return Kernel(_add_sums, (("sums", sums), ("y", problem.y.dtype)), constants, grid, 1)


@triton.jit
def _pool_windows(
    x,
    factors,
    y,
    WINDOW: tl.constexpr,
    SIZES: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    X_ZERO: tl.constexpr,
    Y_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The maximum, or with `factors` of n taps the average, of each window."""
    blocks: tl.constexpr = (CHANNELS + BLOCK[1] - 1) // BLOCK[1]
    turn = tl.program_id(0)
    c = (turn % blocks) * BLOCK[1] + tl.arange(0, BLOCK[1])
    m = (turn // blocks) * BLOCK[0] + tl.arange(0, BLOCK[0])
    inside = (m < PIXELS)[:, None] & (c < CHANNELS)[None, :]
    line = m // SIZES[3]
    image = line // SIZES[2]
    if X.wide:
        image = image.to(tl.int64)
    top = (line % SIZES[2]) * WINDOW.stride[0] - WINDOW.pads[0]
    left = (m % SIZES[3]) * WINDOW.stride[1] - WINDOW.pads[1]
    own: tl.constexpr = x.dtype.element_ty
    if factors is None:
        held = tl.full(BLOCK, lowest_of(own), kept_in(own, True))
    else:
        held = tl.full(BLOCK, 0, kept_in(own, False))
    taps = tl.full([BLOCK[0]], 0, tl.int32)
    high: tl.constexpr = WINDOW.kernel[0]
    few: tl.constexpr = high * WINDOW.kernel[1] <= _UNROLLED
    here = x + image[:, None] * X.image + c[None, :]
    if few:
        for a in tl.static_range(high):
            held, taps = _row_of_taps(
                here,
                top + a * WINDOW.dilation[0],
                left,
                inside,
                held,
                taps,
                WINDOW,
                SIZES,
                X,
                factors is None,
            )
    else:
        for a in range(high):
            held, taps = _row_of_taps(
                here,
                top + a * WINDOW.dilation[0],
                left,
                inside,
                held,
                taps,
                WINDOW,
                SIZES,
                X,
                factors is None,
            )
    if factors is None:
        result = held.to(own)
    else:
        total = (held - (taps * X_ZERO)[:, None]).to(tl.float32)
        result = narrow(total * tl.load(factors + taps)[:, None], y.dtype.element_ty, Y_ZERO)
    tl.store(y + pixel_offsets(m, Y)[:, None] + c[None, :], result, mask=inside)


@triton.jit
def _row_of_taps(
    x,
    row,
    left,
    inside,
    held,
    taps,
    WINDOW: tl.constexpr,
    SIZES: tl.constexpr,
    X: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """One row of the windows into what is held, and into the count of taps in the image."""
    wide: tl.constexpr = WINDOW.kernel[1]
    for b in tl.static_range(wide):
        column = left + b * WINDOW.dilation[1]
        there = (row >= 0) & (row < SIZES[0]) & (column >= 0) & (column < SIZES[1])
        read = inside & there[:, None]
        at = row * X.row + column * X.pixel
        if not COMPARED:
            held += tl.load(x + at[:, None], mask=read, other=0.0).to(held.dtype)
            taps += there.to(tl.int32)
        elif x.dtype.element_ty == tl.float8e4nv:  # has no number below all others
            value = tl.load(x + at[:, None], mask=read).to(tl.float32)
            held = tl.where(read, tl.maximum(held, value), held)
        else:
            value = tl.load(x + at[:, None], mask=read, other=lowest_of(x.dtype.element_ty))
            held = tl.maximum(held, value.to(held.dtype))
    return held, taps


@triton.constexpr_function
def kept_in(dtype, compared):
    """The type that elements are compared or added up in."""
    if dtype == tl.int8:
        return tl.int8 if compared else tl.int32
    return tl.float16 if compared and dtype == tl.float16 else tl.float32


@triton.constexpr_function
def lowest_of(dtype):
    """What no element is below."""
    return -128 if dtype == tl.int8 else -float("inf")


@triton.jit
def _pool_mean(
    x,
    y,
    X: tl.constexpr,
    Y_IMAGE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SHARE: tl.constexpr,
    FACTOR: tl.constexpr,
    LESS: tl.constexpr,
    Y_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARES: tl.constexpr,
):
    """The mean of a block of channels of an image, or with several shares their sums, to y."""
    c = tl.program_id(0) * BLOCK[1] + tl.arange(0, BLOCK[1])
    image = tl.program_id(1)
    begin = tl.program_id(2) * SHARE
    if X.wide:
        image = image.to(tl.int64)
    total = tl.full(BLOCK, 0, kept_in(x.dtype.element_ty, False))
    for first in range(0, SHARE, BLOCK[0]):
        p = begin + first + tl.arange(0, BLOCK[0])
        at = (p // X.width) * X.row + (p % X.width) * X.pixel
        inside = (p < PIXELS)[:, None] & (c < CHANNELS)[None, :]
        value = tl.load(x + image * X.image + at[:, None] + c[None, :], mask=inside)
        total += tl.where(inside, value.to(total.dtype), 0)
    sums = tl.sum(total, axis=0)
    if SHARES == 1:
        mean = narrow((sums - LESS).to(tl.float32) * FACTOR, y.dtype.element_ty, Y_ZERO)
        tl.store(y + image * Y_IMAGE + c, mean, mask=c < CHANNELS)
    else:
        slot = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        tl.store(y + slot * CHANNELS + c, sums, mask=c < CHANNELS)


@triton.jit
def _add_sums(
    sums,
    y,
    CHANNELS: tl.constexpr,
    Y_IMAGE: tl.constexpr,
    FACTOR: tl.constexpr,
    LESS: tl.constexpr,
    Y_ZERO: tl.constexpr,
    SHARES: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean from the sums of all shares."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1)
    total = tl.load(sums + image * CHANNELS + c, mask=c < CHANNELS, other=0)
    for share in range(1, SHARES):
        at = (share * BATCH + image) * CHANNELS
        total += tl.load(sums + at + c, mask=c < CHANNELS, other=0)
    mean = narrow((total - LESS).to(tl.float32) * FACTOR, y.dtype.element_ty, Y_ZERO)
    tl.store(y + image * Y_IMAGE + c, mean, mask=c < CHANNELS)

"""Depthwise convolutions in Triton: a channel of y has one channel of x, so nothing is a product.

A program makes a tile of y, pixels times channels; for each tap it loads the pixels under it, whose
channels lie side by side, and multiplies them with the tap's weights:

    for kh, kw: sums[m, c] += x[pixel of m under (kh, kw), c] * w[kh, kw, c]

A pixel is loaded once for each tap, all but the first time from the cache of the multiprocessor.

Weights: [KH * KW, N].
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton
import triton.language as tl

from twofour.kernels.cuda.conv import FP8_CAPABILITY, Geometry
from twofour.kernels.cuda.conv_pack import stored
from twofour.kernels.cuda.finish import (
    Ends,
    finish,
    finish_constants,
    finish_operands,
    kernel_of,
)
from twofour.kernels.cuda.kernel import Array, Recipe, divided
from twofour.kernels.cuda.problem import ConvProblem

_TILES = ((32, 64, 4), (16, 64, 2), (64, 64, 8), (32, 128, 4), (64, 32, 4), (16, 32, 1))
"""(pixels, channels, warps)."""


def pack(w: Array, dtype: str) -> Array:
    """Weights [N, 1, KH, KW] as [KH * KW, N], of x's type."""
    return np.ascontiguousarray(stored(w, dtype).reshape(w.shape[0], -1).T)


def recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """Ways to run a depthwise convolution, the best guess first.

    Args:
        problem: what is computed.
        constants: see `conv.recipes`.
        capability: of the GPU, 90 for 9.0.
        effort: how many: 1, 3, all.

    Returns:
        None for groups of more than one channel of x, and for float8 on a GPU without it.
    """
    if problem.channels != problem.groups:
        return ()
    dtype = problem.x.dtype
    if dtype == "float8e4m3fn" and capability < FP8_CAPABILITY:
        return ()
    packed = {"w": pack(constants["w"], dtype), **finish_constants(problem, constants)}
    if dtype == "int8":
        packed["x_zero"] = np.array([problem.x_zero], np.int32)
    narrow = triton.next_power_of_2(problem.out_channels)
    tiles = [tile for tile in _TILES if tile[1] <= max(narrow, 32)]
    count = (1, 3, len(tiles))[min(effort, 2)]
    return tuple(_recipe(problem, tile, packed) for tile in tiles[:count])


def _recipe(
    problem: ConvProblem, tile: tuple[int, int, int], constants: dict[str, Array]
) -> Recipe:
    """One way: its kernel and its constants."""
    m, n, warps = tile
    dtype = problem.x.dtype
    operands = {
        "x": ("x", dtype),
        "w": ("w", dtype),
        "x_zero": ("x_zero", "int32") if "x_zero" in constants else None,
        **finish_operands(problem, "bias" in constants),
        "y": ("y", problem.y.dtype),
    }
    numbers: dict[str, Any] = {"G": Geometry.of(problem), "ENDS": Ends.of(problem)}
    numbers |= {"BM": m, "BN": n}
    grid = (divided(problem.rows, m), divided(problem.out_channels, n), 1)
    call = kernel_of(_depthwise, operands, numbers, grid, warps=warps)
    return Recipe("conv_depthwise", f"{m}x{n}, {warps} warps", (call,), constants)


@triton.jit
def _depthwise(
    x,
    w,
    x_zero,
    scale,
    row_scale,
    bias,
    r,
    numbers,
    y,
    G: tl.constexpr,
    ENDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_inside = n < G.all_outs
    line = m // G.out_w
    h0 = (line % G.out_h) * G.stride[0] - G.top
    w0 = (m % G.out_w) * G.stride[1] - G.left
    image = line // G.out_h
    if G.x.wide:
        image = image.to(tl.int64)
    rows = x + (image * G.x.image + h0 * G.x.row + w0 * G.x.pixel)
    if G.outs == 1:
        places = rows[:, None] + n[None, :]
    else:
        places = rows[:, None] + (n // G.outs)[None, :]
    there = (m < G.rows)[:, None] & n_inside[None, :]

    whole: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros((BM, BN), dtype=whole)
    if x_zero is not None:
        zero = tl.load(x_zero)
    else:
        zero = 0.0
    for tap in tl.static_range(G.kernel[0] * G.kernel[1]):
        down = (tap // G.kernel[1]) * G.dilation[0]
        right = (tap % G.kernel[1]) * G.dilation[1]
        at = places + (down * G.x.row + right * G.x.pixel)
        if G.padded:
            in_h = (h0 + down >= 0) & (h0 + down < G.x.height)
            in_w = (w0 + right >= 0) & (w0 + right < G.x.width)
            inside = (in_h & in_w)[:, None]
            a = tl.load(at, mask=inside & there, other=0.0).to(whole)
            if x_zero is not None:
                a = tl.where(inside, a, zero)
        else:
            a = tl.load(at, mask=there, other=0.0).to(whole)
        b = tl.load(w + tap * G.all_outs + n, mask=n_inside, other=0.0).to(whole)
        sums += a * b[None, :]
    finish(sums, m, n, n_inside, scale, row_scale, bias, r, numbers, y, ENDS)

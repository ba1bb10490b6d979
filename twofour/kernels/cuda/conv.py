"""Products and convolutions on tensor cores, in Triton: an implicit product over channels-last x.

A program makes a tile of y, pixels times channels. Its sums run over K = taps x channels in steps:

    for step in range(steps):                  # the pipeline loads `stages` of them ahead
        a[m, k] = x[pixel of m under the step's tap, channels c ... c + BK]
        sums += a @ w[n, step * BK ...].T
    y = finish(sums)

"taps": BK divides the channels, so that a step has one tap and its pixels one test of the borders.
"flat": each k finds its own tap (a first layer of 3 channels). "product": there is nothing to find.

Loads pass by the registers, so that nothing can be filled in on the way: taps that lie outside are
read from "pad", a constant row of x_zero.

Where there are few tiles, several programs share a tile's steps, and another kernel adds their sums
in order: results are the same in every run.

Weights: [N, K padded to a multiple of 128], K in the order (kh, kw, c), c fastest.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from twofour.kernels.cuda.conv_pack import (
    K_MULTIPLE,
    merged,
    pack,
    pad_constant,
    paired,
    taps_inside,
    widened,
)
from twofour.kernels.cuda.conv_tiles import Tile, tiles_of
from twofour.kernels.cuda.finish import (
    Ends,
    Pixels,
    finish,
    finish_call,
    finish_constants,
    finish_operands,
    kernel_of,
    pixel_offsets,
    residual_of,
)
from twofour.kernels.cuda.kernel import Array, Kernel, Recipe, divided
from twofour.kernels.cuda.problem import ConvProblem

_EARLY_STEPS, _EARLY_ELEMENTS = 4, 64
"""So short a sum does not hide the way of the residual: it is fetched before, where that leaves
registers: behind a single step, or with so few elements of y a thread."""
FP8_CAPABILITY = 89
"""The least that a GPU has to have to multiply float8."""


@dataclass(frozen=True)
class Geometry:
    """Where a kernel finds what it multiplies.

    Attributes:
        rows: pixels of y.
        channels: of a group of x, and what lies behind them that is read along.
        true_channels: those of them that count; all where what lies behind is harmless.
        outs: channels of a group of y.
        all_outs: of all groups.
        out_h: height of y.
        out_w: width of y.
        kernel: (height, width) of the window; stride and dilation likewise.
        top: padding above; left likewise.
        k: taps x channels.
        k_packed: elements from one row of weights to the next.
        x: where its pixels lie.
        padded: some tap of some pixel lies outside of x.
        product: y's pixels are x's.
    """

    rows: int
    channels: int
    true_channels: int
    outs: int
    all_outs: int
    out_h: int
    out_w: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    top: int
    left: int
    k: int
    k_packed: int
    x: Pixels
    padded: bool
    product: bool

    @staticmethod
    def of(problem: ConvProblem, true_channels: int = 0) -> Geometry:
        """Of a problem; with the channels of a group that count, if not all do."""
        window, (out_h, out_w) = problem.window, problem.out_size
        outside = any(not inside.all() for inside in taps_inside(problem))
        return Geometry(
            problem.rows,
            problem.channels // problem.groups,
            true_channels or problem.channels // problem.groups,
            problem.out_channels // problem.groups,
            problem.out_channels,
            out_h,
            out_w,
            window.kernel,
            window.stride,
            window.dilation,
            window.pads[0],
            window.pads[1],
            problem.k,
            divided(problem.k, K_MULTIPLE) * K_MULTIPLE,
            Pixels.of(problem.x, problem.batch, problem.height, problem.width),
            outside,
            replace(problem, groups=1).is_product,
        )


def recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """Ways to run a convolution or product, the best guess first.

    Args:
        problem: what is computed.
        constants: "w" [N, C / groups, KH, KW], int8 or float32, rounded to x's type; "scale" and
            "bias", float32 [N], where there are such.
        capability: of the GPU, 90 for 9.0.
        effort: how many: 1, 4, 12, 32 for 0 to 3.

    Returns:
        None for float8 on a GPU without it.
    """
    if problem.x.dtype == "float8e4m3fn" and capability < FP8_CAPABILITY:
        return ()
    dense, w = paired(*widened(*merged(problem, constants["w"])))
    packed = {"w": pack(w, problem.x.dtype), **finish_constants(problem, constants)}
    packed |= pad_constant(dense)
    found = tiles_of(dense, capability)[: (1, 4, 12, 32)[min(effort, 3)]]
    true = 0
    if dense.channels != problem.channels and problem.x.dtype != "int8":
        true = problem.channels  # what lies behind may be no number
    return tuple(_recipe(dense, tile, packed, true) for tile in found)


def _recipe(
    problem: ConvProblem, tile: Tile, constants: dict[str, Array], true_channels: int = 0
) -> Recipe:
    """One way: its kernels and their constants."""
    calls = tuple(_calls(problem, tile, constants, Geometry.of(problem, true_channels)))
    scratch = {}
    if tile.splits > 1:
        scratch = {"sums": tile.splits * problem.rows * problem.out_channels * 4}
    return Recipe("conv", tile.text, calls, constants, scratch)


def _calls(
    problem: ConvProblem, tile: Tile, constants: Mapping[str, Any], geometry: Geometry
) -> Iterator[Kernel]:
    """The kernel, and where several programs share a tile, the one that adds their sums."""
    dtype, biased = problem.x.dtype, "bias" in constants
    sums = "int32" if dtype == "int8" else "float32"
    whole = tile.splits == 1
    ends = finish_operands(problem, biased)
    operands = {
        "x": ("x", dtype),
        "w": ("w", dtype),
        **(ends if whole else dict.fromkeys(ends)),
        "pad": ("pad", dtype) if "pad" in constants else None,
        "y": ("y", problem.y.dtype) if whole else ("sums", sums),
    }
    tiles = divided(problem.rows, tile.m) * divided(geometry.outs, tile.n)
    grid = (tiles, tile.splits, problem.groups)
    numbers = {"G": geometry, "ENDS": Ends.of(problem), "T": replace(tile, warps=0, stages=0)}
    numbers["EARLY"] = whole and problem.r is not None and _is_early(problem.k, tile)
    yield kernel_of(_conv, operands, numbers, grid, warps=tile.warps, stages=tile.stages)
    if not whole:
        yield finish_call(problem, sums, parts=tile.splits, biased=biased)


def _is_early(k: int, tile: Tile) -> bool:
    """Whether a residual is fetched before the sums are made."""
    steps, elements = divided(k, tile.k), tile.m * tile.n // (32 * tile.warps)
    return steps == 1 or (steps <= _EARLY_STEPS and elements <= _EARLY_ELEMENTS)


@triton.jit
def tile_at(number, tiles_m: tl.constexpr, tiles_n: tl.constexpr, BAND: tl.constexpr):
    """Which tile a program makes: bands of BAND rows of tiles, whose inputs stay in the L2."""
    band = number // (BAND * tiles_n)
    within = number % (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + within % height, within // height


@triton.jit
def _load_taps(x_places, h0, w0, pad, step, G: tl.constexpr, BK: tl.constexpr):
    """A block of x [BM, BK], all of it under one tap; x_places are those of tap 0, channel 0."""
    blocks: tl.constexpr = G.channels // BK
    tap = step // blocks
    down = (tap // G.kernel[1]) * G.dilation[0]
    right = (tap % G.kernel[1]) * G.dilation[1]
    places = x_places + (down * G.x.row + right * G.x.pixel + (step % blocks) * BK)
    if pad is not None:
        h = h0 + down
        w = w0 + right
        inside = (h >= 0) & (h < G.x.height) & (w >= 0) & (w < G.x.width)
        places = tl.where(inside[:, None], places, pad + tl.arange(0, BK)[None, :])
    return tl.load(places)


@triton.jit
def _load_flat(x_rows, h0, w0, pad, step, G: tl.constexpr, BK: tl.constexpr):
    """A block of x [BM, BK], each k with a tap of its own; x_rows [BM] are those of k = 0."""
    k = step * BK + tl.arange(0, BK)
    tap = k // G.channels
    channel = k % G.channels
    down = (tap // G.kernel[1]) * G.dilation[0]
    right = (tap % G.kernel[1]) * G.dilation[1]
    places = x_rows[:, None] + (down * G.x.row + right * G.x.pixel + channel)[None, :]
    there = (k < G.k)[None, :]
    if pad is not None:
        h = h0[:, None] + down[None, :]
        w = w0[:, None] + right[None, :]
        inside = (h >= 0) & (h < G.x.height) & (w >= 0) & (w < G.x.width)
        places = tl.where(inside, places, pad + channel[None, :])
    a = tl.load(places, mask=there, other=0.0)
    if G.true_channels < G.channels:
        a = tl.where((channel < G.true_channels)[None, :], a, tl.zeros_like(a))
    return a


@triton.jit
def _load_rows(x_places, step, G: tl.constexpr, BK: tl.constexpr):
    """A block of x [BM, BK] of a product."""
    if G.k % BK == 0:
        a = tl.load(x_places + step * BK)
    else:
        k = step * BK + tl.arange(0, BK)
        a = tl.load(x_places + step * BK, mask=(k < G.k)[None, :], other=0.0)
    return a


@triton.jit
def _load_x(x_rows, x_places, h0, w0, pad, step, G: tl.constexpr, BK: tl.constexpr):
    """A block of x [BM, BK]."""
    if G.product:
        a = _load_rows(x_places, step, G, BK)
    elif G.channels % BK == 0:
        a = _load_taps(x_places, h0, w0, pad, step, G, BK)
    else:
        a = _load_flat(x_rows, h0, w0, pad, step, G, BK)
    return a


@triton.jit
def _conv(
    x,
    w,
    scale,
    row_scale,
    bias,
    r,
    numbers,
    pad,
    y,
    G: tl.constexpr,
    ENDS: tl.constexpr,
    T: tl.constexpr,
    EARLY: tl.constexpr,
):
    BM: tl.constexpr = T.m
    BN: tl.constexpr = T.n
    BK: tl.constexpr = T.k
    BAND: tl.constexpr = T.band
    tiles_m: tl.constexpr = (G.rows + BM - 1) // BM
    tiles_n: tl.constexpr = (G.outs + BN - 1) // BN
    steps: tl.constexpr = (G.k + BK - 1) // BK
    part: tl.constexpr = (steps + T.splits - 1) // T.splits
    pixels: tl.constexpr = G.x
    tile_m, tile_n = tile_at(tl.program_id(0), tiles_m, tiles_n, BAND)
    split = tl.program_id(1)
    group = tl.program_id(2)

    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    m_there = tl.minimum(m, G.rows - 1)
    if G.product:
        x_rows = x + pixel_offsets(m_there, pixels) + group * G.channels
        h0 = m
        w0 = m
    else:
        line = m_there // G.out_w
        h0 = (line % G.out_h) * G.stride[0] - G.top
        w0 = (m_there % G.out_w) * G.stride[1] - G.left
        image = line // G.out_h
        if G.x.wide:
            image = image.to(tl.int64)
        x_rows = x + (image * G.x.image + h0 * G.x.row + w0 * G.x.pixel + group * G.channels)
    x_places = x_rows[:, None] + k[None, :]
    w_rows = (group * G.outs + tl.minimum(n, G.outs - 1)) * G.k_packed
    w_places = w + w_rows[None, :] + k[:, None]

    whole: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    precise: tl.constexpr = "tf32x3" if x.dtype.element_ty == tl.float32 else "tf32"
    sums = tl.zeros((BM, BN), dtype=whole)
    n_inside = n < G.outs
    n = group * G.outs + n
    held = None
    if r is not None:
        if EARLY:
            held = residual_of(r, m, n, n_inside, ENDS)
    if steps == 1:  # without a loop, and what a pipeline holds in registers
        a = _load_x(x_rows, x_places, h0, w0, pad, 0, G, BK)
        sums = tl.dot(a, tl.load(w_places), sums, input_precision=precise, out_dtype=whole)
    else:
        begin = split * part
        for step in range(begin, tl.minimum(begin + part, steps)):
            a = _load_x(x_rows, x_places, h0, w0, pad, step, G, BK)
            b = tl.load(w_places + step * BK)
            sums = tl.dot(a, b, sums, input_precision=precise, out_dtype=whole)

    if T.splits == 1:
        finish(sums, m, n, n_inside, scale, row_scale, bias, r, numbers, y, ENDS, held)
    else:
        row = (split * G.rows + m).to(tl.int64)
        inside = (m < G.rows)[:, None] & n_inside[None, :]
        tl.store(y + row[:, None] * G.all_outs + n[None, :], sums, mask=inside)

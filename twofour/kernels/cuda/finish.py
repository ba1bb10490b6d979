"""What happens to sums before they are stored (`Finish`), in Triton: for all kernels of products.

The numbers of a Finish (scales, bounds, zero point) are an operand and not part of the code: layers
that differ in nothing else share one kernel, and the time that it takes.

A kernel that keeps its sums calls `finish` with them. One that cannot, a library's or one whose
parts of the sum come from several blocks, writes them out, and `finish_call` does the rest.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from twofour.core.float8 import LARGEST
from twofour.core.functions import CLAMPS
from twofour.kernels.cuda.kernel import Array, Kernel, divided
from twofour.kernels.cuda.problem import ConvProblem, Finish, View
from twofour.kernels.cuda.rounding import MIDDLE, round_even, saturated

_TILE = 2048
_COLUMNS = 128
_ENDS = {"int8": (-128.0, 127.0), "float8e4m3fn": (-LARGEST, LARGEST)}


@dataclass(frozen=True)
class Pixels:
    """Where the pixel with number m of a tensor begins; images follow each other.

    Attributes:
        height: of an image.
        width: of an image.
        image: elements from one image to the next.
        row: elements from one row to the next.
        pixel: elements from one pixel to the next.
        flat: all pixels lie `pixel` elements apart.
        wide: offsets do not fit into 32 bits.
    """

    height: int
    width: int
    image: int
    row: int
    pixel: int
    flat: bool
    wide: bool

    @staticmethod
    def of(view: View, batch: int, height: int, width: int) -> Pixels:
        """Of a tensor of that many images."""
        flat = view.is_flat(height, width)
        wide = batch * max(view.image, height * view.row) >= 2**31
        return Pixels(height, width, view.image, view.row, view.pixel, flat, wide)


@dataclass(frozen=True)
class Ends:
    """What the code of a `Finish` has to know of it.

    Attributes:
        rows: of y, pixels of all images.
        activation: its name; "" where bounds do it.
        y: where the pixels of y lie.
        r: where those of the residual lie, or None.
        adds_last: the residual is added behind the activation.
    """

    rows: int
    activation: str
    y: Pixels
    r: Pixels | None
    adds_last: bool = False

    @staticmethod
    def of(problem: ConvProblem) -> Ends:
        """Of a product or convolution."""
        out_h, out_w = problem.out_size
        name = problem.finish.activation.name
        y = Pixels.of(problem.y, problem.batch, out_h, out_w)
        r = None if problem.r is None else Pixels.of(problem.r, problem.batch, out_h, out_w)
        last = r is not None and problem.finish.add_last
        return Ends(problem.rows, "" if name in CLAMPS else name, y, r, last)


def numbers_of(finish: Finish, dtype: str) -> NDArray[np.float32]:
    """The role "numbers": residual_scale, y_factor, low, high, y_zero, residual_zero.

    An activation that clamps, and the ends of y's type, are in `low` and `high`, which bound
    v * y_factor.

    Args:
        finish: what happens to sums.
        dtype: of y.
    """
    activation, zero = finish.activation, float(finish.y_zero)
    low, high = finish.low - zero, finish.high - zero
    if activation.clamps:
        ends = [bound * finish.y_factor for bound in activation.bounds()]
        low, high = max(low, ends[0]), min(high, ends[1])
    if dtype in _ENDS:
        least, most = (end - zero for end in _ENDS[dtype])
        low, high = max(low, least), min(high, most)
    r_zero = finish.residual_zero
    return np.array([finish.residual_scale, finish.y_factor, low, high, zero, r_zero], np.float32)


def finish_constants(problem: ConvProblem, constants: Mapping[str, Array]) -> dict[str, Array]:
    """The constants of a recipe that its Finish reads: scale, bias, numbers.

    Args:
        problem: the product or convolution.
        constants: "scale" [N] where sums are scaled, "bias" [N] or none for no bias.
    """
    found: dict[str, Array] = {"numbers": numbers_of(problem.finish, problem.y.dtype)}
    if problem.finish.scaled:
        found["scale"] = np.ascontiguousarray(constants["scale"], np.float32)
    if "bias" in constants:
        found["bias"] = np.ascontiguousarray(constants["bias"], np.float32)
    return found


def finish_operands(problem: ConvProblem, biased: bool) -> dict[str, tuple[str, str] | None]:
    """Parameter of `finish` -> (role, type), None for one that is not there; y is not among them.

    Args:
        problem: the product or convolution.
        biased: there is a bias.
    """
    how = problem.finish
    return {
        "scale": ("scale", "float32") if how.scaled else None,
        "row_scale": ("row_scale", "float32") if how.by_rows else None,
        "bias": ("bias", "float32") if biased else None,
        "r": ("r", problem.r.dtype) if problem.r is not None else None,
        "numbers": ("numbers", "float32"),
    }


def kernel_of(
    function: Any,
    operands: Mapping[str, tuple[str, str] | None],
    constants: Mapping[str, Any],
    grid: tuple[int, int, int],
    *,
    warps: int = 4,
    stages: int = 3,
) -> Kernel:
    """A kernel some of whose pointers may be missing.

    Args:
        function: the kernel, as `triton.jit` gives it.
        operands: parameter -> (role, type) or None, in the order of the parameters.
        constants: all other parameters.
        grid: programs along x, y and z.
        warps: of a program.
        stages: of the pipeline.
    """
    there = tuple(operand for operand in operands.values() if operand is not None)
    missing = {name: None for name, operand in operands.items() if operand is None}
    return Kernel(function, there, {**missing, **constants}, grid, warps, stages)


def finish_call(
    problem: ConvProblem, dtype: str, *, role: str = "sums", parts: int = 1, biased: bool = True
) -> Kernel:
    """The kernel that makes y of sums [parts, rows, out_channels], which lie without gaps.

    Args:
        problem: the product or convolution.
        dtype: of the sums: int32, float32 or float16.
        role: where they lie.
        parts: how many are added up first, always in the same order.
        biased: there is a bias.
    """
    columns = min(_COLUMNS, triton.next_power_of_2(problem.out_channels))
    tile = min(_TILE // columns, triton.next_power_of_2(problem.rows))
    operands = {
        "sums": (role, dtype),
        **finish_operands(problem, biased),
        "y": ("y", problem.y.dtype),
    }
    constants = {
        "ENDS": Ends.of(problem),
        "N": problem.out_channels,
        "PARTS": parts,
        "BLOCK_M": tile,
        "BLOCK_N": columns,
    }
    grid = (divided(problem.rows, tile), divided(problem.out_channels, columns), 1)
    return kernel_of(_finish_sums, operands, constants, grid)


@triton.jit
def pixel_offsets(m, PIXELS: tl.constexpr):
    """Offsets [...] of the pixels with the numbers m [...]."""
    if PIXELS.wide:
        m = m.to(tl.int64)
    if PIXELS.flat:
        offsets = m * PIXELS.pixel
    else:
        line = m // PIXELS.width
        offsets = (line // PIXELS.height) * PIXELS.image + (line % PIXELS.height) * PIXELS.row
        offsets += (m % PIXELS.width) * PIXELS.pixel
    return offsets


@triton.jit
def sigmoid(v):
    """1 / (1 + e**-v), float32; right at both infinities."""
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def activate(v, NAME: tl.constexpr):
    """The activation of core/functions.py by that name, float32.

    The factor v is limited from below where the other one is 0 by then.
    """
    if NAME == "Sigmoid":
        v = sigmoid(v)
    elif NAME == "Silu":
        v = tl.maximum(v, -80.0) * sigmoid(v)
    elif NAME == "Gelu":
        v = tl.maximum(v, -16.0) * (0.5 + 0.5 * tl.erf(v * 0.7071067811865476))
    elif NAME == "GeluTanh":
        v = tl.maximum(v, -16.0) * sigmoid(v * (1.5957691216057308 + 0.07135481627260025 * v * v))
    elif NAME == "Tanh":
        v = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * v))
    elif NAME == "HardSigmoid":
        kept: tl.constexpr = tl.PropagateNan.ALL
        v = tl.maximum(v * 0.16666666666666666 + 0.5, 0.0, propagate_nan=kept)
        v = tl.minimum(v, 1.0, propagate_nan=kept)
    elif NAME == "HardSwish":
        v = v * tl.minimum(tl.maximum(v * 0.16666666666666666 + 0.5, 0.0), 1.0)
    else:
        tl.static_assert(NAME == "", "no such activation")
    return v


@triton.jit
def coarse_gelu(v):
    """Gelu for a result in 255 steps, float32: a polynomial, off by 0.00005 max(4, |v|) at most.

    v P(v), P the share of a normal distribution below v: 0.5 + z Q(z * z), z = v within +-4. Q has
    the least largest error of v P(v) there, 0.00004, of all polynomials of its degree.
    """
    least = tl.maximum(v, -4.0)
    z = tl.minimum(least, 4.0)
    u = z * z
    q = 1.041959620806665e-07 - 1.3012929622746583e-09 * u
    q = q * u - 3.6571309465216473e-06
    q = q * u + 7.485502283088863e-05
    q = q * u - 0.001006490201689303
    q = q * u + 0.009505397640168667
    q = q * u - 0.06588783860206604
    q = q * u + 0.3986733853816986
    return least * (z * q + 0.5)


@triton.jit
def steps_of(numbers):
    """unit, up, span and first: a result in steps is bounded and rounded by two multiply-adds.

        y = saturated(v * unit + up) * span + first

    Saturated between 0 and 1. The last place of `first`, 1.5 * 2**23 and more, is 1: so the sum is
    whole, and its last byte is y. Minima, maxima and conversions take a multiprocessor twice as
    long each.
    """
    low = round_even(tl.load(numbers + 2))
    span = round_even(tl.load(numbers + 3)) - low
    part = 1.0 / span
    unit = tl.load(numbers + 1) * part
    return unit, -low * part, span, low + tl.load(numbers + 4) + MIDDLE


@triton.jit
def bounded(v, numbers, dtype: tl.constexpr):
    """Real values v as they are stored in y: times y_factor, between low and high."""
    keep: tl.constexpr = tl.PropagateNan.ALL
    v = tl.maximum(v * tl.load(numbers + 1), tl.load(numbers + 2), propagate_nan=keep)
    return tl.minimum(v, tl.load(numbers + 3), propagate_nan=keep).to(dtype)


@triton.jit
def residual_of(r, m, n, n_inside, ENDS: tl.constexpr):
    """The residual [BM, BN] at pixels m and channels n; arguments as of `finish`."""
    pixels: tl.constexpr = ENDS.r
    places = r + pixel_offsets(m, pixels)[:, None] + n[None, :]
    return tl.load(places, mask=(m < ENDS.rows)[:, None] & n_inside[None, :], other=0.0)


@triton.jit
def float_of(v):
    """Values as float32, exactly; bytes without an instruction that converts.

    That leaves Triton the choice to move bytes between lanes, and not what becomes of them.
    """
    if v.dtype == tl.int8:
        # 1.5 * 2**23 has a last place of 1: its bits plus an integer are its value plus that.
        f = (v.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        f = v.to(tl.float32)
    return f


@triton.jit
def affine(
    sums, m, n, m_inside, n_inside, scale, row_scale, bias, own, shift, SHIFTED: tl.constexpr
):
    """(sums * scale * row_scale + bias) * own + shift; these are 1 and 0 unless SHIFTED."""
    v = sums.to(tl.float32)
    if scale is not None:
        factor = (tl.load(scale + n, mask=n_inside, other=0.0) * own)[None, :]
        if row_scale is not None:
            factor = factor * tl.load(row_scale + m, mask=m_inside, other=0.0)[:, None]
        v = v * factor
    elif row_scale is not None:
        v = v * (tl.load(row_scale + m, mask=m_inside, other=0.0) * own)[:, None]
    elif SHIFTED:
        v = v * own
    if bias is not None:
        v = v + (tl.load(bias + n, mask=n_inside, other=0.0) * own + shift)[None, :]
    elif SHIFTED:
        v = v + shift
    return v


@triton.jit
def finish(
    sums, m, n, n_inside, scale, row_scale, bias, r, numbers, y, ENDS: tl.constexpr, held=None
):
    """Stores y of a tile of sums.

    Args:
        sums: [BM, BN], int32 or float32.
        m: int32 [BM], pixels of y; those from ENDS.rows on are not stored.
        n: int32 [BN], channels of y.
        n_inside: bool [BN], which are stored.
        scale: pointer, or None; so are row_scale, bias and r.
        row_scale: of m.
        bias: of n.
        r: residual.
        numbers: see `numbers_of`.
        y: result.
        ENDS: constants.
        held: what `residual_of` gave, where it was loaded before.
    """
    m_inside = m < ENDS.rows
    inside = m_inside[:, None] & n_inside[None, :]
    activation: tl.constexpr = ENDS.activation
    coarse: tl.constexpr = y.dtype.element_ty == tl.int8
    # Where nothing bends in between, the sums become steps at once.
    linear: tl.constexpr = coarse and activation == ""
    own = 1.0
    shift = 0.0
    if coarse:
        unit, up, span, first = steps_of(numbers)
        if linear:
            own = unit
            shift = up
    v = affine(sums, m, n, m_inside, n_inside, scale, row_scale, bias, own, shift, linear)
    if r is not None:
        if held is None:
            held = residual_of(r, m, n, n_inside, ENDS)
        residual = float_of(held)
        if not ENDS.adds_last:
            v = v + residual * (tl.load(numbers) * own)
    if activation == "Gelu" and coarse:
        v = coarse_gelu(v)
    else:
        v = activate(v, activation)
    if ENDS.adds_last:
        v = v + (residual - tl.load(numbers + 5)) * (tl.load(numbers) * own)
    if coarse:
        share = v if linear else v * unit + up
        q = saturated(share, span, first)
    else:
        q = bounded(v, numbers, y.dtype.element_ty)
    y_pixels: tl.constexpr = ENDS.y
    tl.store(y + pixel_offsets(m, y_pixels)[:, None] + n[None, :], q, mask=inside)


@triton.jit
def _finish_sums(
    sums,
    scale,
    row_scale,
    bias,
    r,
    numbers,
    y,
    ENDS: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < ENDS.rows)[:, None] & (n < N)[None, :]
    places = sums + m.to(tl.int64)[:, None] * N + n[None, :]
    total = tl.load(places, mask=inside, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(places + part * ENDS.rows * N, mask=inside, other=0)
    finish(total, m, n, n < N, scale, row_scale, bias, r, numbers, y, ENDS)

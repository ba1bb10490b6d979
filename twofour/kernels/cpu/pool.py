"""Pooling: maximum and average over windows, and the mean of each channel.

Sixteen channels at a time, the last, incomplete block masked; the maximum of bytes takes 64 where
they divide evenly. Windows that reach over the border are clipped, those inside have all their taps
written out. Same kernel signature as nest.py: t0..t1 counts rows (maximum, average) or images
(mean), p0..p1 blocks of channels. Maxima of maxima are in pool_chain.py.

Averages of bytes are those of core/pooling.py, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import Window
from twofour.core.pooling import tap_factors
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.problem import LANES, Strides
from twofour.kernels.cpu.rows import from_bfloats, load16, store16, to_bfloats
from twofour.kernels.cpu.vector import (
    BYTES16,
    F32S,
    I32S,
    ROUND,
    WORDS16,
    every,
    float_bits,
    lanes_below,
)

_POINT = Window((1, 1))
BYTES = {"u8": 1, "bfloat16": 2, "float32": 4}
"""Of an element, by the name that problems give its type."""
_HEADER_BYTES = 64
_SHARED = 4  # blocks that threads may share where they cannot share rows
_LOWEST = "0xFFF0000000000000"  # minus infinity


@dataclass(frozen=True)
class PoolProblem:
    """One pooling operator.

    Attributes:
        op: "max", "average" (over windows) or "mean" (over the whole image).
        batch: images.
        height: of the input.
        width: of the input.
        channels: number of channels.
        kind: of the input: "u8", "bfloat16" or "float32"; "max" writes the same.
        x: input strides; its pointer is pixel (0, 0), not the padding.
        y: output strides.
        window: of "max" and "average".
        out: of "mean" and "average": likewise.
        include_pad: of "average": the padding counts as zeros.
        further: strides of the results of further maxima, each over the one before
            (pool_chain.py).
    """

    op: str
    batch: int
    height: int
    width: int
    channels: int
    kind: str
    x: Strides
    y: Strides
    window: Window = _POINT
    out: str = "u8"
    include_pad: bool = False
    further: tuple[Strides, ...] = ()

    @property
    def lanes(self) -> int:
        """Channels of a block."""
        wide = self.op == "max" and self.kind == "u8"
        least = _SHARED if self.further else 1
        fits = (n for n in (64, 32) if self.channels % n == 0 and self.channels // n >= least)
        return next(fits, LANES) if wide else LANES

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.lanes)

    @property
    def pieces(self) -> int:
        """Units of work that threads share: rows, or images."""
        if self.op == "mean" or self.further:
            return self.batch
        return self.batch * self.window.output_size(self.height, self.width)[0]


def pack_mean(scale: float, x_zero_sum: int, y_zero: int) -> NDArray[np.uint8]:
    """The header of a mean: y = round((sum - x_zero_sum) * scale) + y_zero (as stored).

    Args:
        scale: x_scale / (pixels * y_scale), or 1 / pixels for floats.
        x_zero_sum: pixels * zero point of x as stored.
        y_zero: zero point of y as stored.
    """
    out = np.zeros(16, np.int32)
    out[0] = np.float32(scale).view(np.int32)
    out[1], out[2] = x_zero_sum, y_zero
    return out.view(np.uint8)


def pack_average(scale: float, x_zero: int, y_zero: int, window: Window) -> NDArray[np.uint8]:
    """The header of an average over windows: zero points, then the factor of n taps at n.

    Args:
        scale: x_scale / y_scale, or 1 for floats.
        x_zero: zero point of x as stored.
        y_zero: zero point of y as stored.
        window: the window.
    """
    out = np.zeros(16, np.int32)
    out[1], out[2] = x_zero, y_zero
    factors = tap_factors(scale, window.kernel[0] * window.kernel[1])
    return np.concatenate([out.view(np.uint8), factors.view(np.uint8)])


def emit_pool(name: str, problem: PoolProblem) -> str:
    """The kernel as an LLVM module."""
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )
    body = _mean_image if problem.op == "mean" else _window_row
    f.loop(
        "%t0", "%t1", [], lambda t, _: f.loop("%p0", "%p1", [], lambda p, _: body(f, problem, t, p))
    )
    return module_text([f])


def mask_of(f: Function, problem: PoolProblem, block: Value) -> Value:
    """Which lanes are channels; "" where all are."""
    if problem.channels % LANES == 0:
        return ""
    return lanes_below(f, f.int_op("sub", problem.channels, f.int_op("mul", block, LANES)))


def vector_of(problem: PoolProblem) -> str:
    """The type of a block of the input."""
    return f"<{problem.lanes} x i8>" if problem.kind == "u8" else F32S


def load_block(f: Function, problem: PoolProblem, pointer: Value, mask: Value) -> Value:
    """A block of the input; bfloat16 as floats."""
    if problem.kind == "bfloat16":
        return from_bfloats(f, load16(f, WORDS16, pointer, 0, mask))
    return load16(f, vector_of(problem), pointer, 0, mask)


def store_block(
    f: Function, problem: PoolProblem, value: Value, pointer: Value, mask: Value
) -> None:
    """A block of the output."""
    kind = problem.kind if problem.op == "max" else problem.out
    if kind == "bfloat16":
        store16(f, WORDS16, to_bfloats(f, value), pointer, 0, mask)
        return
    vector = f"<{problem.lanes} x i8>" if kind == "u8" else F32S
    store16(f, vector, value, pointer, 0, mask)


def _window_row(f: Function, problem: PoolProblem, t: Value, block: Value) -> list[Value]:
    """One output row of one block of channels."""
    (sh, sw), (top, left) = problem.window.stride, problem.window.pads[:2]
    out_h, out_w = problem.window.output_size(problem.height, problem.width)
    out = problem.kind if problem.op == "max" else problem.out
    image, row = f.int_op("udiv", t, out_h), f.int_op("urem", t, out_h)
    first = f.int_op("mul", block, problem.lanes)
    mask = mask_of(f, problem, block)
    inputs = f.int_op("mul", first, BYTES[problem.kind])
    x = f.at(f.at("%x", f.int_op("mul", image, problem.x.image)), inputs)
    line = f.int_op(
        "add", f.int_op("mul", image, problem.y.image), f.int_op("mul", row, problem.y.row)
    )
    y = f.at(f.at("%y", line), f.int_op("mul", first, BYTES[out]))
    y0 = f.int_op("sub", f.int_op("mul", row, sh), top)
    rows = _span(f, y0, problem.window.kernel[0], problem.window.dilation[0], problem.height)

    def column(j: Value, *, inside: bool) -> None:
        x0 = f.int_op("sub", f.int_op("mul", j, sw), left)
        columns = None if inside else _span(f, x0, *_width_of(problem))
        value = _over_window(f, problem, x, (y0, x0), (rows, columns, mask))
        if problem.op == "average":
            value = _averaged(f, problem, value, _taps(f, problem, rows, columns))
        store_block(f, problem, value, f.at(y, f.int_op("mul", j, problem.y.pixel)), mask)

    reach = (problem.window.kernel[1] - 1) * problem.window.dilation[1]
    begin = min(out_w, -(-left // sw))
    end = max(begin, min(out_w, (problem.width - 1 - reach + left) // sw + 1))
    f.repeat(0, begin, lambda j: column(j, inside=False))
    f.repeat(begin, end, lambda j: column(j, inside=True))
    f.repeat(end, out_w, lambda j: column(j, inside=False))
    return []


def _width_of(problem: PoolProblem) -> tuple[int, int, int]:
    """Taps of a window's row, the distance between them, and the columns there are."""
    return problem.window.kernel[1], problem.window.dilation[1], problem.width


Span = tuple[Value, Value]


def _taps(f: Function, problem: PoolProblem, rows: Span, columns: Span | None) -> Value:
    """How many taps of a window lie in the image."""
    down = f.int_op("sub", rows[1], rows[0])
    across = f.int_op("sub", columns[1], columns[0]) if columns is not None else None
    return f.int_op("mul", down, problem.window.kernel[1] if across is None else across)


def _averaged(f: Function, problem: PoolProblem, total: Value, taps: Value) -> Value:
    """The average from the sum over that many taps, as it is stored."""
    if problem.kind == "u8":
        count = f.let(f"trunc i64 {taps} to i32")
        zeros = f.int_op("mul", count, f.load("i32", "%w", 4, 4), "i32")
        total = f.let(f"sub {I32S} {total}, {f.splat('i32', zeros)}")
        total = f.let(f"sitofp {I32S} {total} to {F32S}")
    kh, kw = problem.window.kernel
    index = f.int_op("mul", str(kh * kw) if problem.include_pad else taps, 4)
    factor = f.load("float", f.at("%w", index), _HEADER_BYTES, 4)
    mean = f.let(f"fmul {F32S} {total}, {f.splat('float', factor)}")
    return _quantized(f, mean) if problem.out == "u8" else mean


def lowest_of(problem: PoolProblem) -> Value:
    """What a maximum begins with."""
    return "zeroinitializer" if problem.kind == "u8" else every("float", _LOWEST)


def greater(f: Function, problem: PoolProblem, value: Value, best: Value) -> Value:
    """np.where(value > best, value, best), of a block."""
    vector, compare = vector_of(problem), "icmp ugt" if problem.kind == "u8" else "fcmp ogt"
    above = f.let(f"{compare} {vector} {value}, {best}")
    return f.let(f"select <{problem.lanes} x i1> {above}, {vector} {value}, {vector} {best}")


def _over_window(
    f: Function,
    problem: PoolProblem,
    x: Value,
    origin: tuple[Value, Value],
    taps: tuple[Span, Span | None, Value],
) -> Value:
    """The maximum of one window, or its sum.

    Args:
        f: the kernel.
        problem: the problem.
        x: pixel (0, 0) of the image, at the block.
        origin: row and column of the window's first tap, maybe outside.
        taps: the rows and columns of the window that lie in the image, None for all columns; and
            which lanes are channels.
    """
    (y0, x0), (rows, columns, mask) = origin, taps
    (dh, dw), (count, _, _) = problem.window.dilation, _width_of(problem)
    vector, sums = vector_of(problem), problem.op == "average"
    start = "zeroinitializer" if sums else lowest_of(problem)
    if sums and problem.kind == "u8":
        vector = I32S

    def line(a: Value) -> Value:
        down = f.int_op("mul", f.int_op("add", y0, f.int_op("mul", a, dh)), problem.x.row)
        return f.at(f.at(x, down), f.int_op("mul", x0, problem.x.pixel))

    def tap(here: Value, offset: Value | int, best: Value) -> Value:
        value = load_block(f, problem, f.at(here, offset), mask)
        if sums and problem.kind == "u8":
            return f.int_op("add", best, f.let(f"zext {BYTES16} {value} to {I32S}"), I32S)
        if sums:
            return f.let(f"fadd {F32S} {best}, {value}")
        return greater(f, problem, value, best)

    def row(a: Value, over: list[Value]) -> list[Value]:
        here, step = line(a), dw * problem.x.pixel
        if columns is not None:
            return f.loop(
                *columns,
                [(vector, over[0])],
                lambda b, inner: [tap(here, f.int_op("mul", b, step), inner[0])],
            )
        best = over[0]
        for b in range(count):
            best = tap(here, b * step, best)
        return [best]

    return f.loop(*rows, [(vector, start)], row)[0]


def _span(f: Function, origin: Value, count: int, dilation: int, limit: int) -> tuple[Value, Value]:
    """Taps of one axis that lie inside: ceil(-origin / d) .. ceil((limit - origin) / d)."""
    below = f.int_op("sdiv", f.int_op("sub", dilation - 1, origin), dilation)
    above = f.int_op(
        "sdiv", f.int_op("add", f.int_op("sub", limit, origin), dilation - 1), dilation
    )
    return (
        f.call("i64", "llvm.smax.i64", ("i64", below), ("i64", "0")),
        f.call("i64", "llvm.smin.i64", ("i64", above), ("i64", str(count))),
    )


def _mean_image(f: Function, problem: PoolProblem, t: Value, block: Value) -> list[Value]:
    """The mean of one block of channels of one image."""
    size = BYTES[problem.kind]
    vector = I32S if problem.kind == "u8" else F32S
    mask = mask_of(f, problem, block)
    x = f.at(f.at("%x", f.int_op("mul", t, problem.x.image)), f.int_op("mul", block, LANES * size))

    def pixel(i: Value, j: Value, total: Value) -> list[Value]:
        at = f.at(
            x,
            f.int_op("add", f.int_op("mul", i, problem.x.row), f.int_op("mul", j, problem.x.pixel)),
        )
        value = load_block(f, problem, at, mask)
        if problem.kind != "u8":
            return [f.let(f"fadd {F32S} {total}, {value}")]
        return [f.let(f"add {I32S} {total}, {f.let(f'zext {BYTES16} {value} to {I32S}')}")]

    total = f.loop(
        0,
        problem.height,
        [(vector, "zeroinitializer")],
        lambda i, over: f.loop(
            0, problem.width, [(vector, over[0])], lambda j, inner: pixel(i, j, inner[0])
        ),
    )[0]
    if problem.kind == "u8":
        centred = f.let(f"sub {I32S} {total}, {f.splat('i32', f.load('i32', '%w', 4, 4))}")
        total = f.let(f"sitofp {I32S} {centred} to {F32S}")
    mean = f.let(f"fmul {F32S} {total}, {f.splat('float', f.load('float', '%w', 0, 4))}")
    out_size = BYTES[problem.out]
    y = f.at(
        f.at("%y", f.int_op("mul", t, problem.y.image)), f.int_op("mul", block, LANES * out_size)
    )
    store_block(f, problem, _quantized(f, mean) if problem.out == "u8" else mean, y, mask)
    return []


def _quantized(f: Function, value: Value) -> Value:
    """saturate(round_half_even(value) + zero point of y), 16 stored bytes."""
    zero = f.splat("i32", f.load("i32", "%w", 8, 4))
    zero_f = f.let(f"sitofp {I32S} {zero} to {F32S}")
    low = f.let(f"fneg {F32S} {zero_f}")
    high = f.let(f"fsub {F32S} {every('float', float_bits(255.0))}, {zero_f}")
    above = f.let(f"fcmp ogt {F32S} {value}, {low}")
    value = f.let(f"select <16 x i1> {above}, {F32S} {value}, {F32S} {low}")
    below = f.let(f"fcmp olt {F32S} {value}, {high}")
    value = f.let(f"select <16 x i1> {below}, {F32S} {value}, {F32S} {high}")
    shifted = f.let(f"fadd {F32S} {value}, {every('float', float_bits(ROUND))}")
    bits = f.let(f"add {I32S} {f.let(f'bitcast {F32S} {shifted} to {I32S}')}, {zero}")
    return f.let(f"trunc {I32S} {bits} to {BYTES16}")

"""Pooling: maximum over windows, and the mean of each channel.

Sixteen channels at a time; the last, incomplete block is masked. Same kernel signature as nest.py:
t0..t1 counts rows (maximum) or images (mean), p0..p1 blocks of 16 channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import Window
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.problem import LANES, Strides
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, ROUND, every, float_bits, lanes_below

_POINT = Window((1, 1))


@dataclass(frozen=True)
class PoolProblem:
    """One pooling operator.

    Attributes:
        op: "max" or "mean" (over the whole image).
        batch: images.
        height: of the input.
        width: of the input.
        channels: number of channels.
        kind: of the input: "u8" or "float32"; "max" writes the same.
        x: input strides; its pointer is pixel (0, 0), not the padding.
        y: output strides.
        window: of "max".
        out: of "mean": "u8" or "float32".
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

    @property
    def blocks(self) -> int:
        """16-channel blocks."""
        return -(-self.channels // LANES)

    @property
    def pieces(self) -> int:
        """Units of work that threads share: rows, or images."""
        if self.op == "mean":
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


def emit_pool(name: str, problem: PoolProblem) -> str:
    """The kernel as an LLVM module."""
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )
    body = _max_row if problem.op == "max" else _mean_image
    f.loop(
        "%t0", "%t1", [], lambda t, _: f.loop("%p0", "%p1", [], lambda p, _: body(f, problem, t, p))
    )
    return module_text([f])


def _mask(f: Function, problem: PoolProblem, block: Value) -> Value:
    """Which lanes are channels; "" where all are."""
    if problem.channels % LANES == 0:
        return ""
    return lanes_below(f, f.int_op("sub", problem.channels, f.int_op("mul", block, LANES)))


def _load(f: Function, kind: str, pointer: Value, mask: Value) -> Value:
    vector, name = (BYTES16, "v16i8") if kind == "u8" else (F32S, "v16f32")
    if not mask:
        return f.load(vector, pointer)
    return f.call(
        vector,
        f"llvm.masked.load.{name}.p0",
        ("ptr", pointer),
        ("<16 x i1>", mask),
        (vector, "zeroinitializer"),
    )


def _store(f: Function, kind: str, value: Value, pointer: Value, mask: Value) -> None:
    vector, name = (BYTES16, "v16i8") if kind == "u8" else (F32S, "v16f32")
    if mask:
        f.call(
            "void",
            f"llvm.masked.store.{name}.p0",
            (vector, value),
            ("ptr", pointer),
            ("<16 x i1>", mask),
        )
    else:
        f.store(vector, value, pointer)


def _max_row(f: Function, problem: PoolProblem, t: Value, block: Value) -> list[Value]:
    """One output row of one block of channels."""
    (sh, sw), (top, left) = problem.window.stride, problem.window.pads[:2]
    out_h, out_w = problem.window.output_size(problem.height, problem.width)
    size = 1 if problem.kind == "u8" else 4
    image, row = f.int_op("udiv", t, out_h), f.int_op("urem", t, out_h)
    first = f.int_op("mul", block, LANES * size)
    mask = _mask(f, problem, block)
    x = f.at(f.at("%x", f.int_op("mul", image, problem.x.image)), first)
    line = f.int_op(
        "add", f.int_op("mul", image, problem.y.image), f.int_op("mul", row, problem.y.row)
    )
    y = f.at(f.at("%y", line), first)

    def column(j: Value, _: list[Value]) -> list[Value]:
        y0 = f.int_op("sub", f.int_op("mul", row, sh), top)
        x0 = f.int_op("sub", f.int_op("mul", j, sw), left)
        best = _window_max(f, problem, x, (y0, x0), mask)
        _store(f, problem.kind, best, f.at(y, f.int_op("mul", j, problem.y.pixel)), mask)
        return []

    f.loop(0, out_w, [], column)
    return []


def _window_max(
    f: Function, problem: PoolProblem, x: Value, origin: tuple[Value, Value], mask: Value
) -> Value:
    """The maximum of one window; it is clipped to the image, so padding is never read.

    Args:
        f: the kernel.
        problem: the problem.
        x: pixel (0, 0) of the image, at the block.
        origin: row and column of the window's first tap, maybe outside.
        mask: which lanes are channels.
    """
    (y0, x0), (kh, kw), (dh, dw) = origin, problem.window.kernel, problem.window.dilation
    rows, columns = _span(f, y0, kh, dh, problem.height), _span(f, x0, kw, dw, problem.width)
    vector = BYTES16 if problem.kind == "u8" else F32S
    lowest = "zeroinitializer" if problem.kind == "u8" else every("float", "0xFFF0000000000000")

    def tap(a: Value, b: Value, best: Value) -> list[Value]:
        down = f.int_op("mul", f.int_op("add", y0, f.int_op("mul", a, dh)), problem.x.row)
        across = f.int_op("mul", f.int_op("add", x0, f.int_op("mul", b, dw)), problem.x.pixel)
        value = _load(f, problem.kind, f.at(x, f.int_op("add", down, across)), mask)
        compare = "icmp ugt" if problem.kind == "u8" else "fcmp ogt"
        greater = f.let(f"{compare} {vector} {value}, {best}")
        return [f.let(f"select <16 x i1> {greater}, {vector} {value}, {vector} {best}")]

    return f.loop(
        *rows,
        [(vector, lowest)],
        lambda a, over: f.loop(*columns, [(vector, over[0])], lambda b, inner: tap(a, b, inner[0])),
    )[0]


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
    size = 1 if problem.kind == "u8" else 4
    vector = I32S if problem.kind == "u8" else F32S
    mask = _mask(f, problem, block)
    x = f.at(f.at("%x", f.int_op("mul", t, problem.x.image)), f.int_op("mul", block, LANES * size))

    def pixel(i: Value, j: Value, total: Value) -> list[Value]:
        at = f.at(
            x,
            f.int_op("add", f.int_op("mul", i, problem.x.row), f.int_op("mul", j, problem.x.pixel)),
        )
        value = _load(f, problem.kind, at, mask)
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
    out_size = 1 if problem.out == "u8" else 4
    y = f.at(
        f.at("%y", f.int_op("mul", t, problem.y.image)), f.int_op("mul", block, LANES * out_size)
    )
    _store(f, problem.out, _quantized(f, mean) if problem.out == "u8" else mean, y, mask)
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

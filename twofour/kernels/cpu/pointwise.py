"""Operators that touch each element once.

They enter and leave the channels-last layout, quantize, dequantize, add a residual, and subsample
with channel padding.

Written as scalar loops with constant bounds and vectorised by LLVM. All share the kernel signature
of nest.py; the work is cut by rows (t0..t1 over batch * height), panels are not used. Constants
come from the 64-byte header `w`:

    0 f32 x_scale   4 i32 x_zero   8 f32 y_scale   12 i32 y_zero   16 f32 r_scale   20 i32 r_zero
    24 f32 low   28 f32 high

Zero points are as stored (int8 plus 128). Their meaning is `core.numerics.quantize` and
`dequantize`, element by element, with an activation of core/functions.py in between: the short form
where y is quantized. A product of bytes is `core.numerics.scale_product`: nothing is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofour.kernels.cpu.functions import Floats, emit_activation
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.problem import Strides
from twofour.kernels.cpu.vector import ROUND, float_bits

_FEW = 4  # channels of an image as it comes
_FLOAT = ("f32", "float32")
_REAL = (*_FLOAT, "bfloat16")
_BYTES = {"u8": 1, "f32": 4, "bfloat16": 2, "int8": 1, "uint8": 1, "float32": 4}


@dataclass(frozen=True)
class View:
    """Where a tensor's elements lie.

    Attributes:
        kind: "u8" (stored quantized), "bfloat16" or "f32", or of a plain array "int8", "uint8" or
            "float32".
        image: bytes from one image to the next.
        row: bytes from one row to the next.
        pixel: bytes from one pixel to the next.
        channel: bytes from one channel to the next.
    """

    kind: str
    image: int
    row: int
    pixel: int
    channel: int

    @staticmethod
    def native(kind: str, strides: Strides) -> View:
        """Channels last, in the arena."""
        return View(kind, strides.image, strides.row, strides.pixel, _BYTES[kind])

    @staticmethod
    def plain(dtype: str, c: int, h: int, w: int) -> View:
        """A C-contiguous NCHW array."""
        size = _BYTES[dtype]
        return View(dtype, c * h * w * size, w * size, size, h * w * size)


@dataclass(frozen=True)
class MapProblem:
    """One operator that touches each element once.

        y[n, h, w, before + c] = f(x[n, h, w, c] [, r[n, h, w, c]])

    r may have steps of 0 and so be the same for all pixels of an image. The channels around hold
    the zero of y.

    Attributes:
        op: "copy" (f changes the form only, not the scale), "convert" (f dequantizes and quantizes
            as the kinds of x and y need it), "add" or "mul".
        batch: images.
        height: rows.
        width: columns.
        channels: channels of x.
        x: input.
        y: output.
        r: second operand of "add" and "mul".
        activation: name of what the results go through; low and high are the bounds of Clip.
        before: channels of y before those of x.
        after: channels of y after those of x.
    """

    op: str
    batch: int
    height: int
    width: int
    channels: int
    x: View
    y: View
    r: View | None = None
    activation: str = ""
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class MapConstants:
    """Scales, zero points (of stored tensors with the 128 of int8), and the bounds of Clip.

    Of a product of bytes x_scale is that of x divided by that of y, and y_scale is not read.
    """

    x_scale: float = 1.0
    x_zero: int = 0
    y_scale: float = 1.0
    y_zero: int = 0
    r_scale: float = 1.0
    r_zero: int = 0
    low: float = -np.inf
    high: float = np.inf

    def pack(self) -> NDArray[np.uint8]:
        """The 64-byte header."""
        out = np.zeros(16, np.int32)
        out[[0, 2, 4]] = np.array([self.x_scale, self.y_scale, self.r_scale], np.float32).view(
            np.int32
        )
        out[[1, 3, 5]] = [self.x_zero, self.y_zero, self.r_zero]
        out[6:8] = np.array([self.low, self.high], np.float32).view(np.int32)
        return out.view(np.uint8)


def emit_map(name: str, problem: MapProblem) -> str:
    """The kernel as an LLVM module; compile it with `vectorize`."""
    pointers = [("ptr noalias", "x"), ("ptr", "w"), ("ptr noalias", "y"), ("ptr noalias", "r")]
    f = Function(name, [*pointers, *(("i64", p) for p in ("t0", "t1", "p0", "p1"))])
    names = ("x_scale", "x_zero", "y_scale", "y_zero", "r_scale", "r_zero", "low", "high")
    constant = {
        key: f.load("i32" if key.endswith("zero") else "float", "%w", 4 * i, 4)
        for i, key in enumerate(names)
    }
    views = {"x": problem.x, "y": problem.y} | ({"r": problem.r} if problem.r else {})

    def row(t: Value) -> None:
        image, line = f.int_op("udiv", t, problem.height), f.int_op("urem", t, problem.height)
        at = {}
        for key, view in views.items():
            down = f.int_op("mul", line, view.row)
            at[key] = f.at(f"%{key}", f.int_op("add", f.int_op("mul", image, view.image), down))
        if problem.before or problem.after:
            _fill_around(f, problem, at["y"], constant["y_zero"])
            at["y"] = f.at(at["y"], problem.before * problem.y.channel)
        _walk(f, views, at, _inner_loops(problem, list(views.values())), element)

    def element(at: dict[str, Value]) -> None:
        _element(f, problem, at, constant)

    f.repeat("%t0", "%t1", row)
    return module_text([f])


def _walk(
    f: Function,
    views: dict[str, View],
    at: dict[str, Value],
    loops: list[tuple[int, str]],
    visit: Callable[[dict[str, Value]], None],
) -> None:
    """Nested loops of (count, axis); calls visit(pointers) for each element."""
    if not loops:
        visit(at)
        return
    (count, axis), *inner = loops

    def turn(i: Value) -> None:
        here = {k: f.at(p, f.int_op("mul", i, getattr(views[k], axis))) for k, p in at.items()}
        _walk(f, views, here, inner, visit)

    if not inner and 1 < count <= _FEW:
        for i in range(count):
            turn(str(i))
    else:
        f.repeat(0, count, turn)


def _element(
    f: Function, problem: MapProblem, at: dict[str, Value], constant: dict[str, Value]
) -> None:
    """One element of y."""
    if problem.op == "copy":
        _store(f, _load(f, at["x"], problem.x.kind), at["y"], problem.y.kind)
        return
    value = _read(f, at["x"], problem.x.kind, constant, "x")
    if problem.r is not None:
        other = _read(f, at["r"], problem.r.kind, constant, "r")
        value = f.let(f"f{problem.op} float {value}, {other}")
    bounds, short = (constant["low"], constant["high"]), problem.y.kind not in _FLOAT
    value = emit_activation(Floats(f, 1), problem.activation, value, bounds, short=short)
    if problem.y.kind not in _REAL:
        if problem.op == "mul":
            value = round_scalar(f, value, constant["y_zero"])
        else:
            value = quantize_scalar(f, value, constant["y_scale"], constant["y_zero"])
    _store(f, value, at["y"], problem.y.kind)


def _fill_around(f: Function, problem: MapProblem, row: Value, zero: Value) -> None:
    """The padding channels of one row of y."""
    kind = {1: "i8", 2: "i16", 4: "i32"}[problem.y.channel]
    value = "0" if problem.y.kind in _REAL else f.let(f"trunc i32 {zero} to i8")
    after = problem.before + problem.channels

    def pixel(j: Value) -> None:
        here = f.at(row, f.int_op("mul", j, problem.y.pixel))
        f.repeat(0, problem.before, lambda c: channel(here, c))
        f.repeat(after, after + problem.after, lambda c: channel(here, c))

    def channel(here: Value, c: Value) -> None:
        f.store(kind, value, f.at(here, f.int_op("mul", c, problem.y.channel)))

    f.repeat(0, problem.width, pixel)


def _inner_loops(problem: MapProblem, views: list[View]) -> list[tuple[int, str]]:
    """The loops within a row.

    One where pixels and channels are one run of elements, else two with channels inside, or the
    longer one where a view has its pixels closer; a few channels are written out, so that LLVM
    vectorises over pixels and interleaves them.
    """
    if all(v.pixel == problem.channels * v.channel for v in views):
        return [(problem.width * problem.channels, "channel")]
    across = any(v.channel > v.pixel > 0 for v in views)
    if across and problem.width > problem.channels > _FEW:
        return [(problem.channels, "channel"), (problem.width, "pixel")]
    return [(problem.width, "pixel"), (problem.channels, "channel")]


def _load(f: Function, pointer: Value, kind: str) -> Value:
    """The element: a float, or a stored byte. Of bfloat16 the float of the same value."""
    if kind in _FLOAT:
        return f.load("float", pointer, 0, 4)
    if kind == "bfloat16":
        wide = f.let(f"zext i16 {f.load('i16', pointer, 0, 2)} to i32")
        return f.let(f"bitcast i32 {f.let(f'shl i32 {wide}, 16')} to float")
    byte = f.load("i8", pointer)
    return f.let(f"xor i8 {byte}, -128") if kind == "int8" else byte


def _store(f: Function, value: Value, pointer: Value, kind: str) -> None:
    """The inverse of `_load`."""
    if kind in _FLOAT:
        f.store("float", value, pointer, 0, 4)
        return
    if kind == "bfloat16":
        f.store("bfloat", f.let(f"fptrunc float {value} to bfloat"), pointer, 0, 2)
        return
    f.store("i8", f.let(f"xor i8 {value}, -128") if kind == "int8" else value, pointer)


def _read(f: Function, pointer: Value, kind: str, constant: dict[str, Value], which: str) -> Value:
    """The element's real value, a float."""
    value = _load(f, pointer, kind)
    if kind in _REAL:
        return value
    centred = f.let(f"sub i32 {f.let(f'zext i8 {value} to i32')}, {constant[which + '_zero']}")
    return f.let(
        f"fmul float {f.let(f'sitofp i32 {centred} to float')}, {constant[which + '_scale']}"
    )


def quantize_scalar(f: Function, value: Value, scale: Value, zero: Value) -> Value:
    """Quantizes to a stored byte; NaN becomes the zero point.

    saturate(round_half_even(value / scale) + zero)
    """
    return round_scalar(f, f.let(f"fdiv float {value}, {scale}"), zero)


def round_scalar(f: Function, value: Value, zero: Value) -> Value:
    """A number of steps as a stored byte; NaN becomes the zero point.

    saturate(round_half_even(value) + zero)
    """
    zero_f = f.let(f"sitofp i32 {zero} to float")
    low, high = f.let(f"fneg float {zero_f}"), f.let(f"fsub float {float_bits(255.0)}, {zero_f}")
    ordered = f.let(f"fcmp ord float {value}, {value}")
    value = f.let(f"select i1 {ordered}, float {value}, float 0.0")
    value = f.let(
        f"select i1 {f.let(f'fcmp ogt float {value}, {low}')}, float {value}, float {low}"
    )
    value = f.let(
        f"select i1 {f.let(f'fcmp olt float {value}, {high}')}, float {value}, float {high}"
    )
    bits = f.let(f"bitcast float {f.let(f'fadd float {value}, {float_bits(ROUND)}')} to i32")
    return f.let(f"trunc i32 {f.let(f'add i32 {bits}, {zero}')} to i8")

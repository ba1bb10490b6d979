"""Quantization at run time: rows of floats to rows of bytes, each with its scale behind it.

    row       highest = max(|x|); x * (127 / highest), rounded, + 128           one kernel
    range     minus the lowest and the highest value of each row                two kernels, with
    tensor    the range of all rows; x / scale, rounded, + zero point           a barrier in between

A row is read twice; it stays in the first-level cache meanwhile. Magnitudes are compared as
integers: so they order as the floats do, with NaN above all. Meaning: `core.dynamic`, bit for bit.
What stands behind the bytes of a row: `row_tail`.

Same kernel signature as nest.py: x input, y rows of bytes; t0..t1 counts rows. For "tensor", where
every thread reads the range of all rows, t0..t1 are all of them, and p0..p1 are its share of
`SHARES`. There are no constants.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from twofour.core.dynamic import LEAST, ROW_ZERO, STEPS
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.narrow import AT_ONCE
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    constant16,
    first_lanes,
    greater16,
    highest16,
    load16,
    scalar_of,
    store16,
)
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, ROUND, every, float_bits

SHARES = 64
"""Parts that the rows of a tensor are cut into, for threads."""
STEPS_OF = {"row": ("row",), "tensor": ("range", "tensor")}
"""The kernels of each form of `core.dynamic`, in order."""
_LINE_BYTES = 64
_CROWDED_BYTES = 2048  # rows so far apart lie in two sets of an L1, or in one
_ZERO, _DEPTH, _HEIGHT = 4, 8, 12  # bytes from a tail's begin

Visit = Callable[[int | Value, list[str], list[Value]], list[Value]]


def row_tail(channels: int) -> tuple[int, int]:
    """Where what a row of bytes stands for begins, and how far it is to the next row.

    Behind the bytes: f32 scale, i32 zero point as stored, and while the range of a whole tensor is
    sought f32 minus the lowest and f32 the highest value of the row, or 0.

    Args:
        channels: bytes of a row.
    """
    begin = -(-channels // 4) * 4
    pixel = -(-(begin + 16) // _LINE_BYTES) * _LINE_BYTES
    return begin, pixel if pixel % _CROWDED_BYTES else pixel + _LINE_BYTES


@dataclass(frozen=True)
class RowsProblem:
    """Rows to be quantized.

    Attributes:
        step: "row", "range" or "tensor".
        channels: of a row.
        x_pixel: bytes from one row of x to the next.
    """

    step: str
    channels: int
    x_pixel: int


def emit_rows(name: str, problem: RowsProblem) -> str:
    """The kernel as an LLVM module.

    Args:
        name: its symbol.
        problem: what it computes.
    """
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )
    rows = _Rows(f, problem)
    {"row": rows.each, "range": rows.ranges, "tensor": rows.together}[problem.step]()
    return module_text([f])


@dataclass(frozen=True)
class _Rows:
    """The loops of one kernel."""

    f: Function
    problem: RowsProblem

    def each(self) -> None:
        """Every row with a scale of its own."""
        f = self.f

        def row(t: Value) -> None:
            x, y, tail = self._at(t)
            found = self._blocks(["zeroinitializer"], I32S, lambda *turn: self._sizes(x, *turn))
            size = f.call("i32", "llvm.vector.reduce.smax.v16i32", (I32S, found[0]))
            whole = f.let(f"icmp sgt i32 {size}, {_bits(LEAST)}")
            size = f.let(f"select i1 {whole}, i32 {size}, i32 {_bits(LEAST)}")
            highest = f.let(f"bitcast i32 {size} to float")
            factor = f.let(f"fdiv float {float_bits(STEPS)}, {highest}")
            f.store("float", f.let(f"fdiv float {highest}, {float_bits(STEPS)}"), tail, 0, 4)
            f.store("i32", str(ROW_ZERO), tail, _ZERO, 4)
            self._write("fmul", (x, y), f.splat("float", factor), str(ROW_ZERO))

        f.repeat("%t0", "%t1", row)

    def ranges(self) -> None:
        """The lowest and highest value of every row, and zero, to its tail."""
        f = self.f

        def row(t: Value) -> None:
            x, _, tail = self._at(t)
            none = ["zeroinitializer"] * 2
            ends = self._blocks(none, F32S, lambda *turn: self._ends(x, *turn))
            for end, offset in zip(ends, (_DEPTH, _HEIGHT), strict=True):
                f.store("float", scalar_of(f, highest16(f, end)), tail, offset, 4)

        f.repeat("%t0", "%t1", row)

    def together(self) -> None:
        """A share of the rows with the scale and zero point of all."""
        f = self.f

        def wider(t: Value, ends: list[Value]) -> list[Value]:
            tail = self._at(t)[2]
            seen = [f.load("float", tail, offset, 4) for offset in (_DEPTH, _HEIGHT)]
            more = [f.let(f"fcmp ogt float {a}, {b}") for a, b in zip(seen, ends, strict=True)]
            return [
                f.let(f"select i1 {m}, float {a}, float {b}")
                for m, a, b in zip(more, seen, ends, strict=True)
            ]

        depth, height = f.loop("%t0", "%t1", [("float", "0.0")] * 2, wider)
        scale, zero = self._affine(depth, height)
        divisor = f.splat("float", scale)
        count = f.int_op("sub", "%t1", "%t0")
        begin, end = (f.int_op("udiv", f.int_op("mul", count, p), SHARES) for p in ("%p0", "%p1"))

        def row(t: Value) -> None:
            x, y, tail = self._at(t)
            f.store("float", scale, tail, 0, 4)
            f.store("i32", zero, tail, _ZERO, 4)
            self._write("fdiv", (x, y), divisor, zero)

        f.repeat(f.int_op("add", "%t0", begin), f.int_op("add", "%t0", end), row)

    def _affine(self, depth: Value, height: Value) -> tuple[Value, Value]:
        """Scale and zero point of the range -depth..height."""
        f, most = self.f, float_bits(255.0)
        span = f.let(f"fadd float {height}, {depth}")
        some = f.let(f"fcmp ogt float {span}, 0.0")
        divided = f.let(f"fdiv float {span}, {most}")
        scale = f.let(f"select i1 {some}, float {divided}, float 1.0")
        steps = f.let(f"fdiv float {depth}, {scale}")
        below = f.let(f"fcmp olt float {steps}, {most}")
        steps = f.let(f"select i1 {below}, float {steps}, float {most}")
        shifted = f.let(f"fadd float {steps}, {float_bits(ROUND)}")
        low = f.let(f"and i32 {f.let(f'bitcast float {shifted} to i32')}, 255")
        return scale, low

    def _at(self, t: Value) -> tuple[Value, Value, Value]:
        """Row t of x and of y, and the tail of the latter."""
        f, (begin, pixel) = self.f, row_tail(self.problem.channels)
        x = f.at("%x", f.int_op("mul", t, self.problem.x_pixel))
        y = f.at("%y", f.int_op("mul", t, pixel))
        return x, y, f.at(y, begin)

    def _blocks(self, state: list[Value], kind: str, visit: Visit) -> list[Value]:
        """Runs state = visit(first channel, masks, state) over up to `AT_ONCE` blocks at a time."""
        full, rest = divmod(self.problem.channels, LANES)
        turns = full // AT_ONCE

        def turn(i: Value, carried: list[Value]) -> list[Value]:
            return visit(self.f.int_op("mul", i, AT_ONCE * LANES), [""] * AT_ONCE, carried)

        state = self.f.loop(0, turns, [(kind, s) for s in state], turn)
        masks = [""] * (full % AT_ONCE) + ([first_lanes(rest)] if rest else [])
        return visit(turns * AT_ONCE * LANES, masks, state) if masks else state

    def _value(self, x: Value, at: int | Value, mask: str) -> Value:
        """Sixteen inputs of a row, zeros where there are none."""
        return load16(self.f, F32S, x, self.f.int_op("mul", at, 4), mask)

    def _places(self, at: int | Value, masks: list[str]) -> list[Value]:
        """Where the blocks begin."""
        return [self.f.int_op("add", at, LANES * block) for block in range(len(masks))]

    def _sizes(
        self, x: Value, at: int | Value, masks: list[str], state: list[Value]
    ) -> list[Value]:
        """The larger of state and |x|, as integers."""
        f, largest = self.f, state[0]
        for place, mask in zip(self._places(at, masks), masks, strict=True):
            bits = f.let(f"bitcast {F32S} {self._value(x, place, mask)} to {I32S}")
            size = f.let(f"and {I32S} {bits}, {every('i32', 0x7FFFFFFF)}")
            largest = f.call(I32S, "llvm.smax.v16i32", (I32S, size), (I32S, largest))
        return [largest]

    def _ends(self, x: Value, at: int | Value, masks: list[str], state: list[Value]) -> list[Value]:
        """The larger of state and (-x, x)."""
        f, (depth, height) = self.f, state
        for place, mask in zip(self._places(at, masks), masks, strict=True):
            value = self._value(x, place, mask)
            depth = greater16(f, f.let(f"fneg {F32S} {value}"), depth)
            height = greater16(f, value, height)
        return [depth, height]

    def _write(self, op: str, ends: tuple[Value, Value], factor: Value, zero: Value) -> None:
        """The bytes of a row: saturate(round_half_even(x op factor) + zero).

        Args:
            op: "fmul" or "fdiv".
            ends: the row of x and that of y.
            factor: <16 x float>.
            zero: i32 in 0..255.
        """
        f, (x, y) = self.f, ends
        real = f.splat("float", f.let(f"sitofp i32 {zero} to float"))
        low = f.let(f"fneg {F32S} {real}")
        high = f.let(f"fsub {F32S} {constant16(255.0)}, {real}")
        shift = f.splat("i8", f.let(f"trunc i32 {zero} to i8"))

        def block(place: Value, mask: str) -> None:
            value = f.let(f"{op} {F32S} {self._value(x, place, mask)}, {factor}")
            value = greater16(f, value, low)  # the bound, where one is NaN
            below = f.let(f"fcmp olt {F32S} {value}, {high}")
            value = f.let(f"select <16 x i1> {below}, {F32S} {value}, {F32S} {high}")
            rounded = f.let(f"fadd {F32S} {value}, {constant16(ROUND)}")
            bits = f.let(f"bitcast {F32S} {rounded} to {I32S}")
            stored = f.let(f"add {BYTES16} {f.let(f'trunc {I32S} {bits} to {BYTES16}')}, {shift}")
            store16(f, BYTES16, stored, y, place, mask)

        def visit(at: int | Value, masks: list[str], _: list[Value]) -> list[Value]:
            for place, mask in zip(self._places(at, masks), masks, strict=True):
                block(place, mask)
            return []

        self._blocks([], F32S, visit)


def _bits(value: float) -> int:
    """A float32 constant as the integer of its bits."""
    return int.from_bytes(struct.pack("<f", value), "little")

"""Layer normalisation of rows: mean, variance, scale, and the quantizer that follows.

A row is read three times (sum, squares, result); it stays in the first-level cache meanwhile.
Several rows at once, so that their sums, each a chain of additions, overlap. Meaning:
`core.norm.layer_norm`, bit for bit, and `core.numerics.requantize` of it.

Same kernel signature as nest.py: x input, y float32 output (the quantized one where there is no
other), r quantized output where there are both; t0..t1 counts rows, panels are not used. Constants:

    0 f32 x_scale, 4 i32 x_zero, 20 f32 1 / y_scale; the others of a header (packing.py)
    64 f32 gamma[channels], f32 beta[channels], each padded with zeros to a multiple of 16
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import Epilogue
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.narrow import AT_ONCE, Narrow, Rounding, Target
from twofour.kernels.cpu.packing import header
from twofour.kernels.cpu.pointwise import MapConstants
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    add16,
    constant16,
    first_lanes,
    keep,
    load16,
    store16,
    to_bfloats,
    totals16,
    widened,
)
from twofour.kernels.cpu.vector import BYTES16, F32S, WORDS16, Vector, every

Array = NDArray[Any]

_HEADER_BYTES = 64
_ROWS = {"avx512vnni": 4, "dotprod": 2, "avx2": 2, "vector": 1}  # at once

Visit = Callable[[int | Value, list[str], list[Value]], list[Value]]


@dataclass(frozen=True)
class NormProblem:
    """One layer normalisation.

    Attributes:
        rows: how many.
        channels: elements of a row.
        x_pixel: bytes from one input row to the next.
        y_pixel: bytes from one float32 output row to the next; unused without float output.
        q_pixel: bytes from one quantized output row to the next; unused without.
        x: kind of the input: "float32", or "u8" (stored quantized).
        float_out: whether the result is written as float32.
        quantized_out: whether the result is written quantized (or as bfloat16).
        eps: added to the variance.
        q: kind of the quantized output: "u8", or "bfloat16", which is rounded only.
        bounded: no result, in steps of a quantized output, can leave int32.
    """

    rows: int
    channels: int
    x_pixel: int
    y_pixel: int
    q_pixel: int
    x: str
    float_out: bool
    quantized_out: bool
    eps: float
    q: str = "u8"
    bounded: bool = False

    @property
    def pieces(self) -> int:
        """Units of work that threads share: rows."""
        return self.rows


def pack_norm(gamma: Array, beta: Array, constants: MapConstants) -> NDArray[np.uint8]:
    """Header, gamma and beta as the kernel reads them.

    Args:
        gamma: float32 [channels].
        beta: float32 [channels].
        constants: x_scale and x_zero of a quantized input, y_scale and y_zero of a quantized
            output; zero points as stored.
    """
    one = np.ones(1, np.float32)
    quantizer = Epilogue(
        one,
        np.zeros(1, np.float32),
        float(constants.x_scale),
        zero_point=constants.y_zero,
        unsigned=True,
        y_factor=float(one[0] / np.float32(constants.y_scale)),
    )
    head = header(quantizer).view(np.int32)
    head[1] = constants.x_zero
    tail = (0, -gamma.size % LANES)
    both = [np.pad(c.astype(np.float32).reshape(-1), tail) for c in (gamma, beta)]
    return np.concatenate([head.view(np.float32), *both]).view(np.uint8)


def emit_norm(name: str, problem: NormProblem, isa: str) -> str:
    """The kernel as an LLVM module.

    Args:
        name: its symbol.
        problem: what it computes.
        isa: instruction set.
    """
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )
    together = _ROWS[isa]
    tiles = {
        rows: _Rows.begin(f"{name}_{rows}", problem, rows, isa).emit() for rows in {together, 1}
    }

    def visit(rows: int, t: Value) -> list[Value]:
        first = problem.y_pixel if problem.float_out else problem.q_pixel
        steps = (problem.x_pixel, first, problem.q_pixel)
        x, y, q = (
            f.at(f"%{key}", f.int_op("mul", t, step))
            for key, step in zip("xyr", steps, strict=True)
        )
        f.do(f"call void @{tiles[rows].name}(ptr {x}, ptr %w, ptr {y}, ptr {q})")
        return []

    alone = f.int_op("srem", f.int_op("sub", "%t1", "%t0"), together)
    whole = f.int_op("sub", "%t1", alone)
    f.loop("%t0", whole, [], lambda t, _: visit(together, t), together)
    f.loop(whole, "%t1", [], lambda t, _: visit(1, t))
    return module_text([*tiles.values(), f])


@dataclass(frozen=True)
class _Rows:
    """Some rows of one normalisation, in a function (x, w, y, q) of their own.

    Attributes:
        v: emits the operations.
        problem: what is computed.
        rows: how many.
        x_scale: of a quantized input, <16 x float>.
        x_zero: of a quantized input, <16 x i32>.
    """

    v: Vector
    problem: NormProblem
    rows: int
    x_scale: Value
    x_zero: Value

    @staticmethod
    def begin(name: str, problem: NormProblem, rows: int, isa: str) -> _Rows:
        """An empty function, the input's constants loaded."""
        f = Function(name, [("ptr", p) for p in "xwyq"], linkage="internal")
        scale, zero = f.load("float", "%w", 0, 4), f.load("i32", "%w", 4, 4)
        return _Rows(Vector(isa, f), problem, rows, f.splat("float", scale), f.splat("i32", zero))

    @property
    def f(self) -> Function:
        """The function."""
        return self.v.f

    def emit(self) -> Function:
        """Three passes over the rows."""
        f = self.f
        start = ["zeroinitializer"] * self.rows
        mean = self._split(self._mean(self._blocks(start, self._add_values)))
        squares = self._blocks(start, lambda at, masks, s: self._add_squares(at, masks, s, mean))
        shifted = add16(f, self._mean(squares), constant16(self.problem.eps))
        root = f.call(F32S, "llvm.sqrt.v16f32", (F32S, shifted))
        inverse = self._split(f.let(f"fdiv {F32S} {constant16(1.0)}, {root}"))
        write = self._writer(list(zip(mean, inverse, strict=True)))
        self._blocks([], write)
        return f

    def _blocks(self, state: list[Value], visit: Visit) -> list[Value]:
        """Runs state = visit(first channel, masks, state) over up to `AT_ONCE` blocks at a time."""
        full, rest = divmod(self.problem.channels, LANES)
        turns = full // AT_ONCE

        def turn(i: Value, carried: list[Value]) -> list[Value]:
            return visit(self.f.int_op("mul", i, AT_ONCE * LANES), [""] * AT_ONCE, carried)

        state = self.f.loop(0, turns, [(F32S, s) for s in state], turn)
        masks = [""] * (full % AT_ONCE) + ([first_lanes(rest)] if rest else [])
        return visit(turns * AT_ONCE * LANES, masks, state) if masks else state

    def _mean(self, lanes: list[Value]) -> Value:
        """row_sum / channels of each row, each in 16 / rows lanes."""
        count = constant16(float(self.problem.channels))
        return self.f.let(f"fdiv {F32S} {totals16(self.f, lanes)}, {count}")

    def _split(self, joint: Value) -> list[Value]:
        """What `_mean` joined: one vector a row."""
        share = LANES // self.rows
        return [
            self.f.let(
                f"shufflevector {F32S} {joint}, {F32S} poison, "
                f"<16 x i32> {every('i32', share * row)}"
            )
            for row in range(self.rows)
        ]

    def _value(self, row: int, at: int | Value, mask: str) -> Value:
        """Sixteen inputs of a row as floats; anything where the mask is false."""
        f, start = self.f, f"{self.problem.x_pixel * row}"
        if self.problem.x == "float32":
            where = f.int_op("add", f.int_op("mul", at, 4), start)
            return load16(f, F32S, "%x", where, mask)
        stored = load16(f, BYTES16, "%x", f.int_op("add", at, start), mask)
        return f.let(f"fmul {F32S} {widened(f, stored, self.x_zero)}, {self.x_scale}")

    def _add_values(self, at: int | Value, masks: list[str], sums: list[Value]) -> list[Value]:
        f = self.f
        for block, mask in enumerate(masks):
            here = f.int_op("add", at, LANES * block)
            sums = [
                add16(f, s, keep(f, self._value(row, here, mask), mask))
                for row, s in enumerate(sums)
            ]
        return sums

    def _add_squares(
        self, at: int | Value, masks: list[str], sums: list[Value], mean: list[Value]
    ) -> list[Value]:
        f, sums = self.f, [*sums]
        for block, mask in enumerate(masks):
            here = f.int_op("add", at, LANES * block)
            for row, before in enumerate(sums):
                centred = f.let(f"fsub {F32S} {self._value(row, here, mask)}, {mean[row]}")
                centred = keep(f, centred, mask)
                sums[row] = self.v.fused(before, centred, centred)
        return sums

    def _writer(self, moments: list[tuple[Value, Value]]) -> Visit:
        """Writes the results of some blocks; `moments` are (mean, inverse deviation) of rows."""
        f, problem = self.f, self.problem
        narrow = Narrow(self.v, "%w", Rounding(problem.bounded))
        factor = f.splat("float", f.load("float", "%w", 20, 4))

        def quantize(values: list[Value], masks: list[str], pointer: Value) -> None:
            scaled = [f.let(f"fmul {F32S} {value}, {factor}") for value in values]
            targets = [Target(LANES * block, mask, pointer) for block, mask in enumerate(masks)]
            narrow.store(scaled, targets)

        def write(at: int | Value, masks: list[str], _: list[Value]) -> list[Value]:
            places = [f.int_op("add", at, LANES * block) for block in range(len(masks))]
            scales = [self._constants(place) for place in places]
            for row, moment in enumerate(moments):
                values = [
                    self._result(self._value(row, place, mask), moment, scale)
                    for place, mask, scale in zip(places, masks, scales, strict=True)
                ]
                if problem.float_out:
                    first = f.at(f.at("%y", row * problem.y_pixel), f.int_op("mul", at, 4))
                    for block, (value, mask) in enumerate(zip(values, masks, strict=True)):
                        store16(f, F32S, value, first, 4 * LANES * block, mask)
                row_of_q = f.at("%q" if problem.float_out else "%y", row * problem.q_pixel)
                if problem.quantized_out and problem.q == "bfloat16":
                    first = f.at(row_of_q, f.int_op("mul", at, 2))
                    for block, (value, mask) in enumerate(zip(values, masks, strict=True)):
                        store16(f, WORDS16, to_bfloats(f, value), first, 2 * LANES * block, mask)
                elif problem.quantized_out:
                    quantize(values, masks, f.at(row_of_q, at))
            return []

        return write

    def _constants(self, at: int | Value) -> tuple[Value, Value]:
        """Gamma and beta of 16 channels."""
        f, size = self.f, 4 * LANES * -(-self.problem.channels // LANES)
        where = f.int_op("add", f.int_op("mul", at, 4), _HEADER_BYTES)
        return f.load(F32S, "%w", where, 4), f.load(F32S, "%w", f.int_op("add", where, size), 4)

    def _result(self, x: Value, moments: tuple[Value, Value], scale: tuple[Value, Value]) -> Value:
        """Sixteen results as floats."""
        f, (mean, inverse), (gamma, beta) = self.f, moments, scale
        centred = f.let(f"fsub {F32S} {x}, {mean}")
        return self.v.fused(beta, f.let(f"fmul {F32S} {centred}, {inverse}"), gamma)

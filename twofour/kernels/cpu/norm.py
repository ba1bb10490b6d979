"""Layer normalisation of rows: mean, variance, scale, and the quantizer that follows.

A row is read three times (sum, squares, result); it stays in the first-level cache meanwhile.
Several rows at once, so that their sums, each a chain of additions, overlap. Meaning:
`core.norm.layer_norm`, bit for bit, and `core.numerics.requantize` of it.

Same kernel signature as nest.py: x input, y float32 output (the quantized one where there is no
other), r quantized output where there are both; t0..t1 counts rows, panels are not used. Constants:

    0 f32 x_scale   4 i32 x_zero   8 f32 1 / y_scale   12 i32 y_zero
    64 f32 gamma[channels], f32 beta[channels], each padded with zeros to a multiple of 16
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.pointwise import MapConstants
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    Narrow,
    add16,
    first_lanes,
    keep,
    load16,
    scalar_of,
    store16,
    to_bfloats,
    total16,
    widened,
)
from twofour.kernels.cpu.vector import BYTES16, F32S, WORDS16, float_bits

Array = NDArray[Any]

_HEADER_BYTES = 64
_ROWS = {"avx512vnni": 4, "avx2": 2, "vector": 2}  # at once
_UNROLLED = 4  # blocks of 16 channels in one turn of a loop

Blocks = Sequence[tuple[int | Value, str]]


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
    head = np.zeros(_HEADER_BYTES // 4, np.float32)
    head[0], head[2] = constants.x_scale, np.float32(1) / np.float32(constants.y_scale)
    head.view(np.int32)[[1, 3]] = [constants.x_zero, constants.y_zero]
    tail = (0, -gamma.size % LANES)
    both = [np.pad(c.astype(np.float32).reshape(-1), tail) for c in (gamma, beta)]
    return np.concatenate([head, *both]).view(np.uint8)


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
    tiles = {rows: _Rows.begin(f"{name}_{rows}", problem, rows).emit() for rows in {together, 1}}

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
        f: the function.
        problem: what is computed.
        rows: how many.
        x_scale: of a quantized input, <16 x float>.
        x_zero: of a quantized input, <16 x i32>.
    """

    f: Function
    problem: NormProblem
    rows: int
    x_scale: Value
    x_zero: Value

    @staticmethod
    def begin(name: str, problem: NormProblem, rows: int) -> _Rows:
        """An empty function, the input's constants loaded."""
        f = Function(name, [("ptr", p) for p in "xwyq"], linkage="internal")
        scale, zero = f.load("float", "%w", 0, 4), f.load("i32", "%w", 4, 4)
        return _Rows(f, problem, rows, f.splat("float", scale), f.splat("i32", zero))

    def emit(self) -> Function:
        """Three passes over the rows."""
        f = self.f
        start = ["zeroinitializer"] * self.rows
        mean = self._means(self._blocks(start, self._add_values))
        squares = self._blocks(start, lambda at, mask, s: self._add_squares(at, mask, s, mean))
        inverse = []
        for variance in self._means(squares):
            shifted = f.let(f"fadd float {scalar_of(f, variance)}, {float_bits(self.problem.eps)}")
            root = f.call("float", "llvm.sqrt.f32", ("float", shifted))
            inverse.append(f.splat("float", f.let(f"fdiv float {float_bits(1.0)}, {root}")))
        narrow = Narrow.of(f, f.load("i32", "%w", 12, 4))
        factor = f.splat("float", f.load("float", "%w", 8, 4))

        def write(at: int | Value, mask: str, _: list[Value]) -> list[Value]:
            self._write(at, mask, list(zip(mean, inverse, strict=True)), (factor, narrow))
            return []

        self._blocks([], write)
        return f

    def _blocks(
        self, state: list[Value], visit: Callable[[int | Value, str, list[Value]], list[Value]]
    ) -> list[Value]:
        """Runs state = visit(first channel, mask, state) over the blocks of 16 channels."""
        full, rest = divmod(self.problem.channels, LANES)
        turns = full // _UNROLLED

        def turn(i: Value, carried: list[Value]) -> list[Value]:
            first = self.f.int_op("mul", i, _UNROLLED * LANES)
            for block in range(_UNROLLED):
                carried = visit(self.f.int_op("add", first, block * LANES), "", carried)
            return carried

        state = self.f.loop(0, turns, [(F32S, s) for s in state], turn)
        for block in range(turns * _UNROLLED, full):
            state = visit(block * LANES, "", state)
        return visit(full * LANES, first_lanes(rest), state) if rest else state

    def _means(self, lanes: list[Value]) -> list[Value]:
        """row_sum / channels of each row, in every lane."""
        f = self.f
        count = float_bits(float(self.problem.channels))
        sums = [scalar_of(f, total16(f, s)) for s in lanes]
        return [f.splat("float", f.let(f"fdiv float {s}, {count}")) for s in sums]

    def _value(self, row: int, at: int | Value, mask: str) -> Value:
        """Sixteen inputs of a row as floats; anything where the mask is false."""
        f, start = self.f, f"{self.problem.x_pixel * row}"
        if self.problem.x == "float32":
            where = f.int_op("add", f.int_op("mul", at, 4), start)
            return load16(f, F32S, "%x", where, mask)
        stored = load16(f, BYTES16, "%x", f.int_op("add", at, start), mask)
        return f.let(f"fmul {F32S} {widened(f, stored, self.x_zero)}, {self.x_scale}")

    def _add_values(self, at: int | Value, mask: str, sums: list[Value]) -> list[Value]:
        return [
            add16(self.f, s, keep(self.f, self._value(row, at, mask), mask))
            for row, s in enumerate(sums)
        ]

    def _add_squares(
        self, at: int | Value, mask: str, sums: list[Value], mean: list[Value]
    ) -> list[Value]:
        f, out = self.f, []
        for row, s in enumerate(sums):
            centred = f.let(f"fsub {F32S} {self._value(row, at, mask)}, {mean[row]}")
            square = f.let(f"fmul {F32S} {centred}, {centred}")
            out.append(add16(f, s, keep(f, square, mask)))
        return out

    def _write(
        self,
        at: int | Value,
        mask: str,
        moments: list[tuple[Value, Value]],
        quantizer: tuple[Value, Narrow],
    ) -> None:
        """The results of one block; `moments` are (mean, inverse deviation) of each row."""
        f, problem = self.f, self.problem
        gamma_at = f.int_op("add", f.int_op("mul", at, 4), _HEADER_BYTES)
        beta_at = f.int_op("add", gamma_at, 4 * LANES * -(-problem.channels // LANES))
        gamma, beta = (f.load(F32S, "%w", where, 4) for where in (gamma_at, beta_at))
        for row, (mean, inverse) in enumerate(moments):
            value = f.let(f"fsub {F32S} {self._value(row, at, mask)}, {mean}")
            value = f.let(f"fmul {F32S} {value}, {inverse}")
            value = add16(f, f.let(f"fmul {F32S} {value}, {gamma}"), beta)
            if problem.float_out:
                where = f.int_op("add", f.int_op("mul", at, 4), row * problem.y_pixel)
                store16(f, F32S, value, "%y", where, mask)
            if problem.quantized_out:
                q = "%q" if problem.float_out else "%y"
                self._store_narrow(value, f.at(q, row * problem.q_pixel), at, mask, quantizer)

    def _store_narrow(
        self, value: Value, row: Value, at: int | Value, mask: str, quantizer: tuple[Value, Narrow]
    ) -> None:
        """One block of a result, quantized or as bfloat16."""
        f = self.f
        if self.problem.q == "bfloat16":
            store16(f, WORDS16, to_bfloats(f, value), row, f.int_op("mul", at, 2), mask)
            return
        stored = quantizer[1].emit(f, f.let(f"fmul {F32S} {value}, {quantizer[0]}"))
        store16(f, BYTES16, stored, row, at, mask)

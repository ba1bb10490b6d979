"""Softmax along rows of a plain float32 matrix: maximum, exponentials and their sum, division.

A row is read three times and its exponentials wait in y; both stay in the first-level cache as long
as a row is short. Several rows at once, so that their chains of additions overlap. Meaning:
`core.attention.softmax`, bit for bit.

Same kernel signature as nest.py: x input, y output, without constants; t0..t1 counts rows, panels
are not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twofour.core.attention import LOWEST
from twofour.kernels.cpu.functions import emit_exp
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    add16,
    first_lanes,
    greater16,
    highest16,
    keep,
    load16,
    scalar_of,
    store16,
    total16,
)
from twofour.kernels.cpu.vector import F32S, every, float_bits

_ROWS = {"avx512vnni": 4, "avx2": 2, "vector": 2}  # at once
_BLOCK_BYTES = 4 * LANES
_MINUS_INFINITY = every("float", "0xFFF0000000000000")


@dataclass(frozen=True)
class SoftmaxProblem:
    """Softmax along the last axis of a C-contiguous float32 tensor.

    Attributes:
        rows: how many.
        columns: elements of a row.
    """

    rows: int
    columns: int

    @property
    def pieces(self) -> int:
        """Units of work that threads share: rows."""
        return self.rows


def emit_softmax(name: str, problem: SoftmaxProblem, isa: str) -> str:
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
    tiles = {rows: _rows(f"{name}_{rows}", problem.columns, rows) for rows in {together, 1}}

    def visit(rows: int, t: Value) -> list[Value]:
        at = f.int_op("mul", t, 4 * problem.columns)
        f.do(f"call void @{tiles[rows].name}(ptr {f.at('%x', at)}, ptr {f.at('%y', at)})")
        return []

    alone = f.int_op("srem", f.int_op("sub", "%t1", "%t0"), together)
    whole = f.int_op("sub", "%t1", alone)
    f.loop("%t0", whole, [], lambda t, _: visit(together, t), together)
    f.loop(whole, "%t1", [], lambda t, _: visit(1, t))
    return module_text([*tiles.values(), f])


def _rows(name: str, columns: int, rows: int) -> Function:
    """The function (x, y) of some rows."""
    f = Function(name, [("ptr", p) for p in "xy"], linkage="internal")
    starts = [4 * columns * row for row in range(rows)]

    def highest(at: int | Value, mask: str, tops: list[Value]) -> list[Value]:
        values = [load16(f, F32S, f.at("%x", start), at, mask) for start in starts]
        seen = [keep(f, value, mask, _MINUS_INFINITY) for value in values]
        return [greater16(f, value, top) for value, top in zip(seen, tops, strict=True)]

    def power(at: int | Value, mask: str, sums: list[Value]) -> list[Value]:
        out = []
        for start, top, total in zip(starts, tops, sums, strict=True):
            value = load16(f, F32S, f.at("%x", start), at, mask)
            value = emit_exp(f, f.let(f"fsub {F32S} {value}, {top}"))
            store16(f, F32S, value, f.at("%y", start), at, mask)
            out.append(add16(f, total, keep(f, value, mask)))
        return out

    def divide(at: int | Value, mask: str, _: list[Value]) -> list[Value]:
        for start, share in zip(starts, shares, strict=True):
            value = load16(f, F32S, f.at("%y", start), at, mask)
            store16(f, F32S, f.let(f"fmul {F32S} {value}, {share}"), f.at("%y", start), at, mask)
        return []

    lowest = every("float", float_bits(float(LOWEST)))
    lanes = _blocks(f, columns, [_MINUS_INFINITY] * rows, highest)
    tops = [greater16(f, highest16(f, top), lowest) for top in lanes]
    sums = _blocks(f, columns, ["zeroinitializer"] * rows, power)
    shares = [_share(f, total16(f, lanes)) for lanes in sums]
    _blocks(f, columns, [], divide)
    return f


def _share(f: Function, total: Value) -> Value:
    """1 / max(total, 1) in each lane; NaN if the total is."""
    one = float_bits(1.0)
    least = scalar_of(f, greater16(f, every("float", one), total))
    return f.splat("float", f.let(f"fdiv float {one}, {least}"))


def _blocks(
    f: Function,
    columns: int,
    state: list[Value],
    visit: Callable[[int | Value, str, list[Value]], list[Value]],
) -> list[Value]:
    """Runs state = visit(byte offset, mask, state) over the blocks of 16 columns."""
    full, rest = divmod(columns, LANES)

    def turn(i: Value, carried: list[Value]) -> list[Value]:
        return visit(f.int_op("mul", i, _BLOCK_BYTES), "", carried)

    state = f.loop(0, full, [(F32S, s) for s in state], turn)
    return visit(full * _BLOCK_BYTES, first_lanes(rest), state) if rest else state

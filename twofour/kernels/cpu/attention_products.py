"""Attention's two products: sums of a tile in registers while units stream by.

    for unit: for row: for column: sums[row, column] += left[row, unit] * right[unit, column]

A row's unit is broadcast, a column is a vector of 16 lanes. The products keep the multipliers busy
and leave the adders idle: so other work may stand in between, some instructions each turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twofour.kernels.cpu.attention_plan import Plan
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.vector import F32S, I32S, Vector, every

ONES = every("i32", 0x01010101)


@dataclass(frozen=True)
class Factor:
    """One factor of the products.

    Attributes:
        base: pointer.
        offsets: bytes from it to the first unit of each row or column.
        step: bytes from one unit to the next.
    """

    base: Value
    offsets: Sequence[int]
    step: int


@dataclass(frozen=True)
class Turns:
    """How units are walked.

    Attributes:
        units: how many; an i64 value where that is not known.
        each: units in one turn of the loop; divides `units`, 1 where that is not known.
        beside: what else is done in turn i.
    """

    units: int | Value
    each: int = 1
    beside: Callable[[Value], None] | None = None


def emit_products(
    f: Function, plan: Plan, left: Factor, right: Factor, starts: Sequence[Value], turns: Turns
) -> list[Value]:
    """Returns sums[row * columns + column], which begin with starts[column]."""
    v = Vector(plan.isa, f)
    kind = I32S if plan.int8 else F32S
    stored = F32S if plan.dtype == "float32" else I32S

    def unit(i: Value, ahead: int, sums: list[Value]) -> list[Value]:
        here = f.at(right.base, f.int_op("mul", i, right.step * turns.each))
        vectors = [f.load(stored, here, ahead * right.step + at) for at in right.offsets]
        there, out = f.at(left.base, f.int_op("mul", i, left.step * turns.each)), []
        for r, row in enumerate(left.offsets):
            one = v.broadcast4(there, ahead * left.step + row)
            for c, vector in enumerate(vectors):
                out.append(multiply(v, plan.dtype, sums[r * len(vectors) + c], one, vector))
        return out

    def turn(i: Value, sums: list[Value]) -> list[Value]:
        for ahead in range(turns.each):
            sums = unit(i, ahead, sums)
        if turns.beside is not None:
            turns.beside(i)
        return sums

    first = [(kind, start) for start in starts] * len(left.offsets)
    count = turns.units // turns.each if isinstance(turns.units, int) else turns.units
    return f.loop(0, count, first, turn)


def multiply(v: Vector, dtype: str, total: Value, one: Value, vector: Value) -> Value:
    """Adds a unit's products: 4 of bytes, 2 of bfloat16, or 1 of floats."""
    if dtype != "float32":
        return v.dot(dtype, total, one, vector)
    return v.fma(total, v.f.let(f"bitcast {I32S} {one} to {F32S}"), vector)


def emit_scaled(f: Function, plan: Plan, total: Value, factor: Value) -> Value:
    """A sum as float32, times `factor`."""
    if plan.int8:
        total = f.let(f"sitofp {I32S} {total} to {F32S}")
    return f.let(f"fmul {F32S} {total}, {factor}")


def across(f: Function, operation: str, rows: Sequence[Value]) -> Value:
    """The lanes of each of up to 4 vectors joined by an operation, row r's result in lane r.

    Quarters of 4 lanes are transposed first, so that all rows are joined at once.

    Args:
        f: the function.
        operation: "add" or "smax".
        rows: <16 x i32>.

    Returns:
        <4 x i32>.
    """

    def joined(a: Value, b: Value, lanes: int) -> Value:
        kind = f"<{lanes} x i32>"
        if operation == "add":
            return f.let(f"add {kind} {a}, {b}")
        return f.call(kind, f"llvm.{operation}.v{lanes}i32", (kind, a), (kind, b))

    def picked(a: Value, b: Value, lanes: Sequence[int], out: int) -> Value:
        picks = ", ".join(f"i32 {lane}" for lane in lanes)
        kind = f"<{2 * out if out < LANES else LANES} x i32>"
        return f.let(f"shufflevector {kind} {a}, {kind} {b}, <{out} x i32> <{picks}>")

    def merged(a: Value, b: Value, low: Sequence[int], high: Sequence[int]) -> Value:
        """Lanes of each quarter of a and b, 4 and more standing for b's."""
        halves = []
        for lanes in (low, high):
            whole = [4 * q + lane % 4 + LANES * (lane > 3) for q in range(4) for lane in lanes]
            halves.append(picked(a, b, whole, LANES))
        return joined(halves[0], halves[1], LANES)

    four = [rows[min(i, len(rows) - 1)] for i in range(4)]
    pairs = [merged(a, b, (0, 4, 1, 5), (2, 6, 3, 7)) for a, b in (four[:2], four[2:])]
    value = merged(pairs[0], pairs[1], (0, 1, 4, 5), (2, 3, 6, 7))
    for out in (8, 4):
        low, high = (picked(value, "poison", range(at, at + out), out) for at in (0, out))
        value = joined(low, high, out)
    return value

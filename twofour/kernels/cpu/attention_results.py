"""Attention's second product: exponentials times values, and the output.

y = steps * values / sum                                int8, the steps are bytes
steps = p, rounded                                      bfloat16
y = steps * values / sum
y = p * values / sum                                    float32
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.kernels.cpu.attention_lengths import length
from twofour.kernels.cpu.attention_plan import OWN_BYTES, VECTOR_BYTES, Plan
from twofour.kernels.cpu.attention_products import (
    ONES,
    Factor,
    Turns,
    across,
    emit_products,
    emit_scaled,
)
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.narrow import AT_ONCE, Narrow, Rounding, Target
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import first_lanes, scalar_of, store16, to_bfloats, total16
from twofour.kernels.cpu.vector import F32S, I32S, WORDS16, Vector, every, float_bits


def emit_results(name: str, plan: Plan, y_pixel: int) -> Function:
    """The function (s, c, y, w) of a tile whose exponentials lie at `c`; of int8 they are steps.

    `s` points at the scratch memory, `y` at the first query's result, `w` at the header.

    Args:
        name: its symbol.
        plan: sizes.
        y_pixel: bytes from one query's result to the next.
    """
    f = Function(name, [("ptr", p) for p in "scyw"], linkage="internal")
    scale = f.load("float", "%w", 28, 4)
    shares = _shares_of_bytes(f, plan, scale) if plan.int8 else _shares(f, plan, scale)
    results = _Results(f, plan, y_pixel)
    if plan.rounds and not plan.int8:
        results.round()
    results.emit(shares)
    return f


def _shares_of_bytes(f: Function, plan: Plan, scale: Value) -> list[Value]:
    """Scale / max(sum of the bytes, 1) of each query: where all are 0, every key is masked."""
    v, rows = Vector(plan.isa, f), range(plan.queries)

    def group(i: Value, sums: list[Value]) -> list[Value]:
        here = f.at("%s", f.int_op("mul", i, VECTOR_BYTES))
        places = [plan.area("steps") + row * plan.step_bytes for row in rows]
        steps = [f.load(I32S, here, place) for place in places]
        return [v.dot4(total, one, ONES) for total, one in zip(sums, steps, strict=True)]

    start = [(I32S, "zeroinitializer")] * plan.queries
    totals = across(f, "add", f.loop(0, length(f, plan, "groups"), start, group))
    four, floats = "<4 x i32>", "<4 x float>"
    least = f.call(four, "llvm.smax.v4i32", (four, totals), (four, every("i32", 1, 4)))
    least = f.let(f"sitofp {four} {least} to {floats}")
    shares = f.let(f"fdiv {floats} {f.splat('float', scale, 4)}, {least}")
    return [f.splat("float", f.let(f"extractelement {floats} {shares}, i32 {row}")) for row in rows]


def _shares(f: Function, plan: Plan, scale: Value) -> list[Value]:
    """(1 / sum) * scale of each query, 0 where the sum is below 1: that of masked keys alone."""
    one, shares = float_bits(1.0), []
    for row in range(plan.queries):
        total = f.load(F32S, "%s", plan.area("sums") + row * VECTOR_BYTES)
        whole = scalar_of(f, total16(f, total))
        seen = f.let(f"fcmp uge float {whole}, {one}")  # true for NaN: kept
        share = f.let(f"fdiv float {one}, {whole}")
        share = f.let(f"select i1 {seen}, float {share}, float 0.0")
        shares.append(f.splat("float", f.let(f"fmul float {share}, {scale}")))
    return shares


@dataclass(frozen=True)
class _Results:
    """The results of one tile; see `emit_results`."""

    f: Function
    plan: Plan
    y_pixel: int

    def round(self) -> None:
        """Writes the area "steps": powers as bfloat16, key by key."""
        f, plan = self.f, self.plan

        def block(i: Value) -> None:
            here = f.at("%c", f.int_op("mul", i, VECTOR_BYTES))
            out = f.at("%s", f.int_op("mul", i, VECTOR_BYTES // 2))
            for row in range(plan.queries):
                words = to_bfloats(f, f.load(F32S, here, row * plan.row_bytes))
                f.store(WORDS16, words, out, plan.area("steps") + row * plan.step_bytes)

        f.repeat(0, length(f, plan, "blocks"), block)

    def emit(self, shares: list[Value]) -> None:
        """The product and the output."""
        f, plan = self.f, self.plan
        base, pitch = "%c", plan.row_bytes
        if plan.rounds:
            base, pitch = f.at("%s", plan.area("steps")), plan.step_bytes
        left = Factor(base, [r * pitch for r in range(plan.queries)], 4)
        values = f.at("%s", plan.area("values"))
        units = length(f, plan, "value_units")
        for first in range(0, plan.channel_blocks, plan.value_blocks):
            blocks = range(first, min(first + plan.value_blocks, plan.channel_blocks))
            columns = [b * VECTOR_BYTES for b in blocks]
            right = Factor(values, columns, plan.channel_blocks * VECTOR_BYTES)
            none = ["zeroinitializer"] * len(blocks)
            sums = emit_products(f, plan, left, right, none, Turns(units))
            places = [(row, block) for row in range(plan.queries) for block in blocks]
            results = [
                emit_scaled(f, plan, total, shares[row])
                for total, (row, _) in zip(sums, places, strict=True)
            ]
            if plan.out == "int8":
                self._store_bytes(results, places)
            else:
                self._store(results, places)

    def _store_bytes(self, results: list[Value], places: list[tuple[int, int]]) -> None:
        """Blocks of results, quantized; `places` are their rows and numbers."""
        f, plan = self.f, self.plan
        narrow = Narrow(Vector(plan.isa, f), f.at("%w", OWN_BYTES), Rounding(plan.int8))
        targets = [
            Target(row * self.y_pixel + block * LANES, first_lanes(plan.dv - block * LANES))
            for row, block in places
        ]
        for at in range(0, len(results), AT_ONCE):
            narrow.store(results[at : at + AT_ONCE], targets[at : at + AT_ONCE])

    def _store(self, results: list[Value], places: list[tuple[int, int]]) -> None:
        """Blocks of results in float32 or bfloat16."""
        f, plan = self.f, self.plan
        for value, (row, block) in zip(results, places, strict=True):
            lanes, at = first_lanes(plan.dv - block * LANES), row * self.y_pixel
            if plan.out == "float32":
                store16(f, F32S, value, "%y", at + block * VECTOR_BYTES, lanes)
            else:
                words = to_bfloats(f, value)
                store16(f, WORDS16, words, "%y", at + block * VECTOR_BYTES // 2, lanes)

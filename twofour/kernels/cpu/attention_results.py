"""Attention's second product: probabilities times values, and the output.

y = steps * values / sum                                int8, the steps are bytes
steps = p, rounded                                      bfloat16
y = steps * values / sum
y = p * values / sum                                    float32
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.kernels.cpu.attention_lengths import length
from twofour.kernels.cpu.attention_plan import VECTOR_BYTES, Plan
from twofour.kernels.cpu.attention_products import Factor, Turns, emit_products, emit_scaled
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    Narrow,
    first_lanes,
    scalar_of,
    store16,
    to_bfloats,
    total16,
)
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, WORDS16, float_bits


def emit_results(name: str, plan: Plan, y_pixel: int) -> Function:
    """The function (s, c, y, w) of a tile whose exponentials lie at `c`; of int8 they are steps.

    `s` points at the scratch memory, `y` at the first query's result, `w` at the header.

    Args:
        name: its symbol.
        plan: sizes.
        y_pixel: bytes from one query's result to the next.
    """
    f = Function(name, [("ptr", p) for p in "scyw"], linkage="internal")
    places = [plan.area("sums") + row * VECTOR_BYTES for row in range(plan.queries)]
    scale = f.load("float", "%w", 28, 4)
    share = _share_of_bytes if plan.int8 else _share
    shares = [f.splat("float", share(f, place, scale)) for place in places]
    results = _Results(f, plan, y_pixel)
    if plan.rounds and not plan.int8:
        results.round()
    results.emit(shares)
    return f


def _share_of_bytes(f: Function, place: int, scale: Value) -> Value:
    """Scale / max(sum of bytes, 1): where there are none, every key is masked."""
    lanes = f.load(I32S, "%s", place)
    total = f.call("i32", "llvm.vector.reduce.add.v16i32", (I32S, lanes))
    least = f.call("i32", "llvm.smax.i32", ("i32", total), ("i32", "1"))
    return f.let(f"fdiv float {scale}, {f.let(f'sitofp i32 {least} to float')}")


def _share(f: Function, place: int, scale: Value) -> Value:
    """(1 / sum) * scale, 0 where the sum is below 1: that of masked keys alone."""
    one = float_bits(1.0)
    whole = scalar_of(f, total16(f, f.load(F32S, "%s", place)))
    seen = f.let(f"fcmp uge float {whole}, {one}")  # true for NaN: kept
    share = f.let(f"fdiv float {one}, {whole}")
    share = f.let(f"select i1 {seen}, float {share}, float 0.0")
    return f.let(f"fmul float {share}, {scale}")


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
        narrow = Narrow.of(f, f.load("i32", "%w", 36, 4))
        units = length(f, plan, "value_units")
        for first in range(0, plan.channel_blocks, plan.value_blocks):
            blocks = range(first, min(first + plan.value_blocks, plan.channel_blocks))
            columns = [b * VECTOR_BYTES for b in blocks]
            right = Factor(values, columns, plan.channel_blocks * VECTOR_BYTES)
            none = ["zeroinitializer"] * len(blocks)
            sums = emit_products(f, plan, left, right, none, Turns(units))
            for row in range(plan.queries):
                for column, block in enumerate(blocks):
                    total = sums[row * len(blocks) + column]
                    self._store(emit_scaled(f, plan, total, shares[row]), row, block, narrow)

    def _store(self, value: Value, row: int, block: int, narrow: Narrow) -> None:
        """One block of one result."""
        f, plan = self.f, self.plan
        lanes = first_lanes(plan.dv - block * LANES)
        if plan.out == "float32":
            store16(f, F32S, value, "%y", row * self.y_pixel + block * VECTOR_BYTES, lanes)
            return
        if plan.out == "bfloat16":
            at = row * self.y_pixel + block * VECTOR_BYTES // 2
            store16(f, WORDS16, to_bfloats(f, value), "%y", at, lanes)
            return
        stored = narrow.emit(f, value)
        store16(f, BYTES16, stored, "%y", row * self.y_pixel + block * LANES, lanes)

"""Attention's second product: probabilities times values, and the output.

steps = p / sum, quantized, four keys to a unit         int8
y = steps * values, requantized
steps = p, rounded                                      bfloat16
y = steps * values / sum
y = p * values / sum                                    float32
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.kernels.cpu.attention_lengths import length
from twofour.kernels.cpu.attention_plan import GROUP, VECTOR_BYTES, Plan
from twofour.kernels.cpu.attention_products import Factor, Turns, emit_products, emit_scaled
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    Narrow,
    constant16,
    first_lanes,
    greater16,
    rounded,
    scalar_of,
    store16,
    to_bfloats,
    total16,
)
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, WORDS16, every, float_bits


def emit_results(name: str, plan: Plan, y_pixel: int) -> Function:
    """The function (s, c, y, w) of a tile whose powers lie at `c`.

    `s` points at the scratch memory, `y` at the first query's result, `w` at the header.

    Args:
        name: its symbol.
        plan: sizes.
        y_pixel: bytes from one query's result to the next.
    """
    f = Function(name, [("ptr", p) for p in "scyw"], linkage="internal")
    places = [plan.area("sums") + row * VECTOR_BYTES for row in range(plan.queries)]
    totals = [total16(f, f.load(F32S, "%s", place)) for place in places]
    shares = [_share(f, total, plan.int8) for total in totals]
    results = _Results(f, plan, y_pixel)
    if plan.int8:
        results.quantize(shares)
    elif plan.rounds:
        results.round()
    results.emit(shares)
    return f


def _share(f: Function, total: Value, int8: bool) -> Value:
    """(1 / p_scale) / total in each lane, 1 / total for float32.

    A total below 1 is that of masked keys alone: in int8 their p round to 0, in float32 this is 0.
    """
    one = float_bits(1.0)
    if int8:
        least = scalar_of(f, greater16(f, total, constant16(1.0)))
        return f.splat("float", f.let(f"fdiv float {f.load('float', '%w', 28, 4)}, {least}"))
    whole = scalar_of(f, total)
    seen = f.let(f"fcmp uge float {whole}, {one}")  # true for NaN: kept
    share = f.let(f"fdiv float {one}, {whole}")
    return f.splat("float", f.let(f"select i1 {seen}, float {share}, float 0.0"))


@dataclass(frozen=True)
class _Results:
    """The results of one tile; see `emit_results`."""

    f: Function
    plan: Plan
    y_pixel: int

    def quantize(self, shares: list[Value]) -> None:
        """Writes the area "steps": 4 blocks of probabilities as the bytes of one vector."""
        f, plan = self.f, self.plan
        whole = length(f, plan, "groups") if plan.open_keys else plan.blocks // GROUP
        zero = f.let(f"sitofp i32 {f.load('i32', '%w', 40, 4)} to float")
        most = f.splat("float", f.let(f"fsub float {float_bits(255.0)}, {zero}"))

        def group(i: Value | int, blocks: int) -> None:
            here = f.at("%c", f.int_op("mul", i, GROUP * VECTOR_BYTES))
            out = f.at("%s", f.int_op("mul", i, VECTOR_BYTES))
            for row, share in enumerate(shares):
                at = row * plan.row_bytes
                steps = [
                    self._steps(f.load(F32S, here, at + b * VECTOR_BYTES), share, most)
                    for b in range(blocks)
                ]
                joined = _joined(f, steps)
                f.store(I32S, joined, out, plan.area("steps") + row * plan.step_bytes)

        f.repeat(0, whole, lambda i: group(i, GROUP))
        if plan.blocks % GROUP:
            group(whole, plan.blocks % GROUP)

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

    def _steps(self, power: Value, share: Value, most: Value) -> Value:
        """min(round(power * share), most) in the low byte."""
        f = self.f
        value = f.let(f"fmul {F32S} {power}, {share}")
        below = f.let(f"fcmp olt {F32S} {value}, {most}")
        return rounded(f, f.let(f"select <16 x i1> {below}, {F32S} {value}, {F32S} {most}"))

    def emit(self, shares: list[Value]) -> None:
        """The product and the output."""
        f, plan = self.f, self.plan
        base, pitch = "%c", plan.row_bytes
        if plan.rounds:
            base, pitch = f.at("%s", plan.area("steps")), plan.step_bytes
        left = Factor(base, [r * pitch for r in range(plan.queries)], 4)
        values = f.at("%s", plan.area("values"))
        scale = f.splat("float", f.load("float", "%w", 32, 4))
        narrow = Narrow.of(f, f.load("i32", "%w", 44, 4))
        factors = [scale] * plan.queries
        if not plan.int8:
            factors = [f.let(f"fmul {F32S} {share}, {scale}") for share in shares]
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
                    self._store(emit_scaled(f, plan, total, factors[row]), row, block, narrow)

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


def _joined(f: Function, steps: list[Value]) -> Value:
    """steps[0] | steps[1] << 8 | steps[2] << 16 | steps[3] << 24 of their low bytes."""
    out = ""
    for byte, step in enumerate(steps):
        low = f.let(f"and {I32S} {step}, {every('i32', 255)}")
        moved = f.let(f"shl {I32S} {low}, {every('i32', 8 * byte)}") if byte else low
        out = f.let(f"or {I32S} {out}, {moved}") if out else moved
    return out

"""Attention's first product: scores of a tile of queries, scaled and masked, and their maxima.

Beside it, if asked for, the exponentials of the tile before: products need multipliers and
exponentials mostly adders, so together they take little longer than the products alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.core.attention import LOWEST
from twofour.kernels.cpu.attention_lengths import length
from twofour.kernels.cpu.attention_pack import MINUS_INFINITY, emit_mask_log2
from twofour.kernels.cpu.attention_plan import VECTOR_BYTES, Plan
from twofour.kernels.cpu.attention_powers import blocks_of_powers, clear_sums, one_power
from twofour.kernels.cpu.attention_products import Factor, Turns, emit_products, emit_scaled
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    add16,
    constant16,
    first_lanes,
    greater16,
    highest16,
    keep,
    load16,
)
from twofour.kernels.cpu.vector import F32S, I32S


def emit_scores(
    name: str, plan: Plan, q_pixel: int, m_pixel: int, *, beside: bool = False
) -> Function:
    """The function (q, s, n, c, m, w, i) of the queries from i on.

    `q` points at query i, `m` at its mask if that is "full", `s` at the scratch memory, `w` at the
    header; the scores go to `n`, and those of the tile before lie at `c`.

    Args:
        name: its symbol.
        plan: sizes.
        q_pixel: bytes from one query to the next.
        m_pixel: bytes from one query's mask to the next.
        beside: whether scores at `c` become powers; only where `plan.overlaps`.
    """
    f = Function(name, [("ptr", p) for p in "qsncmw"] + [("i64", "i")], linkage="internal")
    if beside:
        clear_sums(f, plan)
    scores = _Scores(f, plan, q_pixel, m_pixel, beside)
    tops = scores.emit()
    if beside and not plan.open_keys:  # else there are whole chunks only
        blocks_of_powers(f, plan, plan.whole_chunks * plan.key_blocks)
    for row, top in enumerate(tops):
        # At least the lowest finite number: minus infinity minus itself would be NaN.
        highest = greater16(f, highest16(f, top), constant16(float(LOWEST)))
        f.store(F32S, highest, "%s", plan.area("tops") + row * VECTOR_BYTES)
    return f


@dataclass(frozen=True)
class _Scores:
    """The scores of one tile; see `emit_scores`."""

    f: Function
    plan: Plan
    q_pixel: int
    m_pixel: int
    beside: bool

    def emit(self) -> list[Value]:
        """All chunks of keys; returns the maxima by lane, one vector a query."""
        f, plan = self.f, self.plan
        factor = f.splat("float", f.load("float", "%w", 24, 4))

        def turn(i: Value, tops: list[Value]) -> list[Value]:
            return self._chunk(f.int_op("mul", i, plan.key_blocks), plan.key_blocks, tops, factor)

        start = [(F32S, MINUS_INFINITY)] * plan.queries
        tops = f.loop(0, length(f, plan, "whole_chunks"), start, turn)
        first = plan.whole_chunks * plan.key_blocks
        rest = plan.blocks - first
        return self._chunk(first, rest, tops, factor) if rest else tops

    def _chunk(
        self, block: Value | int, count: int, tops: list[Value], factor: Value
    ) -> list[Value]:
        """The scores of some blocks of keys."""
        f, plan = self.f, self.plan
        at = f.int_op("mul", block, VECTOR_BYTES)
        keys = Factor(
            f.at("%s", f.int_op("mul", block, plan.score_units * VECTOR_BYTES)),
            [c * plan.score_units * VECTOR_BYTES for c in range(count)],
            VECTOR_BYTES,
        )
        starts = ["zeroinitializer"] * count
        if plan.int8:
            area = f.at("%s", f.int_op("add", at, plan.area("starts")))
            starts = [f.load(I32S, area, c * VECTOR_BYTES) for c in range(count)]
        queries = Factor("%q", [r * self.q_pixel for r in range(plan.queries)], 4)
        sums = emit_products(f, plan, queries, keys, starts, self._turns(block))
        tops = list(tops)
        for row in range(plan.queries):
            for column in range(count):
                value = emit_scaled(f, plan, sums[row * count + column], factor)
                value = self._masked(value, row, block, column)
                out = f.at("%n", f.int_op("add", at, row * plan.row_bytes))
                f.store(F32S, value, out, column * VECTOR_BYTES)
                tops[row] = greater16(f, value, tops[row])
        return tops

    def _turns(self, block: Value | int) -> Turns:
        """With the 16 powers of the same chunk of the tile before, evenly spread, if asked for."""
        f, plan = self.f, self.plan
        if not self.beside or isinstance(block, int):
            return Turns(plan.score_units)
        each, powers = plan.units_beside

        def beside(turn: Value) -> None:
            for ahead in range(powers):
                i = f.int_op("add", f.int_op("mul", turn, powers), ahead)
                row, column = (
                    f.int_op("udiv", i, plan.key_blocks),
                    f.int_op("urem", i, plan.key_blocks),
                )
                one_power(f, plan, row, f.int_op("add", block, column))

        return Turns(plan.score_units, each, beside)

    def _masked(self, value: Value, row: int, block: Value | int, column: int) -> Value:
        """Adds the mask; minus infinity for keys that are not seen, and beyond the last one."""
        f, plan = self.f, self.plan
        last = isinstance(block, int) and block + column == plan.blocks - 1
        lanes = first_lanes(plan.k_len % LANES) if last and plan.k_len % LANES else ""
        at = f.int_op("mul", f.int_op("add", block, column), VECTOR_BYTES)
        shared = ""
        if plan.masks_keys:
            where = f.int_op("add", at, plan.area("mask"))
            shared = f.load(F32S, "%s", where)
            value = add16(f, value, shared)
        if plan.mask == "full":
            added = load16(f, F32S, "%m", f.int_op("add", at, row * self.m_pixel), lanes)
            value = add16(f, value, emit_mask_log2(f, added))
            if shared:  # what lies beyond the last key may be NaN
                real = f.let(f"fcmp oeq {F32S} {shared}, zeroinitializer")
                value = keep(f, value, real, MINUS_INFINITY)
        if plan.causal:
            first = f.int_op("mul", f.int_op("add", block, column), LANES)
            seen = f.int_op("sub", f.int_op("add", "%i", row + 1), first)
            value = keep(f, value, self._below(seen), MINUS_INFINITY)
        return keep(f, value, lanes, MINUS_INFINITY)

    def _below(self, count: Value) -> Value:
        """np.arange(16) < count."""
        f = self.f
        count = f.splat("i32", f.let(f"trunc i64 {count} to i32"))
        lanes = "<" + ", ".join(f"i32 {lane}" for lane in range(LANES)) + ">"
        return f.let(f"icmp slt {I32S} {lanes}, {count}")

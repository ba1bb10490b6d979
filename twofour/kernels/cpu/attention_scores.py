"""Attention's first product: scores of a tile of queries, scaled and masked, and their maxima.

Beside it, if asked for, the exponentials of the tile before: products need multipliers and
exponentials mostly other units, so together they take little longer than the products alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.core.attention import AHEAD, LOWEST, MIDDLE, OCTAVE
from twofour.kernels.cpu import attention_bytes, attention_powers
from twofour.kernels.cpu.attention_lengths import length
from twofour.kernels.cpu.attention_pack import MINUS_INFINITY, emit_mask
from twofour.kernels.cpu.attention_plan import GROUP, VECTOR_BYTES, Plan
from twofour.kernels.cpu.attention_products import Factor, Turns, across, emit_products
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
from twofour.kernels.cpu.vector import F32S, I32S, Vector, every, float_bits


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
        beside: whether scores at `c` become exponentials; only where `plan.overlaps`.
    """
    f = Function(name, [("ptr", p) for p in "qsncmw"] + [("i64", "i")], linkage="internal")
    if beside and not plan.int8:
        attention_powers.clear_sums(f, plan)
    scores = _Scores(f, plan, q_pixel, m_pixel, beside)
    tops = scores.emit()
    done = plan.whole_chunks * plan.key_blocks
    if beside and not plan.open_keys and done < plan.blocks:  # open keys are whole chunks
        if plan.int8:
            attention_bytes.groups_of_bytes(f, plan, done // GROUP)
        else:
            attention_powers.blocks_of_powers(f, plan, done)
    if plan.int8:
        highest = f.let(f"add <4 x i32> {across(f, 'smax', tops)}, {every('i32', AHEAD, 4)}")
        f.store("<4 x i32>", highest, "%s", plan.area("tops"))
        return f
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
        factor = f.load("float", "%w", 24, 4)
        if plan.int8:
            factor = f.let(f"fmul float {factor}, {float_bits(OCTAVE)}")
        factor = f.splat("float", factor)

        def turn(i: Value, tops: list[Value]) -> list[Value]:
            return self._chunk(f.int_op("mul", i, plan.key_blocks), plan.key_blocks, tops, factor)

        lowest = "zeroinitializer" if plan.int8 else MINUS_INFINITY
        start = [(plan.score, lowest)] * plan.queries
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
                value = self._score(sums[row * count + column], factor, (row, block, column))
                out = f.at("%n", f.int_op("add", at, row * plan.row_bytes))
                f.store(plan.score, value, out, column * VECTOR_BYTES)
                tops[row] = self._greater(value, tops[row])
        return tops

    def _turns(self, block: Value | int) -> Turns:
        """With the exponentials of the same chunk of the tile before, evenly spread, if asked."""
        f, plan = self.f, self.plan
        if not self.beside or isinstance(block, int):
            return Turns(plan.score_units)
        each, pieces = plan.units_beside
        a_row = plan.pieces_beside // plan.queries
        first = f.int_op("udiv", block, GROUP) if plan.int8 else block
        one = attention_bytes.one_group if plan.int8 else attention_powers.one_power

        def beside(turn: Value) -> None:
            for ahead in range(pieces):
                i = f.int_op("add", f.int_op("mul", turn, pieces), ahead)
                row, column = f.int_op("udiv", i, a_row), f.int_op("urem", i, a_row)
                one(f, plan, row, f.int_op("add", first, column))

        return Turns(plan.score_units, each, beside)

    def _score(self, total: Value, factor: Value, where: tuple[int, Value | int, int]) -> Value:
        """A score: scaled and masked, minus infinity for keys that are not seen or do not exist."""
        f, plan, (row, block, column) = self.f, self.plan, where
        last = isinstance(block, int) and block + column == plan.blocks - 1
        lanes = first_lanes(plan.k_len % LANES) if last and plan.k_len % LANES else ""
        at = f.int_op("mul", f.int_op("add", block, column), VECTOR_BYTES)
        shared, mask = "", ""
        if plan.masks_keys:
            mask = shared = f.load(F32S, "%s", f.int_op("add", at, plan.area("mask")))
        if plan.mask == "full":
            mask = load16(f, F32S, "%m", f.int_op("add", at, row * self.m_pixel), lanes)
            mask = emit_mask(f, plan, mask)
        value = self._scaled(total, factor, mask)
        if plan.mask == "full" and shared:  # what lies beyond the last key may be NaN
            real = f.let(f"fcmp one {F32S} {shared}, {MINUS_INFINITY}")
            value = keep(f, value, real, MINUS_INFINITY)
        if plan.causal:
            first = f.int_op("mul", f.int_op("add", block, column), LANES)
            seen = f.int_op("sub", f.int_op("add", "%i", row + 1), first)
            value = keep(f, value, self._below(seen), MINUS_INFINITY)
        value = keep(f, value, lanes, MINUS_INFINITY)
        return f.let(f"bitcast {F32S} {value} to {I32S}") if plan.int8 else value

    def _scaled(self, total: Value, factor: Value, mask: Value) -> Value:
        """Total * factor + mask, if there is one; in int8 rounded once, to whole steps."""
        f, v = self.f, Vector(self.plan.isa, self.f)
        if self.plan.int8:
            total = f.let(f"sitofp {I32S} {total} to {F32S}")
            return v.fused(mask or constant16(MIDDLE), total, factor)
        value = f.let(f"fmul {F32S} {total}, {factor}")
        return add16(f, value, mask) if mask else value

    def _greater(self, a: Value, b: Value) -> Value:
        """The maximum of two vectors of scores."""
        if not self.plan.int8:
            return greater16(self.f, a, b)
        return self.f.call(I32S, "llvm.smax.v16i32", (I32S, a), (I32S, b))

    def _below(self, count: Value) -> Value:
        """np.arange(16) < count."""
        f = self.f
        count = f.splat("i32", f.let(f"trunc i64 {count} to i32"))
        lanes = "<" + ", ".join(f"i32 {lane}" for lane in range(LANES)) + ">"
        return f.let(f"icmp slt {I32S} {lanes}, {count}")

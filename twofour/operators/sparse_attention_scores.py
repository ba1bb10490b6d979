"""Sparse attention: a tile's queries, its scores for the keys of a list, and their exponentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twofour.core.attention import AHEAD, LOWEST, MIDDLE, OCTAVE
from twofour.kernels.cpu.attention_bytes import scores_to_bytes
from twofour.kernels.cpu.attention_pack import MINUS_INFINITY
from twofour.kernels.cpu.attention_plan import VECTOR_BYTES
from twofour.kernels.cpu.attention_powers import power_of_two
from twofour.kernels.cpu.attention_products import ONES, across, multiply
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    add16,
    constant16,
    first_lanes,
    greater16,
    highest16,
    keep,
    store16,
    to_bfloats,
)
from twofour.kernels.cpu.vector import F32S, I32S, WORDS16, Vector, every, float_bits
from twofour.operators.sparse_attention_pack import SIGN_BITS, load_units
from twofour.operators.sparse_attention_plan import GROUP, Plan


@dataclass(frozen=True)
class TilePart:
    """What the functions of a tile share.

    Attributes:
        f: the function.
        plan: sizes.
    """

    f: Function
    plan: Plan

    @property
    def rows(self) -> range:
        """Queries."""
        return range(self.plan.tile.rows)

    def place(self, area: str, row: int) -> int:
        """Where a row's vector of an area lies."""
        return self.plan.area(area) + row * VECTOR_BYTES

    def entry(self, list_: Value, index: Value | int, ahead: int = 0) -> Value:
        """A block's number."""
        f = self.f
        at = f.at(list_, f.int_op("mul", index, 4))
        return f.let(f"sext i32 {f.load('i32', at, 4 * ahead, 4)} to i64")


def emit_queries(name: str, plan: Plan) -> Function:
    """The function (q, s, w): a tile's queries into the scratch memory, float32 ones scaled."""
    f = Function(name, [("ptr", p) for p in "qsw"], linkage="internal")
    factor = f.splat("float", f.load("float", "%w", 24, 4))
    for row in range(plan.tile.rows):
        for first in range(0, plan.score_units, LANES):
            lanes = first_lanes(plan.score_units - first)
            bits = load_units(f, plan, "%q", first, row * plan.q.pixel)
            if plan.int8 and not plan.q.biased:
                bits = f.let(f"xor {I32S} {bits}, {SIGN_BITS}")
            value = f.let(f"bitcast {I32S} {bits} to {F32S}")
            if plan.dtype == "float32":
                value = f.let(f"fmul {F32S} {value}, {factor}")
            at = plan.area("queries") + row * plan.query_bytes + 4 * first
            store16(f, F32S, value, "%s", at, lanes)
    return f


def emit_scores(name: str, plan: Plan) -> Function:
    """The function (s, h, m, l, b, w, i, n) that writes a tile's scores and their maxima.

    `s` is the scratch memory, `h` the packed head, `m` the mask of keys, `l` the tile's list, `b`
    its masks; of `n` chunks the first `i` are seen whole.
    """
    args = [("ptr", p) for p in "shmlbw"] + [("i64", p) for p in "in"]
    f = Function(name, args, linkage="internal")
    scores = _Scores(f, plan)
    kind = I32S if plan.int8 else F32S
    start = "zeroinitializer" if plan.int8 else MINUS_INFINITY
    tops = [(kind, start)] * plan.tile.rows
    whole = f.loop(0, "%i", tops, lambda i, carried: scores.chunk(i, carried, ""))
    carried = [(kind, top) for top in whole]
    bytes_ = plan.tile.rows * plan.tile.keys * 2

    def masked(i: Value, tops: list[Value]) -> list[Value]:
        words = f.at("%b", f.int_op("mul", f.int_op("sub", i, "%i"), bytes_))
        return scores.chunk(i, tops, words)

    highest = f.loop("%i", "%n", carried, masked)
    if plan.int8:
        for at in range(0, plan.tile.rows, 4):
            four = across(f, "smax", highest[at : at + 4])
            four = f.let(f"add <4 x i32> {four}, {every('i32', AHEAD, 4)}")
            f.store("<4 x i32>", four, "%s", plan.area("tops") + 4 * at)
        return f
    for row, top in enumerate(highest):
        # At least the lowest finite number: minus infinity minus itself would be NaN.
        least = greater16(f, highest16(f, top), constant16(float(LOWEST)))
        f.store(F32S, least, "%s", plan.area("tops") + row * VECTOR_BYTES)
    return f


@dataclass(frozen=True)
class _Scores(TilePart):
    """The first product of a tile."""

    def chunk(self, i: Value, tops: Sequence[Value], words: Value) -> list[Value]:
        """The scores of chunk i; `words` says what is seen of it, "" where all is."""
        f, plan = self.f, self.plan
        columns = range(plan.tile.keys)
        first = f.int_op("mul", i, plan.tile.keys)
        numbers = [self.entry("%l", first, c) for c in columns]
        sums = self._products(numbers)
        factor = f.load("float", "%w", 24, 4)
        if plan.int8:
            factor = f.let(f"fmul float {factor}, {float_bits(OCTAVE)}")
        factor = f.splat("float", factor)
        added = [""] * len(columns)
        if plan.masked:
            added = [f.load(F32S, "%m", f.int_op("mul", n, VECTOR_BYTES)) for n in numbers]
        out = f.at("%s", f.int_op("mul", first, VECTOR_BYTES))
        tops = list(tops)
        for row in self.rows:
            for c in columns:
                value = self._scaled(sums[row * len(columns) + c], factor, added[c])
                if words:
                    bits = f.load("i16", words, 2 * (row * len(columns) + c), 2)
                    seen = f.let(f"bitcast i16 {bits} to <16 x i1>")
                    value = keep(f, value, seen, MINUS_INFINITY)
                at = row * plan.row_bytes + c * VECTOR_BYTES
                f.store(F32S, value, out, at, VECTOR_BYTES)
                tops[row] = self._greater(value, tops[row])
        return tops

    def _products(self, numbers: Sequence[Value]) -> list[Value]:
        """sums[row * columns + column]."""
        f, plan = self.f, self.plan
        v = Vector(plan.isa, f)
        columns = [f.at("%h", f.int_op("mul", n, plan.key_bytes)) for n in numbers]
        starts = ["zeroinitializer"] * len(columns)
        if plan.int8:
            area = f.at("%h", plan.starts_at)
            starts = [f.load(I32S, area, f.int_op("mul", n, VECTOR_BYTES)) for n in numbers]
        kind = I32S if plan.int8 else F32S
        stored = F32S if plan.dtype == "float32" else I32S
        each = next(e for e in (4, 2, 1) if plan.score_units % e == 0)
        queries = f.at("%s", plan.area("queries"))

        def turn(i: Value, sums: list[Value]) -> list[Value]:
            there = f.at(queries, f.int_op("mul", i, 4 * each))
            here = [f.at(c, f.int_op("mul", i, VECTOR_BYTES * each)) for c in columns]
            for ahead in range(each):
                vectors = [f.load(stored, c, ahead * VECTOR_BYTES, VECTOR_BYTES) for c in here]
                out = []
                for row in self.rows:
                    one = v.broadcast4(there, row * plan.query_bytes + 4 * ahead)
                    for c, vector in enumerate(vectors):
                        total = sums[row * len(vectors) + c]
                        out.append(multiply(v, plan.dtype, total, one, vector))
                sums = out
            return sums

        start = [(kind, s) for s in starts] * plan.tile.rows
        return f.loop(0, plan.score_units // each, start, turn)

    def _scaled(self, total: Value, factor: Value, added: Value) -> Value:
        """A sum as an exponent of 2; in int8 rounded once, to whole steps."""
        f, plan = self.f, self.plan
        if plan.int8:
            total = f.let(f"sitofp {I32S} {total} to {F32S}")
            return Vector(plan.isa, f).fused(added or constant16(MIDDLE), total, factor)
        if plan.dtype != "float32":
            total = f.let(f"fmul {F32S} {total}, {factor}")
        return add16(f, total, added) if added else total

    def _greater(self, value: Value, top: Value) -> Value:
        f = self.f
        if not self.plan.int8:
            return greater16(f, value, top)
        bits = f.let(f"bitcast {F32S} {value} to {I32S}")
        return f.call(I32S, "llvm.smax.v16i32", (I32S, bits), (I32S, top))


def emit_powers(name: str, plan: Plan) -> Function:
    """The function (s, n): the scores of `n` blocks become exponentials; sums."""
    f = Function(name, [("ptr", "s"), ("i64", "n")], linkage="internal")
    powers = _Powers(f, plan)
    kind = I32S if plan.int8 else F32S
    none = [(kind, "zeroinitializer")] * plan.tile.rows
    if plan.int8:
        sums = f.loop(0, f.int_op("udiv", "%n", GROUP), none, powers.group)
    else:
        sums = f.loop(0, "%n", none, powers.block)
    for row, total in enumerate(sums):
        f.store(kind, total, "%s", powers.place("sums", row))
    return f


@dataclass(frozen=True)
class _Powers(TilePart):
    """The exponentials of a tile, all queries side by side."""

    def block(self, i: Value, sums: list[Value]) -> list[Value]:
        """One block of 16 keys; in bfloat16 rounded to steps, in float32 in place."""
        f, plan = self.f, self.plan
        here, out = f.at("%s", f.int_op("mul", i, VECTOR_BYTES)), []
        steps = f.at("%s", f.int_op("mul", i, VECTOR_BYTES // 2))
        for row in self.rows:
            score = f.load(F32S, here, row * plan.row_bytes, VECTOR_BYTES)
            top = f.load(F32S, "%s", self.place("tops", row), VECTOR_BYTES)
            power = power_of_two(f, plan.numbers, f.let(f"fsub {F32S} {score}, {top}"))
            if plan.dtype == "float32":
                f.store(F32S, power, here, row * plan.row_bytes, VECTOR_BYTES)
            else:
                at = plan.area("steps") + row * plan.step_bytes
                f.store(WORDS16, to_bfloats(f, power), steps, at)
            out.append(add16(f, sums[row], power))
        return out

    def group(self, i: Value, sums: list[Value]) -> list[Value]:
        """Four blocks as bytes."""
        f, plan = self.f, self.plan
        v = Vector(plan.isa, f)
        here, out = f.at("%s", f.int_op("mul", i, GROUP * VECTOR_BYTES)), []
        steps = f.at("%s", f.int_op("mul", i, VECTOR_BYTES))
        for row in self.rows:
            top = f.splat("i32", f.load("i32", "%s", plan.area("tops") + 4 * row, 4))
            at = row * plan.row_bytes
            scores = [f.load(I32S, here, at + b * VECTOR_BYTES) for b in range(GROUP)]
            bytes_ = scores_to_bytes(f, plan.numbers, top, scores)
            f.store(I32S, bytes_, steps, plan.area("steps") + row * plan.step_bytes)
            out.append(v.dot4(sums[row], bytes_, ONES))
        return out

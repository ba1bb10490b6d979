"""Sparse attention: the second product of a tile, over the values of its list, and the output."""

from __future__ import annotations

from dataclasses import dataclass

from twofour.kernels.cpu.attention_plan import OWN_BYTES, VECTOR_BYTES
from twofour.kernels.cpu.attention_products import across, emit_scaled, multiply
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.narrow import AT_ONCE, Narrow, Rounding
from twofour.kernels.cpu.narrow import Target as Place
from twofour.kernels.cpu.problem import ELEMENT_BYTES, LANES
from twofour.kernels.cpu.rows import first_lanes, load16, scalar_of, store16, to_bfloats, total16
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, WORDS16, Vector, every, float_bits
from twofour.operators.sparse_attention_plan import GROUP, Plan
from twofour.operators.sparse_attention_scores import TilePart


def emit_results(name: str, plan: Plan) -> Function:
    """The function (s, v, l, y, w, n): the second product, of `n` blocks, and the output.

    `v` are the packed values of the head, `y` is the first query's result.
    """
    args = [("ptr", p) for p in "svlyw"] + [("i64", "n")]
    f = Function(name, args, linkage="internal")
    results = _Results(f, plan)
    shares = results.shares(f.load("float", "%w", 28, 4))
    for first in range(0, plan.channel_blocks, plan.tile.values):
        blocks = range(first, min(first + plan.tile.values, plan.channel_blocks))
        sums = results.products(blocks)
        values = [
            emit_scaled(f, plan.numbers, total, shares[at // len(blocks)])
            for at, total in enumerate(sums)
        ]
        results.store(values, [(row, block) for row in results.rows for block in blocks])
    return f


@dataclass(frozen=True)
class _Results(TilePart):
    """The results of a tile."""

    def shares(self, scale: Value) -> list[Value]:
        """Scale / sum of each query; zeros where it saw no key."""
        f, plan = self.f, self.plan
        one, shares = float_bits(1.0), []
        if plan.int8:
            totals = [f.load(I32S, "%s", self.place("sums", row)) for row in self.rows]
            four, floats = "<4 x i32>", "<4 x float>"
            for at in range(0, len(totals), 4):
                some = totals[at : at + 4]
                least = (four, across(f, "add", some)), (four, every("i32", 1, 4))
                value = f.call(four, "llvm.smax.v4i32", *least)
                value = f.let(f"sitofp {four} {value} to {floats}")
                value = f.let(f"fdiv {floats} {f.splat('float', scale, 4)}, {value}")
                for lane in range(len(some)):
                    share = f.let(f"extractelement {floats} {value}, i32 {lane}")
                    shares.append(f.splat("float", share))
            return shares
        for row in self.rows:
            whole = scalar_of(f, total16(f, f.load(F32S, "%s", self.place("sums", row))))
            seen = f.let(f"fcmp uge float {whole}, {one}")  # true for NaN: kept
            share = f.let(f"fdiv float {one}, {whole}")
            share = f.let(f"select i1 {seen}, float {share}, float 0.0")
            shares.append(f.splat("float", f.let(f"fmul float {share}, {scale}")))
        return shares

    def products(self, blocks: range) -> list[Value]:
        """The sums of some blocks of channels, sums[row * blocks + block]."""
        f, plan = self.f, self.plan
        kind = I32S if plan.int8 else F32S
        none = [(kind, "zeroinitializer")] * (len(blocks) * plan.tile.rows)
        area, pitch = plan.area("scores"), plan.row_bytes
        if plan.dtype != "float32":
            area, pitch = plan.area("steps"), plan.step_bytes
        each = GROUP if plan.int8 else 1
        unit_bytes = plan.channel_blocks * VECTOR_BYTES
        columns = [block * VECTOR_BYTES for block in blocks]

        def turn(i: Value, sums: list[Value]) -> list[Value]:
            left = f.at("%s", f.int_op("mul", i, plan.value_units * 4 * each))
            first = f.int_op("mul", i, each)
            numbers = [self.entry("%l", first, ahead) for ahead in range(each)]
            right = [f.at("%v", f.int_op("mul", n, plan.value_bytes)) for n in numbers]
            for unit in range(plan.value_units):
                for b, base in enumerate(right):
                    there = area + 4 * (unit * each + b)
                    sums = self._unit(
                        sums, (left, there, pitch), (base, unit * unit_bytes, columns)
                    )
            return sums

        return f.loop(0, f.int_op("udiv", "%n", each) if each > 1 else "%n", none, turn)

    def _unit(
        self,
        sums: list[Value],
        left: tuple[Value, int, int],
        right: tuple[Value, int, list[int]],
    ) -> list[Value]:
        """Adds the products of one unit of keys."""
        f, plan, out = self.f, self.plan, list[Value]()
        v = Vector(plan.isa, f)
        stored = F32S if plan.dtype == "float32" else I32S
        base, at, columns = right
        vectors = [f.load(stored, base, at + c, VECTOR_BYTES) for c in columns]
        pointer, there, pitch = left
        for row in self.rows:
            one = v.broadcast4(pointer, there + row * pitch)
            for c, vector in enumerate(vectors):
                total = sums[row * len(vectors) + c]
                out.append(multiply(v, plan.dtype, total, one, vector))
        return out

    def store(self, values: list[Value], places: list[tuple[int, int]]) -> None:
        """Results of (row, block) as the output's type."""
        f, plan = self.f, self.plan
        size = ELEMENT_BYTES[plan.out]
        if plan.out == "int8":
            narrow = Narrow(Vector(plan.isa, f), f.at("%w", OWN_BYTES), Rounding(plan.int8))
            targets = [
                Place(row * plan.y.pixel + b * LANES, first_lanes(plan.d - b * LANES))
                for row, b in places
            ]
            for at in range(0, len(values), AT_ONCE):
                narrow.store(values[at : at + AT_ONCE], targets[at : at + AT_ONCE])
            for place in targets if not plan.y.biased else ():
                bytes_ = load16(f, BYTES16, "%y", place.offset, place.mask)
                bytes_ = f.let(f"xor {BYTES16} {bytes_}, {every('i8', -128)}")
                store16(f, BYTES16, bytes_, "%y", place.offset, place.mask)
            return
        for value, (row, block) in zip(values, places, strict=True):
            lanes = first_lanes(plan.d - block * LANES)
            at = row * plan.y.pixel + block * LANES * size
            if plan.out == "float32":
                store16(f, F32S, value, "%y", at, lanes)
            else:
                store16(f, WORDS16, to_bfloats(f, value), "%y", at, lanes)

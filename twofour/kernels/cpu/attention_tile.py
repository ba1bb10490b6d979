"""Attention, the second part: a tile of queries, from scores to results.

    scores = queries * keys, scaled and masked, and each row's maximum   one tile of sums at a time
    p = 2 ** (scores - maximum), and each row's sum                      all rows side by side
    steps = p / sum, quantized, four keys to a unit                      int8 only
    y = steps * values, requantized                                      one tile of sums at a time

Scores and steps of a tile stay in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twofour.core.attention import LOWEST, POWERS, POWERS_LOW, ROUND
from twofour.core.functions import EXP2, LOG2_E, ROUND127
from twofour.kernels.cpu.attention_pack import MINUS_INFINITY
from twofour.kernels.cpu.attention_plan import GROUP, VECTOR_BYTES, Plan
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import (
    Narrow,
    add16,
    first_lanes,
    greater16,
    highest16,
    keep,
    load16,
    rounded,
    scalar_of,
    store16,
    total16,
)
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, Vector, every, float_bits


def emit_tile(name: str, plan: Plan, strides: tuple[int, int, int]) -> Function:
    """The function (q, s, y, m, w, i) of the queries from i on.

    `q` and `y` point at query i, `m` at its mask if that is "full", `s` at the scratch memory, `w`
    at the header.

    Args:
        name: its symbol.
        plan: sizes.
        strides: bytes from one query to the next in q, in y and in the mask.
    """
    arguments = [("ptr", p) for p in "qsymw"] + [("i64", "i")]
    f = Function(name, arguments, linkage="internal")
    tile = _Tile(f, Vector(plan.isa, f), plan, *strides)
    tops = [greater16(f, highest16(f, top), _constant(float(LOWEST))) for top in tile.scores()]
    totals = [total16(f, lanes) for lanes in tile.powers(tops)]
    shares = [_reciprocal(f, total, plan.int8) for total in totals]
    if plan.int8:
        tile.quantize(shares)
    tile.results(shares)
    return f


def _constant(value: float) -> Value:
    return every("float", float_bits(value))


def _reciprocal(f: Function, total: Value, int8: bool) -> Value:
    """(1 / p_scale) / total in each lane, 1 / total for float32.

    A total below 1 is that of masked keys alone: in int8 their p round to 0, in float32 this is 0.
    """
    one = float_bits(1.0)
    if int8:
        least = scalar_of(f, greater16(f, total, _constant(1.0)))
        return f.splat("float", f.let(f"fdiv float {f.load('float', '%w', 28, 4)}, {least}"))
    whole = scalar_of(f, total)
    seen = f.let(f"fcmp uge float {whole}, {one}")  # true for NaN: kept
    share = f.let(f"fdiv float {one}, {whole}")
    return f.splat("float", f.let(f"select i1 {seen}, float {share}, float 0.0"))


@dataclass(frozen=True)
class _Tile:
    """One tile of queries.

    Attributes:
        f: the function.
        v: emits vector operations into it.
        plan: sizes.
        q_pixel: bytes from one query to the next.
        y_pixel: bytes from one result to the next.
        m_pixel: bytes from one query's mask to the next.
    """

    f: Function
    v: Vector
    plan: Plan
    q_pixel: int
    y_pixel: int
    m_pixel: int

    def scores(self) -> list[Value]:
        """Writes the area "scores"; returns the maxima by lane, one vector a query."""
        f, plan = self.f, self.plan
        chunks = plan.k_len // LANES // plan.key_blocks  # those without padding
        factor = f.splat("float", f.load("float", "%w", 24, 4))

        def turn(i: Value, tops: list[Value]) -> list[Value]:
            return self._chunk(f.int_op("mul", i, plan.key_blocks), plan.key_blocks, tops, factor)

        start = [(F32S, MINUS_INFINITY)] * plan.queries
        tops = f.loop(0, chunks, start, turn)
        rest = plan.blocks - chunks * plan.key_blocks
        return self._chunk(chunks * plan.key_blocks, rest, tops, factor) if rest else tops

    def _chunk(
        self, block: Value | int, count: int, tops: list[Value], factor: Value
    ) -> list[Value]:
        """The scores of some blocks of keys."""
        f, plan = self.f, self.plan
        keys = f.at("%s", f.int_op("mul", block, plan.score_units * VECTOR_BYTES))
        at = f.int_op("mul", block, VECTOR_BYTES)
        columns = [c * plan.score_units * VECTOR_BYTES for c in range(count)]
        starts = ["zeroinitializer"] * count
        if plan.int8:
            area = f.at("%s", f.int_op("add", at, plan.area("starts")))
            starts = [f.load(I32S, area, c * VECTOR_BYTES) for c in range(count)]
        rows = [r * self.q_pixel for r in range(plan.queries)]
        sums = self._products(("%q", rows), (keys, columns, VECTOR_BYTES), starts, plan.score_units)
        tops = list(tops)
        for row in range(plan.queries):
            for column in range(count):
                value = self._scaled(sums[row * count + column], factor)
                value = self._masked(value, row, block, column)
                out = f.int_op("add", at, plan.area("scores") + row * plan.row_bytes)
                f.store(F32S, value, f.at("%s", out), column * VECTOR_BYTES)
                tops[row] = greater16(f, value, tops[row])
        return tops

    def _products(
        self,
        left: tuple[Value, list[int]],
        right: tuple[Value, list[int], int],
        starts: Sequence[Value],
        units: int,
    ) -> list[Value]:
        """sums[row, column] = starts[column] + sum over units of left[row] * right[column].

        Args:
            left: pointer and the rows' offsets; a row's units follow each other.
            right: pointer, the columns' offsets, and bytes from one unit to the next.
            starts: one vector a column.
            units: how many.
        """
        f, plan = self.f, self.plan
        (base, rows), (stream, columns, step) = left, right
        kind = I32S if plan.int8 else F32S

        def unit(i: Value, sums: list[Value]) -> list[Value]:
            here = f.at(stream, f.int_op("mul", i, step))
            vectors = [f.load(kind, here, column) for column in columns]
            there, out = f.at(base, f.int_op("mul", i, 4)), []
            for r, row in enumerate(rows):
                one = self.v.broadcast4(there, row)
                for c, vector in enumerate(vectors):
                    out.append(self._multiply(sums[r * len(columns) + c], one, vector))
            return out

        return f.loop(0, units, [(kind, s) for s in starts] * len(rows), unit)

    def _multiply(self, total: Value, one: Value, vector: Value) -> Value:
        """Adds a unit's products: 4 of bytes, or 1 of floats."""
        if self.plan.int8:
            return self.v.dot4(total, one, vector)
        return self.v.fma(total, self.f.let(f"bitcast {I32S} {one} to {F32S}"), vector)

    def _scaled(self, total: Value, factor: Value) -> Value:
        """Exponents of 2 from sums."""
        if self.plan.int8:
            total = self.f.let(f"sitofp {I32S} {total} to {F32S}")
        return self.f.let(f"fmul {F32S} {total}, {factor}")

    def _masked(self, value: Value, row: int, block: Value | int, column: int) -> Value:
        """Adds the mask; minus infinity for keys that are not seen, and beyond the last one."""
        f, plan = self.f, self.plan
        last = isinstance(block, int) and block + column == plan.blocks - 1
        lanes = first_lanes(plan.k_len % LANES) if last and plan.k_len % LANES else ""
        at = f.int_op("mul", f.int_op("add", block, column), VECTOR_BYTES)
        if plan.mask == "keys":
            where = f.int_op("add", at, plan.area("mask"))
            value = add16(f, value, f.load(F32S, "%s", where))
        elif plan.mask == "full":
            added = load16(f, F32S, "%m", f.int_op("add", at, row * self.m_pixel), lanes)
            value = add16(f, value, f.let(f"fmul {F32S} {added}, {_constant(LOG2_E)}"))
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

    def powers(self, tops: list[Value]) -> list[Value]:
        """Scores become 2 ** (score - top); returns their sums by lane, one vector a query."""
        f, plan = self.f, self.plan
        scores = f.at("%s", plan.area("scores"))

        def block(i: Value, sums: list[Value]) -> list[Value]:
            here, out = f.at(scores, f.int_op("mul", i, VECTOR_BYTES)), []
            for row, (top, total) in enumerate(zip(tops, sums, strict=True)):
                score = f.load(F32S, here, row * plan.row_bytes)
                power = self._power(f.let(f"fsub {F32S} {score}, {top}"))
                f.store(F32S, power, here, row * plan.row_bytes)
                out.append(add16(f, total, power))
            return out

        return f.loop(0, plan.blocks, [(F32S, "zeroinitializer")] * plan.queries, block)

    def _power(self, x: Value) -> Value:
        """`core.attention.powers`; for float32 as `_power_of_float`."""
        if not self.plan.int8:
            return self._power_of_float(x)
        f = self.f
        x = greater16(f, x, _constant(POWERS_LOW))
        shifted = add16(f, x, _constant(ROUND))
        whole = f.let(f"fsub {F32S} {shifted}, {_constant(ROUND)}")
        fraction = f.let(f"fsub {F32S} {x}, {whole}")
        value = _constant(POWERS[-1])
        for coefficient in POWERS[-2::-1]:
            value = add16(f, f.let(f"fmul {F32S} {value}, {fraction}"), _constant(coefficient))
        exponent = f.let(f"bitcast {F32S} {shifted} to {I32S}")
        exponent = f.let(f"shl {I32S} {exponent}, {every('i32', 23)}")
        bits = f.let(f"add {I32S} {f.let(f'bitcast {F32S} {value} to {I32S}')}, {exponent}")
        return f.let(f"bitcast {I32S} {bits} to {F32S}")

    def _power_of_float(self, x: Value) -> Value:
        """2**x with a longer polynomial and fused multiply-adds; NaN stays NaN."""
        f = self.f
        x = greater16(f, _constant(POWERS_LOW), x)
        shifted = add16(f, x, _constant(ROUND127))
        whole = f.let(f"fsub {F32S} {shifted}, {_constant(ROUND127)}")
        fraction = f.let(f"fsub {F32S} {x}, {whole}")
        value = _constant(EXP2[-1])
        for coefficient in EXP2[-2::-1]:
            value = self.v.fma(_constant(coefficient), value, fraction)
        exponent = f.let(f"bitcast {F32S} {shifted} to {I32S}")
        exponent = f.let(f"shl {I32S} {exponent}, {every('i32', 23)}")
        return f.let(f"fmul {F32S} {value}, {f.let(f'bitcast {I32S} {exponent} to {F32S}')}")

    def quantize(self, shares: list[Value]) -> None:
        """Writes the area "steps": 4 blocks of probabilities as the bytes of one vector."""
        f, plan = self.f, self.plan
        whole = plan.blocks // GROUP
        zero = f.let(f"sitofp i32 {f.load('i32', '%w', 40, 4)} to float")
        most = f.splat("float", f.let(f"fsub float {float_bits(255.0)}, {zero}"))

        def group(i: Value | int, blocks: int) -> None:
            here = f.at("%s", f.int_op("mul", i, GROUP * VECTOR_BYTES))
            out = f.at("%s", f.int_op("mul", i, VECTOR_BYTES))
            for row, share in enumerate(shares):
                at = plan.area("scores") + row * plan.row_bytes
                steps = [
                    self._steps(f.load(F32S, here, at + b * VECTOR_BYTES), share, most)
                    for b in range(blocks)
                ]
                joined = _joined(f, steps)
                f.store(I32S, joined, out, plan.area("steps") + row * plan.step_bytes)

        f.repeat(0, whole, lambda i: group(i, GROUP))
        if plan.blocks % GROUP:
            group(whole, plan.blocks % GROUP)

    def _steps(self, power: Value, share: Value, most: Value) -> Value:
        """min(round(power * share), most) in the low byte."""
        f = self.f
        value = f.let(f"fmul {F32S} {power}, {share}")
        below = f.let(f"fcmp olt {F32S} {value}, {most}")
        return rounded(f, f.let(f"select <16 x i1> {below}, {F32S} {value}, {F32S} {most}"))

    def results(self, shares: list[Value]) -> None:
        """The second product and the output."""
        f, plan = self.f, self.plan
        area, pitch = ("steps", plan.step_bytes) if plan.int8 else ("scores", plan.row_bytes)
        rows = [r * pitch for r in range(plan.queries)]
        step = plan.channel_blocks * VECTOR_BYTES
        scale = f.splat("float", f.load("float", "%w", 32, 4))
        narrow = Narrow.of(f, f.load("i32", "%w", 44, 4))
        factors = [scale] * plan.queries
        if not plan.int8:
            factors = [f.let(f"fmul {F32S} {share}, {scale}") for share in shares]
        for first in range(0, plan.channel_blocks, plan.value_blocks):
            blocks = range(first, min(first + plan.value_blocks, plan.channel_blocks))
            sums = self._products(
                (f.at("%s", plan.area(area)), rows),
                (f.at("%s", plan.area("values")), [b * VECTOR_BYTES for b in blocks], step),
                ["zeroinitializer"] * len(blocks),
                plan.value_units,
            )
            for row in range(plan.queries):
                for column, block in enumerate(blocks):
                    value = self._scaled(sums[row * len(blocks) + column], factors[row])
                    self._store(value, row, block, narrow)

    def _store(self, value: Value, row: int, block: int, narrow: Narrow) -> None:
        """One block of one result."""
        f, plan = self.f, self.plan
        lanes = first_lanes(plan.dv - block * LANES)
        if plan.out == "float32":
            store16(f, F32S, value, "%y", row * self.y_pixel + block * VECTOR_BYTES, lanes)
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

"""Attention, the first part: a head's keys, values and mask in the order of attention_plan.py.

It is done once a head and costs a few per cent of the products. What is read beyond a row's or the
last row's end has no effect: it meets zeros, or is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence

from twofour.core.approximations import LOG2_E
from twofour.core.attention import LOWEST, MASK_STEPS, MIDDLE, OCTAVE
from twofour.kernels.cpu.attention_lengths import length
from twofour.kernels.cpu.attention_plan import GROUP, VECTOR_BYTES, Plan
from twofour.kernels.cpu.attention_products import ONES
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import add16, constant16, first_lanes, greater16, keep, load16
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, WORDS16, Vector, every, lanes_below

MINUS_INFINITY = every("float", "0xFFF0000000000000")
_SIGN_BITS = every("i32", -0x7F7F7F80)  # 0x80808080: stored bytes to int8 and back


def emit_keys(name: str, plan: Plan, pixel: int) -> Function:
    """The function (k, s, w) that packs keys into the scratch memory `s`.

    Sums of queries times keys begin with minus the zero point of q times the sum of the key: this
    is written to the area "starts".
    """
    f = Function(name, [("ptr", p) for p in "ksw"], linkage="internal")
    v = Vector(plan.isa, f)
    rest = (plan.score_units - 1) % LANES + 1  # the last chunk, which may have to be cut
    minus_zero = f.splat("i32", f.int_op("sub", 0, f.load("i32", "%w", 32, 4), "i32"))

    def block(i: Value) -> None:
        first = f.int_op("mul", i, LANES)
        rows = [_row(f, plan, "%k", first, lane, pixel) for lane in range(LANES)]
        out = f.at("%s", f.int_op("mul", i, plan.score_units * VECTOR_BYTES))

        def chunk(at: Value | int, units: int, sums: Value, tail: int = 0) -> Value:
            where = f.int_op("mul", at, VECTOR_BYTES)
            vectors = transposed(f, [f.load(I32S, row, where) for row in rows])[:units]
            if plan.int8:
                vectors, sums = as_int8(v, vectors, sums, tail)
            for j, vector in enumerate(vectors):
                f.store(I32S, vector, f.at(out, f.int_op("mul", where, LANES)), j * VECTOR_BYTES)
            return sums

        before = (plan.score_units - rest) // LANES
        sums = "zeroinitializer"
        if before:
            (sums,) = f.loop(0, before, [(I32S, sums)], lambda c, s: [chunk(c, LANES, s[0])])
        sums = chunk(before, rest, sums, plan.d % 4)
        if plan.int8:
            start = f.let(f"mul {I32S} {sums}, {minus_zero}")
            at = f.int_op("add", f.int_op("mul", i, VECTOR_BYTES), plan.area("starts"))
            f.store(I32S, start, "%s", at)

    f.repeat(0, length(f, plan, "blocks"), block)
    return f


def _row(f: Function, plan: Plan, base: Value, first: Value, offset: int, pixel: int) -> Value:
    """Pointer to row first + offset, the last one where that is beyond it."""
    row = f.int_op("add", first, offset)
    if plan.open_keys or plan.k_len % (LANES * GROUP):
        count = length(f, plan, "k_len")
        last = str(count - 1) if isinstance(count, int) else f.int_op("sub", count, 1)
        row = f.call("i64", "llvm.umin.i64", ("i64", row), ("i64", last))
    return f.at(base, f.int_op("mul", row, pixel))


def transposed(f: Function, rows: Sequence[Value]) -> list[Value]:
    """out[j][i] = rows[i][j], 16 vectors of 16 lanes of 32 bits: halves, quarters, ... change."""
    out = list(rows)
    for distance in (8, 4, 2, 1):
        lanes = range(LANES)
        upper = [LANES + j - distance if j & distance else j for j in lanes]
        lower = [LANES + j if j & distance else j + distance for j in lanes]
        for i in lanes:
            if not i & distance:
                a, b = out[i], out[i + distance]
                out[i], out[i + distance] = _pick(f, a, b, upper), _pick(f, a, b, lower)
    return out


def _pick(f: Function, a: Value, b: Value, lanes: list[int]) -> Value:
    """np.concatenate([a, b])[lanes]."""
    picks = ", ".join(f"i32 {lane}" for lane in lanes)
    return f.let(f"shufflevector {I32S} {a}, {I32S} {b}, <16 x i32> <{picks}>")


def as_int8(v: Vector, units: list[Value], sums: Value, tail: int) -> tuple[list[Value], Value]:
    """Stored bytes as int8, and sums + each key's sum of them.

    Of the last unit the first `tail` bytes count, if not 0; the rest become zeros.
    """
    f = v.f
    units = [f.let(f"xor {I32S} {unit}, {_SIGN_BITS}") for unit in units]
    if tail:
        units[-1] = f.let(f"and {I32S} {units[-1]}, {every('i32', (1 << 8 * tail) - 1)}")
    for unit in units:
        sums = v.dot4(sums, ONES, unit)
    return units, sums


def emit_values(name: str, plan: Plan, pixel: int) -> Function:
    """The function (v, s) that packs values into the scratch memory `s`."""
    f = Function(name, [("ptr", p) for p in "vs"], linkage="internal")
    size = plan.channel_blocks * VECTOR_BYTES

    def unit(i: Value) -> None:
        out = f.at("%s", f.int_op("add", f.int_op("mul", i, size), plan.area("values")))
        if plan.dtype == "bfloat16":
            _pair_of_rows(f, plan, (f.at("%v", f.int_op("mul", i, 2 * pixel)), pixel), out)
            return
        if not plan.int8:
            row = f.at("%v", f.int_op("mul", i, pixel))
            for at in range(0, size, VECTOR_BYTES):
                f.store(F32S, f.load(F32S, row, at), out, at)
            return
        part, quad = f.int_op("and", i, GROUP - 1), f.int_op("and", i, LANES - GROUP)
        first = f.int_op("mul", f.int_op("and", i, -LANES), GROUP)
        first = f.int_op("add", f.int_op("add", first, quad), f.int_op("mul", part, LANES))
        rows = [_row(f, plan, "%v", first, key, pixel) for key in range(GROUP)]
        for block in range(plan.channel_blocks):
            joined = interleaved(f, [f.load(BYTES16, row, block * LANES) for row in rows])
            value = f.let(f"xor {I32S} {joined}, {_SIGN_BITS}")
            f.store(I32S, value, out, block * VECTOR_BYTES)

    if plan.dtype != "bfloat16":
        f.repeat(0, length(f, plan, "value_units"), unit)
        return f
    count = length(f, plan, "k_len")
    pairs, odd = f.int_op("udiv", count, 2), f.int_op("urem", count, 2)
    f.repeat(0, pairs, unit)

    def alone(_: Value) -> None:
        last = f.at("%v", f.int_op("mul", pairs, 2 * pixel))
        at = f.int_op("add", f.int_op("mul", pairs, size), plan.area("values"))
        _pair_of_rows(f, plan, (last, 0), f.at("%s", at))

    f.repeat(0, odd, alone)
    return f


def _pair_of_rows(f: Function, plan: Plan, rows: tuple[Value, int], out: Value) -> None:
    """np.stack(rows, axis=1) of two rows of bfloat16: lanes of 2 keys.

    Args:
        f: the function.
        plan: sizes.
        rows: pointer to the first, and the distance to the second; zeros stand for it if that is 0.
        out: where they go.
    """
    first, pixel = rows
    picks = ", ".join(f"i32 {i // 2 + LANES * (i % 2)}" for i in range(2 * LANES))
    for block in range(plan.channel_blocks):
        a = f.load(WORDS16, first, 2 * LANES * block)
        b = f.load(WORDS16, first, pixel + 2 * LANES * block) if pixel else "zeroinitializer"
        both = f.let(f"shufflevector {WORDS16} {a}, {WORDS16} {b}, <32 x i32> <{picks}>")
        f.store("<32 x i16>", both, out, block * VECTOR_BYTES)


def interleaved(f: Function, rows: Sequence[Value]) -> Value:
    """np.stack(rows, axis=1) of four <16 x i8>, as 16 lanes of 4 bytes."""
    a, b, c, d = rows
    picks = ", ".join(f"i32 {i // 2 + 16 * (i % 2)}" for i in range(32))
    first, second = (
        f.let(f"shufflevector {BYTES16} {x}, {BYTES16} {y}, <32 x i32> <{picks}>")
        for x, y in ((a, b), (c, d))
    )
    pairs = [f.let(f"bitcast <32 x i8> {x} to <16 x i16>") for x in (first, second)]
    both = f.let(
        f"shufflevector <16 x i16> {pairs[0]}, <16 x i16> {pairs[1]}, <32 x i32> <{picks}>"
    )
    return f.let(f"bitcast <32 x i16> {both} to {I32S}")


def emit_key_mask(f: Function, plan: Plan, mask: Value, scratch: Value) -> None:
    """Writes the area "mask", with -inf for the keys that pad the last block."""
    if plan.open_keys:
        _emit_open_mask(f, plan, mask, scratch)
        return
    full, rest = divmod(plan.k_len, LANES)

    def block(i: Value | int, lanes: Value = "") -> None:
        at = f.int_op("mul", i, VECTOR_BYTES)
        scaled = emit_mask(f, plan, load16(f, F32S, mask, at, lanes))
        out = f.int_op("add", at, plan.area("mask"))
        f.store(F32S, keep(f, scaled, lanes, MINUS_INFINITY), scratch, out)

    f.repeat(0, full, block)
    if rest:
        block(full, first_lanes(rest))


def _emit_open_mask(f: Function, plan: Plan, mask: Value, scratch: Value) -> None:
    """The same for an open number of keys; where there is no mask of keys, as for one of zeros."""
    lengths = plan.area("lengths")
    count, blocks = (f.load("i64", scratch, lengths + at, 8) for at in (0, 16))

    def block(i: Value) -> None:
        at = f.int_op("mul", i, VECTOR_BYTES)
        lanes = lanes_below(f, f.int_op("sub", count, f.int_op("mul", i, LANES)))
        value = constant16(MIDDLE) if plan.int8 else "zeroinitializer"
        if plan.mask == "keys":
            value = emit_mask(f, plan, load16(f, F32S, mask, at, lanes))
        out = f.int_op("add", at, plan.area("mask"))
        f.store(F32S, keep(f, value, lanes, MINUS_INFINITY), scratch, out)

    f.repeat(0, blocks, block)


def emit_mask(f: Function, plan: Plan, mask: Value) -> Value:
    """The mask as an exponent of 2; in int8 `core.attention.mask_steps`."""
    finite = f.let(f"fcmp one {F32S} {mask}, {MINUS_INFINITY}")
    if not plan.int8:
        scaled = f.let(f"fmul {F32S} {mask}, {constant16(LOG2_E)}")
        return keep(f, greater16(f, scaled, constant16(float(LOWEST))), finite, MINUS_INFINITY)
    scaled = f.let(f"fmul {F32S} {mask}, {constant16(LOG2_E * OCTAVE)}")
    low, high = constant16(-MASK_STEPS), constant16(MASK_STEPS)
    scaled = greater16(f, scaled, low)
    below = f.let(f"fcmp olt {F32S} {scaled}, {high}")
    scaled = f.let(f"select <16 x i1> {below}, {F32S} {scaled}, {F32S} {high}")
    return keep(f, add16(f, scaled, constant16(MIDDLE)), finite, MINUS_INFINITY)

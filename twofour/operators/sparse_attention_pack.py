"""Sparse attention, the first stage: keys, values and the mask of keys, as the products read them.

A piece is one block of 16 keys of one head. Heads of a token are neighbours in memory, so pieces go
head by head within a block. What pads the last block is packed from the last key: no list has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from twofour.core.attention import MIDDLE
from twofour.kernels.cpu.attention_pack import (
    MINUS_INFINITY,
    as_int8,
    interleaved,
    transposed,
)
from twofour.kernels.cpu.attention_plan import VECTOR_BYTES
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.rows import constant16, first_lanes, keep, load16, to_bfloats
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, WORDS16, Vector, every
from twofour.operators.sparse_attention_plan import Operand, Plan

SIGN_BITS = every("i32", -0x7F7F7F80)
"""0x80808080: stored bytes to int8 and back."""


def emit_pack(f: Function, plan: Plan, pointers: dict[str, Value]) -> None:
    """Writes the kernel of the stage.

    Args:
        f: the kernel.
        plan: sizes.
        pointers: of "k", "v", "keep" if there is one, and "workspace".
    """

    def piece(t: Value) -> None:
        head, rest = f.int_op("urem", t, plan.heads), f.int_op("udiv", t, plan.heads)
        block, image = f.int_op("urem", rest, plan.blocks), f.int_op("udiv", rest, plan.blocks)
        first = f.int_op("mul", block, LANES)
        number = f.int_op("add", f.int_op("mul", image, plan.heads), head)
        out = f.at(pointers["workspace"], f.int_op("mul", number, plan.head_bytes))

        def rows(name: str, operand: Operand) -> list[Value]:
            base = f.at(pointers[name], f.int_op("mul", image, operand.image))
            base = f.at(base, f.int_op("mul", head, plan.head_width))
            return [_row(f, plan, base, (first, lane), operand.pixel) for lane in range(LANES)]

        _keys(f, plan, rows("k", plan.k), out, block)
        to = f.at(f.at(out, f.int_op("mul", block, plan.value_bytes)), plan.values_at)
        _values(f, plan, rows("v", plan.v), to)
        if plan.masked:
            at = f.int_op("add", f.int_op("mul", image, plan.blocks), block)
            to = f.at(f.at(pointers["workspace"], plan.keep_at), f.int_op("mul", at, VECTOR_BYTES))
            base = f.at(pointers["keep"], f.int_op("mul", image, plan.keep.image))
            f.when(f.let(f"icmp eq i64 {head}, 0"), lambda: _mask(f, plan, base, first, to))

    f.repeat("%t0", "%t1", piece)


def load_units(f: Function, plan: Plan, row: Value, first: int, offset: int = 0) -> Value:
    """16 units of a row's channels, zeros behind the last one, <16 x i32>.

    Args:
        f: the function.
        plan: sizes.
        row: pointer to the row's first channel.
        first: unit.
        offset: bytes from `row`.
    """
    lanes = first_lanes(plan.score_units - first)
    if not plan.rounds:
        value = load16(f, F32S, row, offset + 4 * first, lanes)
        return f.let(f"bitcast {F32S} {value} to {I32S}")
    halves = []
    for channel in (2 * first, 2 * first + LANES):
        lanes = first_lanes(max(plan.d - channel, 0))
        halves.append(to_bfloats(f, load16(f, F32S, row, offset + 4 * channel, lanes)))
    return _joined(f, halves, range(2 * LANES))


def _joined(f: Function, halves: Sequence[Value], order: Sequence[int]) -> Value:
    """np.concatenate(halves)[order] of two <16 x i16>, as <16 x i32>."""
    picks = ", ".join(f"i32 {i}" for i in order)
    a, b = halves
    both = f.let(f"shufflevector {WORDS16} {a}, {WORDS16} {b}, <32 x i32> <{picks}>")
    return f.let(f"bitcast <32 x i16> {both} to {I32S}")


def _row(f: Function, plan: Plan, base: Value, where: tuple[Value, int], pixel: int) -> Value:
    """Pointer to row first + lane, the last one where that is beyond it."""
    first, lane = where
    row = f.int_op("add", first, lane)
    if plan.length % LANES:
        row = f.call("i64", "llvm.umin.i64", ("i64", row), ("i64", str(plan.length - 1)))
    return f.at(base, f.int_op("mul", row, pixel))


def _keys(f: Function, plan: Plan, rows: list[Value], out: Value, block: Value) -> None:
    """One block of keys, transposed."""
    v = Vector(plan.isa, f)
    to = f.at(out, f.int_op("mul", block, plan.key_bytes))
    sums = "zeroinitializer"
    for first in range(0, plan.score_units, LANES):
        units = min(LANES, plan.score_units - first)
        vectors = transposed(f, [load_units(f, plan, row, first) for row in rows])[:units]
        if plan.int8 and not plan.k.biased:  # as they will be taken back
            vectors = [f.let(f"xor {I32S} {one}, {SIGN_BITS}") for one in vectors]
        if plan.int8:
            vectors, sums = as_int8(v, vectors, sums, 0)
        for j, vector in enumerate(vectors):
            f.store(I32S, vector, to, (first + j) * VECTOR_BYTES, VECTOR_BYTES)
    if plan.int8:
        zero = f.int_op("sub", 0, f.load("i32", "%w", 32, 4), "i32")
        start = f.let(f"mul {I32S} {sums}, {f.splat('i32', zero)}")
        f.store(I32S, start, f.at(out, f.int_op("mul", block, VECTOR_BYTES)), plan.starts_at)


def _values(f: Function, plan: Plan, rows: Sequence[Value], out: Value) -> None:
    """One block of values: units of 1, 2 or 4 neighbouring keys."""
    each = 4 // plan.size
    for unit in range(plan.value_units):
        some = rows[unit * each : (unit + 1) * each]
        for block in range(plan.channel_blocks):
            lanes = first_lanes(plan.d - LANES * block)
            at = (unit * plan.channel_blocks + block) * VECTOR_BYTES
            if plan.dtype == "float32":
                f.store(F32S, load16(f, F32S, some[0], block * VECTOR_BYTES, lanes), out, at)
            elif plan.dtype == "bfloat16":
                pair = [_words(f, plan, row, block, lanes) for row in some]
                order = [i // 2 + LANES * (i % 2) for i in range(2 * LANES)]
                f.store(I32S, _joined(f, pair, order), out, at)
            else:
                joined = interleaved(
                    f, [load16(f, BYTES16, row, LANES * block, lanes) for row in some]
                )
                if plan.v.biased:
                    joined = f.let(f"xor {I32S} {joined}, {SIGN_BITS}")
                f.store(I32S, joined, out, at)


def _words(f: Function, plan: Plan, row: Value, block: int, lanes: Value) -> Value:
    """16 channels as bfloat16."""
    if not plan.rounds:
        return load16(f, WORDS16, row, 2 * LANES * block, lanes)
    return to_bfloats(f, load16(f, F32S, row, 4 * LANES * block, lanes))


def _mask(f: Function, plan: Plan, base: Value, first: Value, out: Value) -> None:
    """One block of the mask of keys: 0 where a key is seen, in int8 `MIDDLE`, else -inf."""
    zero = constant16(MIDDLE) if plan.int8 else "zeroinitializer"
    bits = "zeroinitializer"
    for lane in range(LANES):
        byte = f.load("i8", _row(f, plan, base, (first, lane), plan.keep.pixel))
        bits = f.let(f"insertelement {BYTES16} {bits}, i8 {byte}, i32 {lane}")
    seen = f.let(f"icmp ne {BYTES16} {bits}, zeroinitializer")
    f.store(F32S, keep(f, zero, seen, MINUS_INFINITY), out)

"""Sparse attention, the second stage: the products, for the keys of each tile's list alone.

    for each piece of t0..t1: for each of its tiles of queries:
        queries into the scratch memory
        for chunk of its list:
            scores = queries * keys, scaled; those of keys that are not seen become -inf
        p = 2 ** (scores - maximum), and their sum
        y = sum over the list of p * values, / sum

All pieces of a head follow each other. A list of the usual length stays in the first cache, so a
row's exponentials need no running maximum: the result is that of dense attention up to the order of
sums, and in int8 to the last bit (core/attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.kernels.cpu.attention_plan import VECTOR_BYTES
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import ELEMENT_BYTES
from twofour.operators.sparse_attention_lists import RECORD
from twofour.operators.sparse_attention_plan import Plan
from twofour.operators.sparse_attention_results import emit_results
from twofour.operators.sparse_attention_scores import emit_powers, emit_queries, emit_scores


@dataclass(frozen=True)
class Tables:
    """Bytes from the constants to each of the tables of `Lists`."""

    tiles: int
    entries: int
    masks: int
    bounds: int
    pieces: int


def emit_tiles(
    f: Function, plan: Plan, pointers: dict[str, Value], tables: Tables
) -> list[Function]:
    """Writes the kernel of the stage; returns the functions it calls.

    Args:
        f: the kernel.
        plan: sizes.
        pointers: of "q", "y" and "workspace".
        tables: where the lists lie.
    """
    parts = {
        "queries": emit_queries(f"{f.name}_queries", plan),
        "scores": emit_scores(f"{f.name}_scores", plan),
        "powers": emit_powers(f"{f.name}_powers", plan),
        "results": emit_results(f"{f.name}_results", plan),
    }
    scratch = f.let(f"alloca [{plan.scratch_bytes} x i8], align 64")

    def call(part: str, *arguments: Value) -> None:
        pairs = zip(parts[part].args, arguments, strict=True)
        values = ", ".join(f"{kind} {value}" for (kind, _), value in pairs)
        f.do(f"call void @{parts[part].name}({values})")

    def number(pointer: Value, offset: int) -> Value:
        return f.let(f"sext i32 {f.load('i32', pointer, offset, 4)} to i64")

    def piece(t: Value) -> None:
        part, rest = f.int_op("urem", t, tables.pieces), f.int_op("udiv", t, tables.pieces)
        head, image = f.int_op("urem", rest, plan.heads), f.int_op("udiv", rest, plan.heads)
        packed = f.at(pointers["workspace"], f.int_op("mul", rest, plan.head_bytes))
        values = f.at(packed, plan.values_at)
        mask = f.at(pointers["workspace"], plan.keep_at)
        mask = f.at(mask, f.int_op("mul", image, plan.blocks * VECTOR_BYTES))
        q = f.at(pointers["q"], f.int_op("mul", image, plan.q.image))
        q = f.at(q, f.int_op("mul", head, plan.head_width))
        y = f.at(pointers["y"], f.int_op("mul", image, plan.y.image))
        y = f.at(y, f.int_op("mul", head, plan.d * ELEMENT_BYTES[plan.out]))
        bounds = f.at(f.at("%w", tables.bounds), f.int_op("mul", part, 4))

        def tile(i: Value) -> None:
            record = f.at(f.at("%w", tables.tiles), f.int_op("mul", i, 4 * RECORD))
            first, at, whole, chunks, masks = (number(record, 4 * n) for n in range(5))
            list_ = f.at(f.at("%w", tables.entries), f.int_op("mul", at, 4))
            words = f.at(f.at("%w", tables.masks), f.int_op("mul", masks, 2))
            blocks = f.int_op("mul", chunks, plan.tile.keys)
            call("queries", f.at(q, f.int_op("mul", first, plan.q.pixel)), scratch, "%w")
            call("scores", scratch, packed, mask, list_, words, "%w", whole, chunks)
            call("powers", scratch, blocks)
            there = f.at(y, f.int_op("mul", first, plan.y.pixel))
            call("results", scratch, values, list_, there, "%w", blocks)

        f.repeat(number(bounds, 0), number(bounds, 4), tile)

    f.repeat("%t0", "%t1", piece)
    return list(parts.values())

"""The exponentials of int8 attention: scores become bytes.

    `core.attention.exponential_bytes`, 64 keys of a query at a time:

    4 x psubd               x = top - score                        16 int32
    2 x packssdw            at most 32767                          2 x 16 int32 -> 32 int16
        psllw, psrlw        its fraction and its whole part
        2 x pmulhuw, psubw  2**-fraction
        psrlvw, paddw, psrlw  halved that often, rounded
    1 x packuswb            at most 255                            2 x 32 int16 -> 64 uint8

Scores are floats, read as integers; the area "tops" holds a query's highest one plus `AHEAD`. The
distance of a negative score overflows, which packing makes -32768; by 16 bits and more psrlvw
shifts everything out. Packing works within quarters of a vector, hence the order of the keys in
attention_plan.py. Elsewhere the same numbers are computed in plain vector IR.
"""

from __future__ import annotations

from collections.abc import Sequence

from twofour.core.attention import FARTHEST, HALVING, OCTAVE
from twofour.kernels.cpu.attention_lengths import length
from twofour.kernels.cpu.attention_plan import GROUP, VECTOR_BYTES, Plan
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.vector import BYTES16, BYTES64, I32S, WORDS16, WORDS32, every


def emit_bytes(name: str, plan: Plan) -> Function:
    """The function (s, c) for all scores at `c`; `s` is the scratch memory."""
    f = Function(name, [("ptr", p) for p in "sc"], linkage="internal")
    groups_of_bytes(f, plan, 0)
    return f


def groups_of_bytes(f: Function, plan: Plan, first: int) -> None:
    """The groups of scores from `first` on become bytes in the area "steps"."""
    rows = range(plan.queries)
    tops = [f.splat("i32", f.load("i32", "%s", plan.area("tops") + 4 * row, 4)) for row in rows]

    def group(i: Value | int, blocks: int = GROUP) -> None:
        here = f.at("%c", f.int_op("mul", i, GROUP * VECTOR_BYTES))
        out = f.at("%s", f.int_op("mul", i, VECTOR_BYTES))
        for row in rows:
            places = [row * plan.row_bytes + block * VECTOR_BYTES for block in range(blocks)]
            scores = [f.load(I32S, here, place) for place in places]
            bytes_ = scores_to_bytes(f, plan, tops[row], scores)
            f.store(I32S, bytes_, out, plan.area("steps") + row * plan.step_bytes)

    whole = length(f, plan, "groups") if plan.open_keys else plan.blocks // GROUP
    f.repeat(first, whole, group)
    if not plan.open_keys and plan.blocks % GROUP:
        group(plan.blocks // GROUP, plan.blocks % GROUP)


def one_group(f: Function, plan: Plan, row: Value, group: Value) -> None:
    """One group of one query's scores, everything from memory: work beside a product."""
    here = f.int_op("mul", row, plan.row_bytes)
    here = f.at("%c", f.int_op("add", here, f.int_op("mul", group, GROUP * VECTOR_BYTES)))
    place = f.at("%s", f.int_op("mul", row, 4))
    top = f.splat("i32", f.load("i32", place, plan.area("tops"), 4))
    scores = [f.load(I32S, here, block * VECTOR_BYTES) for block in range(GROUP)]
    out = f.int_op("mul", row, plan.step_bytes)
    out = f.at("%s", f.int_op("add", out, f.int_op("mul", group, VECTOR_BYTES)))
    f.store(I32S, scores_to_bytes(f, plan, top, scores), out, plan.area("steps"))


def scores_to_bytes(f: Function, plan: Plan, top: Value, scores: Sequence[Value]) -> Value:
    """Up to 4 vectors of scores as 64 bytes, 0 for what is missing, in the order of steps."""
    distances = [f.let(f"sub {I32S} {top}, {score}") for score in scores]
    if plan.isa == "avx512vnni":
        return _packed(f, distances)
    blocks = [_block(f, distance) for distance in distances]
    blocks += ["zeroinitializer"] * (GROUP - len(blocks))
    pairs = [
        _joined(f, BYTES16, "<32 x i8>", blocks[at : at + 2], range(2 * LANES)) for at in (0, 2)
    ]
    four = range(GROUP)
    order = [LANES * b + GROUP * quarter + i for quarter in four for b in four for i in four]
    joined = _joined(f, "<32 x i8>", BYTES64, pairs, order)
    return f.let(f"bitcast {BYTES64} {joined} to {I32S}")


def _joined(
    f: Function, kind: str, result: str, pair: Sequence[Value], order: Sequence[int]
) -> Value:
    """np.concatenate(pair)[order]."""
    picks = ", ".join(f"i32 {index}" for index in order)
    a, b = pair
    return f.let(f"shufflevector {kind} {a}, {kind} {b}, <{len(order)} x i32> <{picks}>")


def _packed(f: Function, distances: Sequence[Value]) -> Value:
    """Bytes of up to 4 vectors of top - score, on AVX-512."""
    x = [*distances, *[every("i32", FARTHEST)] * (GROUP - len(distances))]
    words = []
    for pair in (x[:2], x[2:]):
        arguments = [(I32S, one) for one in pair]
        packed = f.call(WORDS32, "llvm.x86.avx512.packssdw.512", *arguments)
        words.append((WORDS32, _exponentials(f, packed, 2 * LANES)))
    packed = f.call(BYTES64, "llvm.x86.avx512.packuswb.512", *words)
    return f.let(f"bitcast {BYTES64} {packed} to {I32S}")


def _block(f: Function, distance: Value) -> Value:
    """Sixteen bytes of top - score."""
    x = f.call(I32S, "llvm.umin.v16i32", (I32S, distance), (I32S, every("i32", FARTHEST)))
    value = _exponentials(f, f.let(f"trunc {I32S} {x} to {WORDS16}"), LANES)
    least = f.call(WORDS16, "llvm.umin.v16i16", (WORDS16, value), (WORDS16, every("i16", 255)))
    return f.let(f"trunc {WORDS16} {least} to {BYTES16}")


def _exponentials(f: Function, x: Value, lanes: int) -> Value:
    """The words that `core.attention.exponential_bytes` then limits to 255; 0 for x = -32768."""
    words, (a, b, c) = f"<{lanes} x i16>", (every("i16", number, lanes) for number in HALVING)
    bits = OCTAVE.bit_length() - 1
    fraction = f.let(f"shl {words} {x}, {every('i16', 16 - bits, lanes)}")
    slope = f.let(f"sub {words} {b}, {_high(f, fraction, c, lanes)}")
    value = f.let(f"sub {words} {a}, {_high(f, fraction, slope, lanes)}")
    whole = f.let(f"lshr {words} {x}, {every('i16', bits, lanes)}")
    if lanes == 2 * LANES:  # a shift by 16 gives 0
        value = f.call(words, "llvm.x86.avx512.psrlv.w.512", (words, value), (words, whole))
    else:
        value = f.let(f"lshr {words} {value}, {whole}")
    value = f.let(f"add {words} {value}, {every('i16', 1, lanes)}")
    return f.let(f"lshr {words} {value}, {every('i16', 1, lanes)}")


def _high(f: Function, a: Value, b: Value, lanes: int) -> Value:
    """(a * b) >> 16 of words without sign: one instruction."""
    words, wide = f"<{lanes} x i16>", f"<{lanes} x i32>"
    a, b = (f.let(f"zext {words} {one} to {wide}") for one in (a, b))
    product = f.let(f"mul {wide} {a}, {b}")
    high = f.let(f"lshr {wide} {product}, {every('i32', 16, lanes)}")
    return f.let(f"trunc {wide} {high} to {words}")

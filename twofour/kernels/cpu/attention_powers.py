"""The exponentials of float attention: scores become p = 2 ** (score - maximum), in place.

The maxima lie in the area "tops", sums by lane in the area "sums", one vector a query. A block at a
time, all queries side by side, so that their chains of operations overlap.
"""

from __future__ import annotations

from twofour.core.approximations import EXP2, EXP2_SHORT, ROUND127
from twofour.kernels.cpu.attention_lengths import length
from twofour.kernels.cpu.attention_plan import VECTOR_BYTES, Plan
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.rows import add16, constant16, greater16
from twofour.kernels.cpu.vector import F32S, I32S, Vector, every

_LOW = -125.0  # smallest exponent: with a factor of 0.7 before it the result is a normal number


def emit_powers(name: str, plan: Plan) -> Function:
    """The function (s, c) for all scores at `c`; `s` is the scratch memory."""
    f = Function(name, [("ptr", "s"), ("ptr", "c")], linkage="internal")
    clear_sums(f, plan)
    blocks_of_powers(f, plan, 0)
    return f


def clear_sums(f: Function, plan: Plan) -> None:
    """Sums begin with 0."""
    for row in range(plan.queries):
        f.store(F32S, "zeroinitializer", "%s", plan.area("sums") + row * VECTOR_BYTES)


def blocks_of_powers(f: Function, plan: Plan, first: int) -> None:
    """The blocks of scores from `first` on; their sums are added to the area "sums"."""
    rows = range(plan.queries)
    places = [plan.area("sums") + row * VECTOR_BYTES for row in rows]
    tops = [f.load(F32S, "%s", plan.area("tops") + row * VECTOR_BYTES) for row in rows]

    def block(i: Value, sums: list[Value]) -> list[Value]:
        here, out = f.at("%c", f.int_op("mul", i, VECTOR_BYTES)), []
        for row in rows:
            score = f.load(F32S, here, row * plan.row_bytes)
            power = power_of_two(f, plan, f.let(f"fsub {F32S} {score}, {tops[row]}"))
            f.store(F32S, power, here, row * plan.row_bytes)
            out.append(add16(f, sums[row], power))
        return out

    starts = [(F32S, f.load(F32S, "%s", place)) for place in places]
    count = length(f, plan, "blocks")
    for place, total in zip(places, f.loop(first, count, starts, block), strict=True):
        f.store(F32S, total, "%s", place)


def one_power(f: Function, plan: Plan, row: Value, block: Value) -> None:
    """One block of one query's scores, everything from memory: work beside a product."""
    here = f.int_op("mul", row, plan.row_bytes)
    here = f.at("%c", f.int_op("add", here, f.int_op("mul", block, VECTOR_BYTES)))
    vector = f.int_op("mul", row, VECTOR_BYTES)
    top = f.load(F32S, "%s", f.int_op("add", vector, plan.area("tops")))
    power = power_of_two(f, plan, f.let(f"fsub {F32S} {f.load(F32S, here)}, {top}"))
    f.store(F32S, power, here)
    place = f.at("%s", f.int_op("add", vector, plan.area("sums")))
    f.store(F32S, add16(f, f.load(F32S, place), power), place)


def power_of_two(f: Function, plan: Plan, x: Value) -> Value:
    """2**x with fused multiply-adds, the short polynomial where it is rounded; NaN stays NaN."""
    v, coefficients = Vector(plan.isa, f), EXP2_SHORT if plan.rounds else EXP2
    x = greater16(f, constant16(_LOW), x)
    shifted = add16(f, x, constant16(ROUND127))
    whole = f.let(f"fsub {F32S} {shifted}, {constant16(ROUND127)}")
    fraction = f.let(f"fsub {F32S} {x}, {whole}")
    value = constant16(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = v.fma(constant16(coefficient), value, fraction)
    bits = f.let(f"bitcast {F32S} {shifted} to {I32S}")
    exponent = f.let(f"shl {I32S} {bits}, {every('i32', 23)}")
    return f.let(f"fmul {F32S} {value}, {f.let(f'bitcast {I32S} {exponent} to {F32S}')}")

"""Small operators on whole rows: a softmax, and the expectation of one.

    softmax(x) = exp(x - max(x)) / sum(exp(x - max(x)))
    expect(x)  = sum(softmax(x) * w) + bias, which needs no row of results

A row whose elements lie side by side, 16 or a multiple of that, is walked in vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twofour.kernels.cpu.functions import emit_exp
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.nd_scalar import extreme
from twofour.kernels.cpu.vector import F32S, LANES, every, float_bits

Number = int | Value
Steps = tuple[Number, Number]
_LOWEST, _NONE = float_bits(float("-inf")), float_bits(0.0)
_MOST_UNROLLED = 4


def _softmax(
    f: Function, at: Sequence[Value], steps: Steps, count: Number, _: Sequence[float]
) -> None:
    """One softmax."""
    if steps == (4, 4) and isinstance(count, int) and count % LANES == 0:
        _softmax_in_vectors(f, at, count)
        return

    def power(i: Value, total: list[Value]) -> list[Value]:
        value = _power(f, _place(f, at[0], steps[0], i), highest)
        f.store("float", value, _place(f, at[1], steps[1], i))
        return [f.let(f"fadd reassoc float {total[0]}, {value}")]

    def share(i: Value) -> None:
        here = _place(f, at[1], steps[1], i)
        f.store("float", f.let(f"fdiv float {f.load('float', here)}, {total}"), here)

    highest = _highest(f, at[0], steps[0], count)
    (total,) = f.loop(0, count, [("float", _NONE)], power)
    f.repeat(0, count, share)


def _expect(
    f: Function, at: Sequence[Value], steps: Steps, count: Number, scalars: Sequence[float]
) -> None:
    """One expectation; `scalars` are the weights and what is added."""
    *weights, bias = scalars
    if steps[0] == 4 and len(weights) in range(LANES, _MOST_UNROLLED * LANES + 1, LANES):
        total, product = _in_vectors(f, at[0], weights)
    else:
        table = f.constant("float", [float_bits(weight) for weight in weights])
        highest = _highest(f, at[0], steps[0], count)

        def turn(i: Value, so_far: list[Value]) -> list[Value]:
            value = _power(f, _place(f, at[0], steps[0], i), highest)
            weight = f.load("float", _place(f, table, 4, i))
            weighed = f.let(f"fmul float {value}, {weight}")
            pairs = zip(so_far, (value, weighed), strict=True)
            return [f.let(f"fadd reassoc float {a}, {b}") for a, b in pairs]

        total, product = f.loop(0, count, [("float", _NONE)] * 2, turn)
    mean = f.let(f"fdiv float {product}, {total}")
    f.store("float", f.let(f"fadd float {mean}, {float_bits(bias)}") if bias else mean, at[1])


ROWS: dict[str, Callable[[Function, Sequence[Value], Steps, Number, Sequence[float]], None]] = {
    "softmax": _softmax,
    "expect": _expect,
}
"""Operators whose last axis is a row: (function, pointers to x and y, steps, elements, scalars)."""


def _place(f: Function, pointer: Value, step: Number, i: Value) -> Value:
    return f.at(pointer, f.int_op("mul", i, step))


def _highest(f: Function, x: Value, step: Number, count: Number) -> Value:
    """The largest element; NaN if one is."""

    def turn(i: Value, best: list[Value]) -> list[Value]:
        return [extreme(f, "max", f.load("float", _place(f, x, step, i)), best[0])]

    return f.loop(0, count, [("float", _LOWEST)], turn)[0]


def _power(f: Function, place: Value, highest: Value) -> Value:
    """exp(x - max(x))."""
    return emit_exp(f, f.let(f"fsub float {f.load('float', place)}, {highest}"), lanes=1)


def _in_vectors(f: Function, x: Value, weights: Sequence[float]) -> tuple[Value, Value]:
    """sum(exp(x - max(x))), and that of the products with the weights."""
    rows = [f.load(F32S, x, 4 * first) for first in range(0, len(weights), LANES)]
    highest = rows[0]
    for row in rows[1:]:
        highest = _larger(f, highest, row)
    highest = _highest_lane(f, highest)
    total = product = ""
    for index, row in enumerate(rows):
        power = emit_exp(f, f.let(f"fsub {F32S} {row}, {highest}"))
        own = weights[index * LANES : (index + 1) * LANES]
        factors = "<" + ", ".join(f"float {float_bits(weight)}" for weight in own) + ">"
        weighed = f.let(f"fmul {F32S} {power}, {factors}")
        total = f.let(f"fadd {F32S} {total}, {power}") if total else power
        product = f.let(f"fadd {F32S} {product}, {weighed}") if product else weighed
    return _sum(f, total), _sum(f, product)


def _softmax_in_vectors(f: Function, at: Sequence[Value], count: int) -> None:
    """One softmax of elements that lie side by side."""
    size = count * 4

    def highest(i: Value, best: list[Value]) -> list[Value]:
        return [_larger(f, f.load(F32S, f.at(at[0], i)), best[0])]

    def power(i: Value, total: list[Value]) -> list[Value]:
        row = f.load(F32S, f.at(at[0], i))
        value = emit_exp(f, f.let(f"fsub {F32S} {row}, {most}"))
        f.store(F32S, value, f.at(at[1], i))
        return [f.let(f"fadd {F32S} {total[0]}, {value}")]

    def share(i: Value, _: list[Value]) -> list[Value]:
        here = f.at(at[1], i)
        f.store(F32S, f.let(f"fdiv {F32S} {f.load(F32S, here)}, {sums}"), here)
        return []

    lowest = every("float", _LOWEST)
    (found,) = f.loop(0, size, [(F32S, lowest)], highest, step=64)
    most = _highest_lane(f, found)
    (total,) = f.loop(0, size, [(F32S, every("float", _NONE))], power, step=64)
    sums = f.splat("float", _sum(f, total))
    f.loop(0, size, [], share, step=64)


def _highest_lane(f: Function, value: Value) -> Value:
    """The largest lane in every lane."""
    for width in (8, 4, 2, 1):
        value = _larger(f, value, _turned(f, value, width))
    return value


def _larger(f: Function, a: Value, b: Value) -> Value:
    """np.where(a > b, a, b); a NaN that gets lost here is one of the powers again."""
    flags = f.let(f"fcmp ogt {F32S} {a}, {b}")
    return f.let(f"select <{LANES} x i1> {flags}, {F32S} {a}, {F32S} {b}")


def _turned(f: Function, value: Value, by: int) -> Value:
    """The lanes, each `by` lanes on."""
    lanes = ", ".join(f"i32 {(lane + by) % LANES}" for lane in range(LANES))
    return f.let(f"shufflevector {F32S} {value}, {F32S} poison, <{LANES} x i32> <{lanes}>")


def _sum(f: Function, value: Value) -> Value:
    """Of the lanes, in any order."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    f.declares.add(f"declare float @{name}(float, {F32S})")
    return f.let(f"call reassoc float @{name}(float {_NONE}, {F32S} {value})")

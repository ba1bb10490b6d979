"""What small operators do with one element, each beside its numpy meaning.

Elements are loaded as logical values: `s8` is int8 as the arena stores it, plus 128, and reads as
int8; bool is a byte, 0 or 1. Floats are rounded after each operation, none is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.nd_functions import FUNCTIONS, PARAMETRIC, emit_prelu
from twofour.kernels.cpu.vector import float_bits

BYTES = {
    **{"float32": 4, "int64": 8, "int32": 4, "bool": 1, "uint8": 1, "int8": 1, "s8": 1},
    "bfloat16": 2,
}
"""Bytes of an element by kind: a numpy dtype, or "s8" for int8 stored plus 128.

Those of bfloat16 are only copied.
"""

NUMBERS = ("float32", "int64", "int32")
"""Kinds that arithmetic takes."""

_TYPES = {"float32": "float", "int64": "i64", "int32": "i32", "bfloat16": "i16"}
_UNSIGNED = ("bool", "uint8")

Typed = tuple[Value, str]


@dataclass(frozen=True)
class Expression:
    """One operation of a chain on each element.

    Attributes:
        op: as `element` knows it.
        args: what it is of: inputs in order, then the results of the operations before.
        kind: of its result.
        scalars: constants of the operation.
    """

    op: str
    args: tuple[int, ...]
    kind: str
    scalars: tuple[float, ...] = ()


def load(f: Function, pointer: Value, kind: str) -> Value:
    """The logical value of an element."""
    value = f.load(_type(kind), pointer)
    return f.let(f"xor i8 {value}, -128") if kind == "s8" else value


def store(f: Function, value: Value, pointer: Value, kind: str) -> None:
    """The inverse of `load`."""
    if kind == "s8":
        value = f.let(f"xor i8 {value}, -128")
    f.store(_type(kind), value, pointer)


def fill_value(kind: str, value: float) -> Value:
    """A constant as LLVM writes it."""
    return float_bits(value) if kind == "float32" else str(int(value))


def element(
    f: Function, op: str, values: Sequence[Typed], to: str, scalars: Sequence[float] = ()
) -> Value:
    """One element of y, of kind `to`.

    Args:
        f: the kernel.
        op: "copy", "cast", "where", or a key of the tables below.
        values: operands with their kinds.
        to: kind of the result.
        scalars: of a parametric operation.
    """
    value, kind = values[0]
    if op == "copy":
        return value
    if op == "cast":
        return _cast(f, value, kind, to)
    if op == "where":
        (yes, of), (no, _) = values[1:]
        return f.let(f"select i1 {_truth(f, value)}, {_type(of)} {yes}, {_type(of)} {no}")
    if op in COMPARISONS:
        return _compared(f, op, value, values[1][0], kind)
    if op in LOGIC:
        return f.let(f"{op} i8 {value}, {values[1][0] if len(values) > 1 else 1}")
    if op in UNARY:
        return UNARY[op](f, value, kind)
    if op in FUNCTIONS:
        return FUNCTIONS[op](f, value)
    if op in _PARAMETRIC:
        return _PARAMETRIC[op](f, value, kind, scalars)
    for other, _ in values[1:]:
        value = BINARY[op](f, value, other, kind)
    return value


def _type(kind: str) -> str:
    return _TYPES.get(kind, "i8")


def _arithmetic(op: str) -> Callable[[Function, Value, Value, str], Value]:
    """`op` on floats or, with wrap-around, on integers."""

    def emit(f: Function, a: Value, b: Value, kind: str) -> Value:
        return f.let(f"{'f' if kind == 'float32' else ''}{op} {_type(kind)} {a}, {b}")

    return emit


def _divided(f: Function, a: Value, b: Value, kind: str) -> Value:
    """Division; integers towards zero, and 0 over a divisor 0, where C would stop the process."""
    if kind == "float32":
        return f.let(f"fdiv float {a}, {b}")
    wide = _type(kind)
    none, back = (f.let(f"icmp eq {wide} {b}, {c}") for c in (0, -1))
    special = f.let(f"or i1 {none}, {back}")  # the smallest integer over -1 does not fit
    safe = f.let(f"select i1 {special}, {wide} 1, {wide} {b}")
    quotient = f.let(f"sdiv {wide} {a}, {safe}")
    negative = f.let(f"sub {wide} 0, {a}")
    quotient = f.let(f"select i1 {back}, {wide} {negative}, {wide} {quotient}")
    return f.let(f"select i1 {none}, {wide} 0, {wide} {quotient}")


def _largest(f: Function, a: Value, b: Value, kind: str) -> Value:
    """np.maximum: NaN where either is."""
    return _extreme(f, a, b, kind, "gt")


def _smallest(f: Function, a: Value, b: Value, kind: str) -> Value:
    """np.minimum: NaN where either is."""
    return _extreme(f, a, b, kind, "lt")


def _extreme(f: Function, a: Value, b: Value, kind: str, order: str) -> Value:
    """The one that is `order` than the other; NaN where either is."""
    wide = _type(kind)
    if kind != "float32":
        first = f.let(f"icmp s{order} {wide} {a}, {b}")
        return f.let(f"select i1 {first}, {wide} {a}, {wide} {b}")
    first = f.let(f"fcmp o{order} float {a}, {b}")
    best = f.let(f"select i1 {first}, float {a}, float {b}")  # b where b is NaN
    nan = f.let(f"fcmp uno float {a}, {a}")
    return f.let(f"select i1 {nan}, float {a}, float {best}")


def extreme(f: Function, how: str, a: Value, b: Value) -> Value:
    """The "max" or "min" of floats, NaN where either is, as LLVM can do it in any order."""
    return f.call("float", f"llvm.{how}imum.f32", ("float", a), ("float", b))


BINARY: dict[str, Callable[[Function, Value, Value, str], Value]] = {
    "add": _arithmetic("add"),
    "sub": _arithmetic("sub"),
    "mul": _arithmetic("mul"),
    "div": _divided,
    "max": _largest,
    "min": _smallest,
    "prelu": lambda f, a, b, kind: emit_prelu(f, a, b),
}
"""Operations on two or more numbers, from left to right."""

COMPARISONS = {"equal": "eq", "less": "lt", "lessorequal": "le", "greater": "gt",
               "greaterorequal": "ge"}  # fmt: skip
"""Their names, and how LLVM calls them; false where a float is NaN."""

LOGIC = ("and", "or", "xor")
"""On bools; "xor" of a single one is its negation."""


def _compared(f: Function, op: str, a: Value, b: Value, kind: str) -> Value:
    code = COMPARISONS[op]
    if kind == "float32":
        return _bool(f, f.let(f"fcmp o{code} float {a}, {b}"))
    sign = "" if code == "eq" else "u" if kind in _UNSIGNED else "s"
    return _bool(f, f.let(f"icmp {sign}{code} {_type(kind)} {a}, {b}"))


def _bool(f: Function, condition: Value) -> Value:
    return f.let(f"zext i1 {condition} to i8")


def _truth(f: Function, value: Value) -> Value:
    return f.let(f"icmp ne i8 {value}, 0")


def _negated(f: Function, value: Value, kind: str) -> Value:
    if kind == "float32":
        return f.let(f"fneg float {value}")
    return f.let(f"sub {_type(kind)} 0, {value}")


def _absolute(f: Function, value: Value, kind: str) -> Value:
    if kind == "float32":
        return f.call("float", "llvm.fabs.f32", ("float", value))
    return _largest(f, value, _negated(f, value, kind), kind)


def _root(f: Function, value: Value, kind: str) -> Value:
    return f.call("float", "llvm.sqrt.f32", ("float", value))


def _reciprocal(f: Function, value: Value, kind: str) -> Value:
    return f.let(f"fdiv float 1.0, {value}")


def _relu(f: Function, value: Value, kind: str) -> Value:
    """Negative values become zero, NaN stays."""
    wide = _type(kind)
    if kind != "float32":
        return _largest(f, value, "0", kind)
    negative = f.let(f"fcmp ogt float 0.0, {value}")
    return f.let(f"select i1 {negative}, {wide} 0.0, {wide} {value}")


def _square(f: Function, value: Value, kind: str) -> Value:
    return BINARY["mul"](f, value, value, kind)


def _floor(f: Function, value: Value, kind: str) -> Value:
    """By way of int32; from 2**23 on every float32 is whole."""
    whole = f.let(f"sitofp i32 {_saturated(f, value, 'i32')} to float")
    high = f.let(f"fcmp ogt float {whole}, {value}")
    lower = f.let(f"fsub float {whole}, {float_bits(1.0)}")
    whole = f.let(f"select i1 {high}, float {lower}, float {whole}")
    small = f.let(f"fcmp olt float {_absolute(f, value, kind)}, {float_bits(2.0**23)}")
    return f.let(f"select i1 {small}, float {whole}, float {value}")


def _ceil(f: Function, value: Value, kind: str) -> Value:
    return _negated(f, _floor(f, _negated(f, value, kind), kind), kind)


def _is_nan(f: Function, value: Value, kind: str) -> Value:
    return _bool(f, f.let(f"fcmp uno float {value}, {value}"))


def _sign(f: Function, value: Value, kind: str) -> Value:
    """-1, 0 or 1; NaN stays."""
    wide, zero = _type(kind), fill_value(kind, 0)
    code = "fcmp o" if kind == "float32" else "icmp s"
    up, down = (f.let(f"{code}{o} {wide} {value}, {zero}") for o in ("gt", "lt"))
    out = f.let(f"select i1 {down}, {wide} {fill_value(kind, -1)}, {wide} {value}")
    return f.let(f"select i1 {up}, {wide} {fill_value(kind, 1)}, {wide} {out}")


UNARY: dict[str, Callable[[Function, Value, str], Value]] = {
    "neg": _negated,
    "abs": _absolute,
    "sqrt": _root,
    "reciprocal": _reciprocal,
    "relu": _relu,
    "square": _square,
    "floor": _floor,
    "ceil": _ceil,
    "isnan": _is_nan,
    "sign": _sign,
}
"""Operations on one number."""


def _clipped(f: Function, value: Value, kind: str, scalars: Sequence[float]) -> Value:
    """np.clip(value, low, high)."""
    low, high = (fill_value(kind, s) for s in scalars)
    return _smallest(f, _largest(f, value, low, kind), high, kind)


def _hard_sigmoid(f: Function, value: Value, kind: str, scalars: Sequence[float]) -> Value:
    """np.clip(value * alpha + beta, 0, 1)."""
    alpha, beta = (float_bits(s) for s in scalars)
    line = f.let(f"fadd float {f.let(f'fmul float {value}, {alpha}')}, {beta}")
    return _clipped(f, line, kind, (0.0, 1.0))


def _of_floats(
    function: Callable[[Function, Value, Sequence[float]], Value],
) -> Callable[[Function, Value, str, Sequence[float]], Value]:
    return lambda f, value, kind, scalars: function(f, value, scalars)


_PARAMETRIC: dict[str, Callable[[Function, Value, str, Sequence[float]], Value]] = {
    "clip": _clipped,
    "hard_sigmoid": _hard_sigmoid,
    **{name: _of_floats(function) for name, function in PARAMETRIC.items()},
}
"""Operations on one number with constants of their own."""


_LONG = ("sqrt",)

ELEMENTWISE = frozenset(
    ("cast", "where", *BINARY, *COMPARISONS, *LOGIC, *UNARY, *FUNCTIONS, *_PARAMETRIC)
)
"""Operations of one element of each operand."""

CHEAP = ELEMENTWISE - {*FUNCTIONS, *PARAMETRIC, *_LONG} | {"copy"}
"""Those of a few instructions."""


def _saturated(f: Function, value: Value, to: str) -> Value:
    """A float to the nearest integer towards zero that fits; NaN becomes 0."""
    return f.call(to, f"llvm.fptosi.sat.{to}.f32", ("float", value))


def _cast(f: Function, value: Value, kind: str, to: str) -> Value:
    """Like astype: integers wrap around, floats are cut towards zero and saturate.

    Bytes are the low ones of an int32, as C has it.
    """
    kind, to = ("int8" if k == "s8" else k for k in (kind, to))
    if kind == to:
        return value
    source, target = _type(kind), _type(to)
    sign = "u" if kind in _UNSIGNED else "s"
    if to == "bool":
        if kind == "float32":
            return _bool(f, f.let(f"fcmp une float {value}, 0.0"))
        return _bool(f, f.let(f"icmp ne {source} {value}, 0"))
    if kind == "float32":
        wide = "i64" if to == "int64" else "i32"
        value = _saturated(f, value, wide)
        return value if wide == target else f.let(f"trunc {wide} {value} to {target}")
    if to == "float32":
        return f.let(f"{sign}itofp {source} {value} to float")
    if BYTES[kind] == BYTES[to]:
        return value
    code = "trunc" if BYTES[kind] > BYTES[to] else "zext" if sign == "u" else "sext"
    return f.let(f"{code} {source} {value} to {target}")


@dataclass(frozen=True)
class Reduction:
    """How elements become one: finish(combine(... combine(identity, prepare(x)))).

    Attributes:
        identity: the start.
        prepare: applied to each element.
        combine: of the result so far and an element.
        finish: applied to the result.
    """

    identity: Value
    prepare: Callable[[Value], Value]
    combine: Callable[[Value, Value], Value]
    finish: Callable[[Value], Value]


# What is combined, and the operations before and after.
REDUCTIONS: dict[str, tuple[str, str, str]] = {
    "sum": ("add", "", ""),
    "mean": ("add", "", "mean"),
    "reduce_max": ("max", "", ""),
    "reduce_min": ("min", "", ""),
    "prod": ("mul", "", ""),
    "l1": ("add", "abs", ""),
    "l2": ("add", "square", "sqrt"),
    "sumsquare": ("add", "square", ""),
}
"""Reductions by name; the order in which floats are summed is left to LLVM."""


def reduced(f: Function, op: str, kind: str, count: int | Value) -> Reduction:
    """A reduction of `count` elements of one kind; a number, or an i64 value."""
    how, before, after = REDUCTIONS[op]

    def prepare(value: Value) -> Value:
        return UNARY[before](f, value, kind) if before else value

    def combine(so_far: Value, value: Value) -> Value:
        if kind != "float32":
            return BINARY[how](f, so_far, value, kind)
        if how in ("add", "mul"):
            return f.let(f"f{how} reassoc float {so_far}, {value}")
        return extreme(f, how, so_far, value)

    def finish(value: Value) -> Value:
        if after == "mean":
            if isinstance(count, int):
                return f.let(f"fdiv float {value}, {float_bits(float(count))}")
            return f.let(f"fdiv float {value}, {f.let(f'sitofp i64 {count} to float')}")
        return UNARY[after](f, value, kind) if after else value

    return Reduction(_identity(how, kind), prepare, combine, finish)


def _identity(how: str, kind: str) -> Value:
    """What changes nothing when combined."""
    if how in ("add", "mul"):
        return fill_value(kind, int(how == "mul"))
    if kind == "float32":
        return float_bits(float("inf") if how == "min" else float("-inf"))
    bits = 8 * BYTES[kind] - 1
    return str(2**bits - 1 if how == "min" else -(2**bits))

"""What walks do with one element, as text of Triton, each beside its numpy meaning.

The meaning is that of kernels/cpu/nd_scalar.py. Values have kinds: all real types are computed in
float32, bools are conditions, bytes and integers stay what they are. The compiler may fuse a
multiplication and an addition, and functions are those of the GPU: results differ from a CPU's in
the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

FLOAT, BOOL, FLOAT8 = "float32", "bool", "float8e4m3fn"
REAL = ("float32", "float16", "bfloat16")
TYPES = {
    "float32": "tl.float32",
    "float16": "tl.float16",
    "bfloat16": "tl.bfloat16",
    "float8e4m3fn": "tl.float8e4nv",
    "int8": "tl.int8",
    "uint8": "tl.uint8",
    "bool": "tl.int8",
    "int32": "tl.int32",
    "int64": "tl.int64",
}
"""Types of elements, as kernels name them."""
_NAN = "propagate_nan=tl.PropagateNan.ALL"
_MIDDLE = "12582912.0"  # 1.5 * 2**23: added and taken away it rounds half to even
_FLOAT8_HIGH = 448.0
_INTEGERS = {"int64": 63, "int32": 31}

Typed = tuple[str, str]


def kind_of(dtype: str) -> str:
    """How an element is computed with: float32 for all real types."""
    return FLOAT if dtype in (*REAL, FLOAT8) else dtype


def number(value: float, kind: str) -> str:
    """A constant, rounded to its kind."""
    if kind != FLOAT:
        return str(int(value))
    value = float(np.float32(value))
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def loaded(text: str, dtype: str) -> str:
    """The value of an element as `tl.load` gives it."""
    if dtype == BOOL:
        return f"{text} != 0"
    return f"{text}.to(tl.float32)" if dtype in (*REAL, FLOAT8) else text


def stored(name: str, kind: str, dtype: str) -> str:
    """A value as it is stored in elements of `dtype`."""
    if dtype == FLOAT8 and kind == FLOAT:
        return _float8(name)
    return f"{name}.to({TYPES[dtype]})"


def element(op: str, values: Sequence[Typed], to: str, scalars: Sequence[float] = ()) -> str:
    """One operation as an expression.

    Args:
        op: "copy", "cast", "where", "quantize", "dequantize", or a key of the tables below.
        values: names of the operands and their kinds.
        to: kind of the result.
        scalars: constants of the operation.
    """
    values = [(f"{n}.to(tl.float32)", FLOAT) if kind == FLOAT8 else (n, kind) for n, kind in values]
    name, kind = values[0]
    if op == "copy":
        return name
    if op == "where":
        return f"tl.where({name}, {values[1][0]}, {values[2][0]})"
    if op in _CONVERSIONS:
        return _CONVERSIONS[op](name, kind, to, scalars)
    if op in COMPARISONS:
        return f"{name} {COMPARISONS[op]} {values[1][0]}"
    if op in LOGIC:
        return f"{name} {LOGIC[op]} {values[1][0]}" if len(values) > 1 else f"{name} == 0"
    if op == "clip":
        return _clipped(name, kind, scalars)
    if op in UNARY:
        return (UNARY[op] if kind == FLOAT else _WHOLE_UNARY[op]).format(name)
    if op in FUNCTIONS:
        return FUNCTIONS[op].format(name, *(number(s, FLOAT) for s in scalars))
    for other, _ in values[1:]:
        name = f"({(BINARY if kind == FLOAT else _WHOLE_BINARY)[op].format(name, other)})"
    return name


def _quantized(name: str, kind: str, to: str, scalars: Sequence[float]) -> str:
    """saturate(round_half_even(x / scale) + zero); NaN becomes the zero point."""
    scale, zero = scalars
    real = name if kind == FLOAT else f"{name}.to(tl.float32)"
    steps = real if scale == 1 else f"tl.div_rn({real}, {number(scale, FLOAT)})"
    if to == FLOAT8:
        return _float8(steps)
    low, high = (0, 255) if to == "uint8" else (-128, 127)
    limited = (
        f"tl.maximum(tl.minimum({steps}, {high - zero:.1f}, {_NAN}), {low - zero:.1f}, {_NAN})"
    )
    rounded = f"({limited} + {_MIDDLE} - {_MIDDLE})"
    if zero:
        rounded = f"({rounded} + {zero:.1f})"
    return f"tl.where({real} == {real}, {rounded}, {zero:.1f}).to({TYPES[to]})"


def _float8(name: str) -> str:
    """The nearest float8; beyond 448 that is 448."""
    limited = f"tl.minimum({name}, {_FLOAT8_HIGH}, {_NAN})"
    return f"tl.maximum({limited}, {-_FLOAT8_HIGH}, {_NAN}).to(tl.float8e4nv)"


def _dequantized(name: str, kind: str, to: str, scalars: Sequence[float]) -> str:
    """(x - zero) * scale."""
    scale, zero = scalars
    whole = name if kind == FLOAT else f"{name}.to(tl.int32)"
    centred = f"({whole} - {number(zero, kind)})" if zero else whole
    return f"{centred}.to(tl.float32) * {number(scale, FLOAT)}"


def _cast(name: str, kind: str, to: str, _: Sequence[float]) -> str:
    """Like astype: integers wrap around, floats are cut towards zero and saturate, NaN is 0."""
    if to == FLOAT8:
        return _float8(name if kind == FLOAT else f"{name}.to(tl.float32)")
    if kind == to or (kind == FLOAT and to in REAL):
        return name
    if to == BOOL:
        return f"{name} != 0"
    if kind != FLOAT:
        return f"{name}.to({TYPES[to if to not in REAL else FLOAT]})"
    bits = _INTEGERS.get(to, 31)
    wide = "tl.int64" if bits == 63 else "tl.int32"
    edge, below = float(2**bits), float(np.nextafter(np.float32(2**bits), np.float32(0)))
    limited = f"tl.maximum(tl.minimum(tl.where({name} == {name}, {name}, 0.0), {below}), {-edge})"
    whole = f"tl.where({name} >= {edge}, {2**bits - 1}, {limited}.to({wide}))"
    return whole if to in _INTEGERS else f"{whole}.to({TYPES[to]})"


_CONVERSIONS: dict[str, Callable[[str, str, str, Sequence[float]], str]] = {
    "cast": _cast,
    "quantize": _quantized,
    "dequantize": _dequantized,
}


def _clipped(name: str, kind: str, scalars: Sequence[float]) -> str:
    """np.clip(value, low, high); NaN stays."""
    low, high = (number(s, kind) for s in scalars)
    if kind == FLOAT:
        name = f"tl.maximum({name}, {low}, {_NAN})" if scalars[0] > -math.inf else name
        return f"tl.minimum({name}, {high}, {_NAN})" if scalars[1] < math.inf else name
    return f"tl.minimum(tl.maximum({name}, {low}), {high}).to({TYPES[kind]})"


COMPARISONS = {"equal": "==", "less": "<", "lessorequal": "<=", "greater": ">",
               "greaterorequal": ">="}  # fmt: skip
"""False where a float is NaN."""
LOGIC = {"and": "&", "or": "|", "xor": "^"}
"""On bools; "xor" of a single one is its negation."""

BINARY = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "tl.div_rn({0}, {1})",
    "max": f"tl.maximum({{0}}, {{1}}, {_NAN})",
    "min": f"tl.minimum({{0}}, {{1}}, {_NAN})",
    "prelu": "tl.where({0} < 0.0, {0} * {1}, {0})",
}
"""On two or more float32, from left to right; NaN where either is."""
_WHOLE_BINARY = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    # Integers towards zero; 0 over a divisor 0; the smallest over -1 does not fit and wraps around.
    "div": "tl.where({1} == 0, 0, tl.where({1} == -1, 0 - {0}, {0} // "
    "tl.where(({1} == 0) | ({1} == -1), 1, {1})))",
    "max": "tl.maximum({0}, {1})",
    "min": "tl.minimum({0}, {1})",
}
"""The same of integers."""

UNARY = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "reciprocal": "tl.div_rn(1.0, {0})",
    "relu": "tl.where({0} < 0.0, 0.0, {0})",
    "square": "{0} * {0}",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "isnan": "{0} != {0}",
    "sign": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, {0}))",
}
"""On one float32."""
_WHOLE_UNARY = {
    "neg": "0 - {0}",
    "abs": "tl.where({0} < 0, 0 - {0}, {0})",
    "relu": "tl.where({0} < 0, 0, {0})",
    "square": "{0} * {0}",
    "sign": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, {0}))",
}
"""The same of an integer."""

_SIGMOID = "(1.0 / (1.0 + tl.exp(-{0})))"
_LINE = f"tl.minimum(tl.maximum({{0}} * {{1}} + {{2}}, 0.0, {_NAN}), 1.0, {_NAN})"
_SIXTH = _LINE.format("{0}", number(1 / 6, FLOAT), "0.5")
_TANH_LINE = "(-1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))"

FUNCTIONS = {
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "erf": "tl.erf({0})",
    "sigmoid": _SIGMOID,
    "tanh": "1.0 - 2.0 / (1.0 + tl.exp(2.0 * {0}))",
    # A factor limited from below: minus infinity times 0 would be NaN.
    "silu": "tl.maximum({0}, -87.0) / (1.0 + tl.exp(-{0}))",
    "gelu": "0.5 * tl.maximum({0}, -16.0) * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": f"tl.maximum({{0}}, -16.0) / (1.0 + tl.exp({_TANH_LINE}))",
    "hard_swish": f"{{0}} * {_SIXTH}",
    "softplus": "tl.where({0} < 0.0, 0.0, {0}) + tl.log(1.0 + tl.exp(-tl.abs({0})))",
    "softsign": "{0} / (1.0 + tl.abs({0}))",
    "hard_sigmoid": _LINE,
    "elu": "tl.where({0} < 0.0, (tl.exp({0}) - 1.0) * {1}, {0} * {2})",
    "leaky": "tl.where({0} < 0.0, {0} * {1}, {0})",
}
"""Functions of one float32 (and constants {1}, {2}), as core/functions.py defines most."""

ACTIVATIONS = {
    "": "copy",
    "Relu": "relu",
    "Clip": "clip",
    "HardSwish": "hard_swish",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Gelu": "gelu",
    "GeluTanh": "gelu_tanh",
    "Tanh": "tanh",
}
"""The activations of core/functions.py, as operations here; "HardSigmoid" has constants, too."""


def operation(op: str, scalars: Sequence[float]) -> tuple[str, Sequence[float]]:
    """The operation that a name means, and its constants."""
    if op == "HardSigmoid":
        return "hard_sigmoid", (1 / 6, 0.5)
    return ACTIVATIONS.get(op, op), scalars


def known(op: str, kinds: Sequence[str]) -> bool:
    """Whether there is such an operation on operands of these kinds."""
    op = operation(op, ())[0]
    if op in (*_CONVERSIONS, *COMPARISONS, "copy", "where"):
        return True
    if op in LOGIC:
        return set(kinds) == {BOOL}
    if set(kinds) <= {FLOAT, FLOAT8}:
        return op in UNARY or op in BINARY or op in FUNCTIONS or op == "clip"
    return op in _WHOLE_UNARY or op in _WHOLE_BINARY or op == "clip"

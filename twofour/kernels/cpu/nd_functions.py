"""Functions of one float32 for small operators, each beside its numpy meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twofour.kernels.cpu.functions import (
    Floats,
    emit_activation,
    emit_erf,
    emit_exp,
    emit_log,
)
from twofour.kernels.cpu.llvm import Function, Value


def _activation(name: str) -> Callable[[Function, Value], Value]:
    return lambda f, value: emit_activation(Floats(f, 1), name, value)


def _softplus(f: Function, x: Value) -> Value:
    """np.maximum(x, 0) + log(1 + exp(-abs(x)))."""
    v = Floats(f, 1)
    least = v.op("fsub", v.constant(-0.0), v.size(x))
    rest = emit_log(f, v.op("fadd", v.constant(1.0), emit_exp(f, least, lanes=1)), lanes=1)
    return v.op("fadd", v.select(v.compare("olt", x, v.constant(0.0)), v.constant(0.0), x), rest)


def _softsign(f: Function, x: Value) -> Value:
    """X / (1 + abs(x))."""
    v = Floats(f, 1)
    return v.op("fdiv", x, v.op("fadd", v.constant(1.0), v.size(x)))


FUNCTIONS: dict[str, Callable[[Function, Value], Value]] = {
    "exp": lambda f, value: emit_exp(f, value, lanes=1),
    "log": lambda f, value: emit_log(f, value, lanes=1),
    "erf": lambda f, value: emit_erf(f, value, lanes=1),
    "sigmoid": _activation("Sigmoid"),
    "tanh": _activation("Tanh"),
    "silu": _activation("Silu"),
    "gelu": _activation("Gelu"),
    "gelu_tanh": _activation("GeluTanh"),
    "hard_swish": _activation("HardSwish"),
    "softplus": _softplus,
    "softsign": _softsign,
}
"""Functions of one float32, as core/functions.py defines those that are there."""


def _elu(f: Function, x: Value, scalars: Sequence[float]) -> Value:
    """np.where(x < 0, (exp(x) - 1) * low, x * high)."""
    v = Floats(f, 1)
    low, high = (v.constant(scalar) for scalar in scalars)
    below = v.op("fmul", v.op("fsub", emit_exp(f, x, lanes=1), v.constant(1.0)), low)
    return v.select(v.compare("olt", x, v.constant(0.0)), below, v.op("fmul", x, high))


def emit_prelu(f: Function, x: Value, slope: Value) -> Value:
    """np.where(x < 0, x * slope, x)."""
    v = Floats(f, 1)
    return v.select(v.compare("olt", x, v.constant(0.0)), v.op("fmul", x, slope), x)


def _leaky(f: Function, x: Value, scalars: Sequence[float]) -> Value:
    """np.where(x < 0, x * slope, x)."""
    return emit_prelu(f, x, Floats(f, 1).constant(scalars[0]))


PARAMETRIC: dict[str, Callable[[Function, Value, Sequence[float]], Value]] = {
    "elu": _elu,
    "leaky": _leaky,
}
"""Functions of one float32 with constants of their own."""

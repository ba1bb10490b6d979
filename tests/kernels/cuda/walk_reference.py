"""What walks compute, in numpy: every element of y, and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tests.kernels.cuda.interpret import values_of
from twofour.core import functions
from twofour.core.numerics import dequantize, quantize
from twofour.kernels.cpu.nd_scalar import Expression
from twofour.kernels.cuda.problem import Ref, Walk

Array = Any
REAL = ("float32", "float16", "bfloat16", "float8e4m3fn")


def kind_of(dtype: str) -> str:
    return "float32" if dtype in REAL else dtype


def seen(held: torch.Tensor, ref: Ref, dims: Sequence[int]) -> Array:
    """The elements that a walk touches, of its dims."""
    flat = values_of(held)
    steps = [step * flat.itemsize for step in ref.strides]
    return np.lib.stride_tricks.as_strided(flat[ref.offset :], dims, steps)


def places(ref: Ref, dims: Sequence[int]) -> Array:
    """Their indices in the operand."""
    found = np.full(dims, ref.offset)
    for axis, step in enumerate(ref.strides):
        shape = [-1 if i == axis else 1 for i in range(len(dims))]
        found = found + (np.arange(dims[axis]) * step).reshape(shape)
    return found


@np.errstate(all="ignore")
def expected(problem: Walk, inputs: Sequence[torch.Tensor], y: torch.Tensor) -> Array:
    """y as it shall be: float32 for real types, before they are rounded to y's own."""
    given = [seen(x, ref, problem.dims) for x, ref in zip(inputs, problem.inputs, strict=True)]
    result = values_of(y).copy()
    at = places(problem.y, problem.dims)
    if problem.op == "fill":
        result[at] = problem.scalars[0]
    elif problem.op == "gather":
        count, step = problem.rows
        rows = np.clip(np.where(given[1] < 0, given[1] + count, given[1]), 0, count - 1)
        result[at] = values_of(inputs[0])[places(problem.inputs[0], problem.dims) + rows * step]
    elif problem.op in FOLDS:
        gone = tuple(i for i, step in enumerate(problem.y.strides) if step == 0)
        value = FOLDS[problem.op](given[0], axis=gone, keepdims=True)
        result[at] = np.broadcast_to(value, problem.dims)
    elif problem.op in ("softmax", "log_softmax", "expect"):
        power = np.exp(given[0] - given[0].max(-1, keepdims=True))
        value = power / power.sum(-1, keepdims=True)
        if problem.op == "expect":
            weights, bias = np.float32(problem.scalars[:-1]), problem.scalars[-1]
            value = (value * weights).sum(-1, keepdims=True) + bias
        result[at] = np.log(value) if problem.op == "log_softmax" else value
    else:
        steps = problem.steps
        if problem.op != "chain":
            args, kind = tuple(range(len(given))), problem.y.dtype
            steps = (Expression(problem.op, args, kind, problem.scalars),)
        for step in steps:
            own = [given[i] for i in step.args]
            given.append(element(step, own))
        high = 448.0
        saturates = problem.y.dtype == "float8e4m3fn"
        result[at] = np.clip(given[-1], -high, high) if saturates else given[-1]
    return result


FOLDS: dict[str, Callable[..., Array]] = {
    "sum": lambda x, **how: x.sum(dtype=x.dtype, **how),
    "mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "prod": lambda x, **how: x.prod(dtype=x.dtype, **how),
    "l1": lambda x, **how: np.abs(x).sum(**how),
    "l2": lambda x, **how: np.sqrt(np.square(x).sum(**how)),
    "sumsquare": lambda x, **how: np.square(x).sum(**how),
}

UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "reciprocal": lambda x: np.float32(1) / x,
    "relu": lambda x: np.maximum(x, 0),
    "square": np.square,
    "floor": np.floor,
    "ceil": np.ceil,
    "isnan": np.isnan,
    "sign": np.sign,
    "exp": functions.exp,
    "log": functions.log,
    "erf": functions.erf,
    "sigmoid": functions.sigmoid,
    "tanh": functions.tanh,
    "silu": functions.silu,
    "gelu": functions.gelu,
    "gelu_tanh": functions.gelu_tanh,
    "hard_swish": functions.hard_swish,
    "softplus": functions.softplus,
    "softsign": functions.softsign,
}
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "prelu": lambda a, b: np.where(a < 0, a * b, a),
    "equal": np.equal,
    "less": np.less,
    "lessorequal": np.less_equal,
    "greater": np.greater,
    "greaterorequal": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
}


def divided(a: Array, b: Array) -> Array:
    """Integers towards zero, 0 over a divisor 0."""
    if a.dtype == np.float32:
        return a / b
    safe = np.where(b == 0, 1, b)
    quotient = np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe))
    return np.where(b == 0, 0, quotient).astype(a.dtype)


def cast(x: Array, kind: str) -> Array:
    """Floats are cut towards zero and saturate, NaN is 0; integers wrap around."""
    kind = kind_of(kind)
    if x.dtype != np.float32 or kind in ("float32", "bool"):
        return x.astype(kind)
    bits = 64 if kind == "int64" else 32
    info = np.iinfo(f"int{bits}")
    whole = np.trunc(np.where(np.isnan(x), 0, x).astype(np.float64))
    inside = np.clip(whole, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) * (1 - 2.0**-53))
    exact = np.where(whole >= 2.0 ** (bits - 1), info.max, inside.astype(np.int64))
    return exact.astype(f"int{bits}").astype(kind)


def quantized(x: Array, kind: str, scalars: Sequence[float]) -> Array:
    """Saturated; float8 is rounded later."""
    if kind == "float8e4m3fn":
        return np.clip(x / np.float32(scalars[0]), -448, 448)
    return quantize(x, *scalars, np.dtype(kind).type)


def dequantized(x: Array, kind: str, scalars: Sequence[float]) -> Array:
    """Of bytes, or of float8."""
    return x * np.float32(scalars[0]) if x.dtype == np.float32 else dequantize(x, *scalars)


PARAMETRIC: dict[str, Callable[[Array, str, Any], Array]] = {
    "cast": lambda x, kind, _: cast(x, kind),
    "quantize": quantized,
    "dequantize": dequantized,
    "clip": lambda x, _, s: np.minimum(np.maximum(x, x.dtype.type(s[0])), x.dtype.type(s[1])),
    "hard_sigmoid": lambda x, _, s: np.clip(x * np.float32(s[0]) + np.float32(s[1]), 0, 1),
    "elu": lambda x, _, s: np.where(x < 0, np.expm1(x) * np.float32(s[0]), x * np.float32(s[1])),
    "leaky": lambda x, _, s: np.where(x < 0, x * np.float32(s[0]), x),
}


def element(step: Expression, values: list[Array]) -> Array:
    """One operation on whole arrays."""
    op, x = step.op, values[0]
    if op == "copy":
        return x
    if op in PARAMETRIC:
        return PARAMETRIC[op](x, step.kind, step.scalars)
    if op == "where":
        return np.where(x, values[1], values[2])
    if op == "xor":
        return np.logical_xor(x, values[1]) if len(values) > 1 else ~x
    if op in functions.PLAIN:
        return functions.PLAIN[op](x)
    if op in UNARY:
        return UNARY[op](x)
    for other in values[1:]:
        x = divided(x, other) if op == "div" else BINARY[op](x, other)
    return x

"""Walks over uint8 values that the GPU holds as int8, 128 less: what they compute is as before.

Products take int8 alone, so a quantized uint8 value is held so, and moving it changes nothing. What
computes with it (a Cast, a Where) sees it as it was:

    y = f(x)   =>   y = f(x + 128) - 128, each addition only where the value is held so
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twofour.compiler.cuda.products import STORED
from twofour.compiler.native_nd import NdValue
from twofour.kernels.cpu.nd_scalar import Expression
from twofour.kernels.cuda.problem import Walk

_UP, _DOWN = (1.0, -float(STORED)), (1.0, float(STORED))
_MOVES = ("copy", "gather")


def is_shifted(value: NdValue, dtype: str) -> bool:
    """Whether a value is uint8, and held as int8."""
    return value.kind == "uint8" and dtype == "int8"


def shifted_walk(walk: Walk, inputs: Sequence[bool], y: bool) -> Walk:
    """The walk over values some of which are held as int8 in the place of uint8.

    Args:
        walk: its operands have the types that they are held in.
        inputs: which inputs are held so.
        y: the result is.
    """
    if walk.op == "fill":
        return replace(walk, scalars=(walk.scalars[0] - STORED * y,))
    moves = walk.op in _MOVES
    read = inputs[:1] if moves else inputs
    if (not any(read) and not y) or (moves and read[0] == y):
        return walk
    count = 1 if moves else len(inputs)
    own = walk.steps
    if walk.op != "chain":
        op, kind = "copy" if moves else walk.op, "uint8" if y else walk.y.dtype
        own = (Expression(op, tuple(range(count)), kind, walk.scalars),)
    steps: list[Expression] = []
    at = list(range(count))  # where each value of the old chain is in the new one

    def add(op: str, args: tuple[int, ...], kind: str, scalars: tuple[float, ...] = ()) -> int:
        steps.append(Expression(op, args, kind, scalars))
        return count + len(steps) - 1

    for index in [i for i in range(count) if inputs[i]]:
        real = add("dequantize", (index,), "float32", _UP)
        at[index] = add("cast", (real,), "uint8")
    for step in own:
        at.append(add(step.op, tuple(at[i] for i in step.args), step.kind, step.scalars))
    if y:
        real = add("dequantize", (at[-1],), "float32", _DOWN)
        add("quantize", (real,), "int8", (1.0, 0.0))
    return replace(walk, op="gather" if walk.op == "gather" else "chain", steps=tuple(steps),
                   scalars=())  # fmt: skip

"""A few bytes may describe more than any memory holds: sizes are looked at before anything runs."""

from __future__ import annotations

import math

import onnx_ir as ir

from twofour.core.errors import InputError, UnsupportedError
from twofour.core.memory import limit_bytes

_FIX = "check the file, and the shapes given for its inputs"


def require_fits(graph: ir.Graph) -> None:
    """Refuses what one operator alone would fill the memory with.

    Args:
        graph: with static shapes, as far as they are known.

    Raises:
        InputError: names the input or the operator.
    """
    most, fixed, fixed_bytes = limit_bytes(), set[ir.Value | None](), 0
    for value in graph.inputs:
        if _value_bytes(value) > most:
            raise _too_large(f"input {value.name!r}", value, most)
    for node in graph:
        for value in node.outputs:
            if _value_bytes(value) > most:
                raise _too_large(f"result {value.name!r} of {node.op_type} {node.name!r}", value,
                                 most)  # fmt: skip
        if all(v is None or v in fixed or v.is_initializer() for v in node.inputs):
            fixed.update(node.outputs)  # of what was too large to be folded
            fixed_bytes += sum(map(_value_bytes, node.outputs))
        if fixed_bytes > most // 4:
            raise InputError(
                f"constants computed up to {node.op_type} {node.name!r} do not fit the memory",
                [f"{fixed_bytes:,} bytes, this process may use {most:,} for everything"],
                fix="store what is constant as an initializer",
            )
        if _stacked_bytes(node) > most:
            raise InputError(
                f"the results of Loop {node.name!r} do not fit the memory",
                [f"{_stacked_bytes(node):,} bytes, this process may use {most:,}"],
                fix="make it loop less often",
            )


def require_possible(graph: ir.Graph) -> None:
    """Refuses what onnx's checks let pass and no runtime computes.

    A Reshape to another number of elements; a Conv whose channels its groups do not divide.

    Args:
        graph: with static shapes, as far as they are known.

    Raises:
        UnsupportedError: names the operator.
    """
    for node in graph:
        x = node.inputs[0] if node.inputs else None
        if node.domain != "" or x is None or x.shape is None or not x.shape.is_static():
            continue
        y, what = node.outputs[0], f"{node.op_type} {node.name!r}"
        if node.op_type == "Reshape" and y.shape is not None and y.shape.is_static():
            if _elements(x) != _elements(y):
                reason = f"{x.shape} has {_elements(x)} elements, {y.shape} has {_elements(y)}"
                raise UnsupportedError(f"{what} changes the number of elements", [reason], _FIX)
        if node.op_type == "Conv" and len(x.shape) > 1:
            groups, channels = node.attributes.get_int("group", 1), int(x.shape.numpy()[1])
            if groups < 1 or channels % groups:
                reason = f"{channels} channels of {x.name!r} are not {groups} equal groups"
                raise UnsupportedError(f"{what} cannot be computed", [reason], _FIX)


def _value_bytes(value: ir.Value) -> int:
    """0 where the type or the shape is not known."""
    if value.dtype in (None, ir.DataType.UNDEFINED, ir.DataType.STRING):
        return 0
    return _elements(value) * (value.dtype.bitwidth if value.dtype else 0) // 8


def _elements(value: ir.Value) -> int:
    if value.shape is None or not value.shape.is_static():
        return 0
    return math.prod(value.shape.numpy())


def _stacked_bytes(node: ir.Node) -> int:
    """Of what a Loop stacks in a known number of rounds, if it does not end before."""
    if node.op_type != "Loop" or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
        return 0
    rounds = node.inputs[0].const_value
    if rounds is None or rounds.size != 1:
        return 0
    body = node.attributes["body"].as_graph()
    stacked = body.outputs[len(node.inputs) - 1 :]
    return int(rounds.numpy().item()) * sum(max(_value_bytes(value), 1) for value in stacked)


def _too_large(what: str, value: ir.Value, most: int) -> InputError:
    dims = "x".join(map(str, value.shape or ()))
    return InputError(
        f"{what} does not fit the memory",
        [f"{dims} takes {_value_bytes(value):,} bytes, this process may use {most:,}"],
        fix="give smaller inputs, as --shapes x:1x3x224x224",
    )

"""Normalizes rows of channels in one operator.

    LayerNormalization<axis = -1>(x, gamma [, beta])  ->  twofour.LayerNorm(x, gamma, beta)

    d = x - ReduceMean(x)
    d / Sqrt(ReduceMean(d * d) + epsilon) [* gamma] [+ beta]  ->  the same

    d * d may be Pow(d, 2), and d may be computed twice. An absent beta is zeros.

Conditions:
    1. the last axis is normalized, and its length is known
    2. gamma and beta are constants, float32, one number per channel
    3. x is float32
    4. mean and inverse deviation are not read by anybody else
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_layer_norm"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if reading.is_op(node, "LayerNormalization"):
        return _standard(node)
    if reading.is_op(node, "Div", "Mul"):
        return _decomposed(node)
    return None


def _standard(node: ir.Node) -> Replacement | Refused:
    """LayerNormalization."""
    x = reading.data(node)
    shape = reading.shape_of(x)
    rank = 0 if shape is None else len(shape)
    axis = reading.int_attribute(node, "axis", -1)
    if shape is None or axis % max(rank, 1) != rank - 1:
        return Refused(f"it normalizes from axis {axis} of {reading.shape_text(x)}; expected -1")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return Refused("its mean or inverse deviation is read")
    epsilon = reading.float_attribute(node, "epsilon", 1e-5)
    given = reading.optional(node, 2)
    beta = reading.constant("beta", np.zeros(shape[-1], np.float32)) if given is None else given
    return _fused(node, x, reading.data(node, 1), beta, epsilon)


def _fused(
    node: ir.Node, x: ir.Value, gamma: ir.Value, beta: ir.Value, epsilon: float
) -> Replacement | Refused:
    """The fused operator in place of the node's result."""
    channels = (reading.shape_of(x) or (0,))[-1]
    for name, value in (("gamma", gamma), ("beta", beta)):
        held = value.const_value.numpy() if value.const_value is not None else None
        if held is None or held.dtype != np.float32 or held.shape != (channels,):
            return Refused(f"{name} {value.name!r} is not a float32 constant of {channels} numbers")
    if x.dtype != ir.DataType.FLOAT:
        return Refused(f"its input is {x.dtype}; expected float32")
    new = ops.make_node(
        ops.Variant("LayerNorm"),
        {"x": x, "gamma": gamma, "beta": beta},
        {"epsilon": epsilon},
        node,
    )
    return Replacement(node.outputs[0], new.outputs[0], (new,))


def _decomposed(node: ir.Node) -> Replacement | Refused | None:
    """The quotient d / Sqrt(...), up to the last factor and summand that can belong to it."""
    if not reading.is_op(node, "Div"):
        return None
    centred, deviation = reading.data(node), reading.data(node, 1)
    x = _centred(centred)
    epsilon = None if x is None else _epsilon(deviation, x)
    if x is None or epsilon is None:
        return None
    channels = (reading.shape_of(x) or (0,))[-1]
    last, gamma = _with_constant(node, "Mul", channels)
    if gamma is None:
        gamma = reading.constant("gamma", np.ones(channels, np.float32))
    last, beta = _with_constant(last, "Add", channels)
    if beta is None:
        beta = reading.constant("beta", np.zeros(channels, np.float32))
    return _fused(last, x, gamma, beta, epsilon)


def _with_constant(node: ir.Node, op_type: str, channels: int) -> tuple[ir.Node, ir.Value | None]:
    """The node that alone reads the result and joins it with a constant; else the node itself."""
    reader = reading.sole_reader(node.outputs[0])
    if isinstance(reader, str) or not reading.is_op(reader, op_type):
        return node, None
    for value in reader.inputs:
        held = reading.array(value)
        if value is not None and held is not None and held.shape == (channels,):
            return reader, value
    return node, None


def _centred(value: ir.Value) -> ir.Value | None:
    """The x of x - ReduceMean(x)."""
    node = value.producer()
    if node is None or not reading.is_op(node, "Sub"):
        return None
    x = reading.data(node)
    return x if _mean_of(reading.data(node, 1)) is x else None


def _mean_of(value: ir.Value) -> ir.Value | None:
    """What a ReduceMean over the last axis reads."""
    node = value.producer()
    if node is None or not reading.is_op(node, "ReduceMean"):
        return None
    x = reading.data(node)
    axes = reading.int_list(node, 1) or reading.ints_attribute(node, "axes", ())
    rank = 0 if x.shape is None else len(x.shape)
    if not rank or [axis % rank for axis in axes] != [rank - 1]:
        return None
    return x if reading.int_attribute(node, "keepdims", 1) else None


def _epsilon(value: ir.Value, x: ir.Value) -> float | None:
    """The epsilon of Sqrt(ReduceMean((x - mean)^2) + epsilon)."""
    root = value.producer()
    if root is None or not reading.is_op(root, "Sqrt"):
        return None
    total = reading.data(root).producer()
    if total is None or not reading.is_op(total, "Add"):
        return None
    for index in (0, 1):
        number = reading.array(total.inputs[index])
        square = _mean_of(reading.data(total, 1 - index))
        if number is not None and number.size == 1 and square is not None and _is_square(square, x):
            return float(number.reshape(()))
    return None


def _is_square(value: ir.Value, x: ir.Value) -> bool:
    """Whether the value is (x - ReduceMean(x)) squared."""
    node = value.producer()
    if node is None or not reading.is_op(node, "Mul", "Pow"):
        return False
    base, other = reading.data(node), reading.data(node, 1)
    if node.op_type == "Pow":
        power = reading.array(other)
        if power is None or power.size != 1 or float(power.reshape(())) != 2.0:
            return False
        other = base
    return _centred(base) is x and _centred(other) is x

"""Which nodes are activations that kernels have, and how one is written as a node."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import reading
from twofour.core.approximations import SIXTH
from twofour.core.functions import Activation

HIGHEST = float(np.finfo(np.float32).max)
LOWEST = -HIGHEST
_STANDARD = ("Relu", "HardSwish", "Sigmoid", "Tanh")
_OWN = ("Silu", "Gelu", "GeluTanh")
_CLOSE = 1e-4  # exporters write constants with 4 to 9 digits


def near(value: float, wanted: float) -> bool:
    """Whether a constant of a model stands for `wanted`."""
    return math.isclose(value, wanted, rel_tol=_CLOSE)


def read(node: ir.Node | None) -> Activation | str | None:
    """The activation that a float32 node applies to its first input.

    Returns:
        The activation; why the kernels lack this one; or None, where the node is none at all.
    """
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    if ops.is_fused(node):
        return Activation(node.op_type) if node.op_type in _OWN else None
    if not reading.is_op(node, *_STANDARD, "HardSigmoid", "Clip"):
        return None
    if reading.data(node).dtype != ir.DataType.FLOAT:
        return f"its input is {reading.data(node).dtype}; expected float32"
    if node.op_type == "Clip":
        return _clip(node)
    if node.op_type == "HardSigmoid":
        return _hard_sigmoid(node)
    return Activation(node.op_type)


def _clip(node: ir.Node) -> Activation | str:
    """Clip, where its bounds are known and in order."""
    ends = []
    for index, missing in ((1, LOWEST), (2, HIGHEST)):
        value = reading.optional(node, index)
        contents = reading.array(value)
        if value is not None and (contents is None or contents.size != 1):
            return f"its bound {value.name!r} is not one constant number"
        ends.append(missing if contents is None else float(contents.reshape(-1)[0]))
    low, high = max(ends[0], LOWEST), min(ends[1], HIGHEST)
    if not ends[0] <= ends[1]:
        return f"it clips to [{ends[0]:.6g}, {ends[1]:.6g}]; expected low <= high"
    if (low, high) == (0.0, HIGHEST):
        return Activation("Relu")
    return Activation("Clip", low, high)


def _hard_sigmoid(node: ir.Node) -> Activation | str:
    alpha = reading.float_attribute(node, "alpha", 0.2)
    beta = reading.float_attribute(node, "beta", 0.5)
    if near(alpha, SIXTH) and near(beta, 0.5):
        return Activation("HardSigmoid")
    return f"its alpha and beta are {alpha:.6g} and {beta:.6g}; expected 1/6 and 1/2"


def write(activation: Activation, x: ir.Value, name: str | None) -> ir.Node:
    """The node that applies the activation to x; its result has the shape and type of x."""
    inputs: list[ir.Value | None] = [x]
    attributes: dict[str, float] = {}
    if activation.name == "HardSigmoid":
        attributes = {"alpha": SIXTH, "beta": 0.5}
    if activation.name == "Clip":
        for end in ("low", "high"):
            number = np.array(getattr(activation, end), np.float32)
            inputs.append(reading.constant(f"{x.name}_{end}", number))
    domain = ops.DOMAIN if activation.name in _OWN else ""
    node = ir.node(activation.name, inputs, attributes, domain=domain, name=name)
    node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
    return node


def attributes(activation: Activation) -> dict[str, float]:
    """What a fused operator says about its activation besides the name."""
    return {"low": activation.low, "high": activation.high} if activation.name == "Clip" else {}

"""Writes the normalizations of ONNX Runtime as standard operators.

    LayerNormalization(x, gamma [, beta])             ->  the same of the standard domain
    SkipLayerNormalization(x, skip, gamma [, beta] [, bias])  ->  the same of x + skip + bias
    SimplifiedLayerNormalization(x, gamma)            ->  without the mean
    SkipSimplifiedLayerNormalization(x, skip, gamma [, bias])  ->  the same of x + skip + bias

    Without the mean: x / Sqrt(ReduceMean(x * x) + epsilon) * gamma. Those without
    Skip stand in the standard domain of older opsets, which lacks them; the importer moves them.

Conditions:
    1. the input is float32
    2. nobody reads the mean or the deviation
    3. it normalizes the last axis, where it goes without the mean
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.compiler.passes.unfuse import number, replaced

NAME = "unfuse_norm"
_PLAIN = ("LayerNormalization", "SimplifiedLayerNormalization")
_SKIP = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_EPSILON = {"LayerNormalization": 1e-5, "SimplifiedLayerNormalization": 1e-5}


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_contrib(node, *_PLAIN, *_SKIP):
        return None
    x = reading.data(node)
    if x.dtype != ir.DataType.FLOAT:
        return Refused(f"its input is {x.dtype}; expected float32")
    statistics = node.outputs[1:3] if node.op_type in _SKIP else node.outputs[1:]
    if any(value.uses() or value.is_graph_output() for value in statistics):
        return Refused("somebody reads its mean or its deviation")
    simple = "Simplified" in node.op_type
    axis = reading.int_attribute(node, "axis", -1)
    if simple and axis != -1 and (x.shape is None or axis != len(x.shape) - 1):
        return Refused(f"it normalizes from axis {axis} on; expected the last one")
    total, gamma, beta = _operands(node, x, simple)
    epsilon = reading.float_attribute(node, "epsilon", _EPSILON.get(node.op_type, 1e-12))
    if simple:
        result = _simplified(total, gamma, epsilon)
    else:
        result = reading.made(
            "LayerNormalization", [total, gamma, beta], axis=axis, epsilon=epsilon
        )
    found = replaced(node, result)
    if len(node.outputs) < 4 or total is x:
        return found
    return Replacement(found.old, found.new, found.nodes, more=((node.outputs[3], total),))


def _operands(
    node: ir.Node, x: ir.Value, simple: bool
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """What is normalized, and the factors and offsets."""
    if node.op_type in _PLAIN:
        return x, reading.data(node, 1), reading.optional(node, 2)
    total = reading.made("Add", [x, reading.data(node, 1)])
    bias = reading.optional(node, 3 if simple else 4)
    if bias is not None:
        total = reading.made("Add", [total, bias])
    return total, reading.data(node, 2), None if simple else reading.optional(node, 3)


def _simplified(x: ir.Value, gamma: ir.Value, epsilon: float) -> ir.Value:
    """Computes x / Sqrt(ReduceMean(x * x) + epsilon) * gamma."""
    square = reading.made("Mul", [x, x])
    axes = reading.constant("axes", np.array([-1], np.int64))
    opset = 18
    graph = x.graph
    if isinstance(graph, ir.Graph):
        opset = graph.opset_imports.get("", opset)
    if opset >= 18:
        mean = reading.made("ReduceMean", [square, axes])
    else:
        mean = reading.made("ReduceMean", [square], axes=[-1])
    root = reading.made("Sqrt", [reading.made("Add", [mean, number("epsilon", epsilon)])])
    return reading.made("Mul", [reading.made("Div", [x, root]), gamma])

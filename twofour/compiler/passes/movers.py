"""The operators that only move or choose elements, and so commute with a per-tensor quantizer.

    op(DQ(x)) = DQ(op(x))   and   Q(op(x)) = op(Q(x))

DQ and Q are monotone functions of single elements. Reshape, Flatten, Squeeze, Unsqueeze, Transpose,
Slice, Gather, Expand, Tile and Resize to the nearest neighbour only move or repeat elements,
MaxPool chooses the largest one, and Pad with a constant c adds elements: DQ(p) = c resp. p = Q(c).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.quantizers import PerTensor
from twofour.core import numerics

_SHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
_MOVERS = (*_SHAPES, "Slice", "Gather", "Expand", "Tile", "MaxPool", "Pad")


def is_mover(node: ir.Node | None) -> bool:
    """Whether the node is one of these operators."""
    if node is not None and reading.is_op(node, "Resize"):
        return reading.string_attribute(node, "mode", "nearest") == "nearest"
    return reading.is_op(node, *_MOVERS)


def commuted(node: ir.Node, x: ir.Value, params: PerTensor, *, exact: bool) -> ir.Node | str:
    """The same operator on the quantized tensor, or why there is none.

    Args:
        node: a mover, on float.
        x: the quantized tensor it shall read instead.
        params: of the quantizer.
        exact: a pad constant must be a value of the quantized type, not be rounded to one.
    """
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its indices are read"
    inputs = [x, *node.inputs[1:]]
    if node.op_type == "Pad" and reading.string_attribute(node, "mode", "constant") == "constant":
        value = _pad_value(node, params, exact=exact)
        if isinstance(value, str):
            return value
        inputs = [x, node.inputs[1], value, *node.inputs[3:]]
    new = ir.node(
        node.op_type,
        inputs,
        name=node.name,
    )
    for attribute in node.attributes.values():
        new.attributes.add(attribute)
    new.outputs[0].shape = node.outputs[0].shape
    new.outputs[0].type = ir.TensorType(params.dtype)
    return new


def _pad_value(node: ir.Node, params: PerTensor, *, exact: bool) -> ir.Value | str:
    """The pad constant, quantized."""
    given = reading.optional(node, 2)
    contents = reading.array(given)
    if given is not None and contents is None:
        return "it pads with a value computed at run time"
    real = float(contents.reshape(())) if contents is not None else 0.0
    dtype = params.dtype.numpy()
    scale, zero_point = params.scale_number, params.zero_point_number
    q = numerics.quantize(np.array(real, np.float32), scale, zero_point, dtype)
    if exact and numerics.dequantize(q, scale, zero_point) != np.float32(real):
        return f"it pads with {real:g}, which is no multiple of the scale {scale:g}"
    return reading.constant(f"{node.name}_value", q)

"""Gives QuantizeLinear and DequantizeLinear one spelling.

    DequantizeLinear(x, scale[1])                  ->  DequantizeLinear(x, scale[], zero_point[])
    DequantizeLinear<axis = -1>(x, scale[N], z[N]) ->  DequantizeLinear<axis = 1>(x, scale[N], z[N])

An absent zero point is 0, of the type of x resp. of the output (uint8 unless output_dtype says
otherwise); a scale of one element is the same for every axis. int32, the type of quantized biases,
is left as it is.

Conditions:
    1. scale and zero point are constants
    2. the scale is float32
    3. the scale is per tensor or per axis, not in blocks
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "canonical_quantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "QuantizeLinear", "DequantizeLinear"):
        return None
    x = reading.data(node)
    dtype = _dtype(node)
    if dtype is None or dtype == ir.DataType.INT32:
        return None
    zero_point_value = reading.optional(node, 2)
    scale, zero_point = reading.array(node.inputs[1]), reading.array(zero_point_value)
    if scale is None or (zero_point_value is not None and zero_point is None):
        return Refused("its scale or zero point is computed at run time")
    if scale.dtype != np.float32:
        return Refused(f"its scale is {scale.dtype}; expected float32")
    if reading.int_attribute(node, "block_size", 0) or scale.ndim > 1:
        return Refused("it is quantized in blocks; expected per tensor or per axis")
    if zero_point is None:
        zero_point = np.zeros(scale.shape, dtype.numpy())
    if scale.size == 1:
        return _per_tensor(node, scale, zero_point)
    axis = reading.int_attribute(node, "axis", 1)
    if zero_point_value is not None and axis >= 0:
        return None
    if x.shape is None:
        return Refused(f"{x.name!r} has no known number of dimensions, its axis is {axis}")
    attributes = {"axis": axis % len(x.shape)}
    return _respell(node, node.inputs[1], reading.constant("zero_point", zero_point), attributes)


def _dtype(node: ir.Node) -> ir.DataType | None:
    """The quantized type, where no zero point tells it."""
    if node.op_type == "DequantizeLinear":
        return reading.data(node).dtype
    return ir.DataType(reading.int_attribute(node, "output_dtype", 0) or ir.DataType.UINT8.value)


def _per_tensor(
    node: ir.Node, scale: reading.Array, zero_point: reading.Array
) -> Replacement | None:
    """The node with scalar parameters and no attributes."""
    if len(node.inputs) == 3 and not scale.ndim and not zero_point.ndim and not node.attributes:
        return None
    stem = node.inputs[1].name if node.inputs[1] is not None else "scale"
    return _respell(
        node,
        reading.constant(f"{stem}_scalar", scale.reshape(())),
        reading.constant(f"{stem}_zero_point", zero_point.reshape(())),
        {},
    )


def _respell(
    node: ir.Node, scale: ir.Value | None, zero_point: ir.Value, attributes: dict[str, int]
) -> Replacement:
    """The same operator with other parameters."""
    inputs = [node.inputs[0], scale, zero_point]
    new = ir.node(node.op_type, inputs, attributes, name=node.name)
    return Replacement(node.outputs[0], new.outputs[0], (new,))

"""Turns pooling of quantized tensors into integer operators.

    MaxPool(x int8)                         ->  twofour.QMaxPool(x)
    GlobalAveragePool(DQ(x)) [-> flat] [-> Q]
        ->  twofour.QGlobalAveragePool[F]<keepdims>(x, x_scale, x_zero_point [, y_scale, ...])
    [Q](AveragePool(DQ(x)))
        ->  twofour.QAveragePool[F](x, x_scale, x_zero_point [, y_scale, y_zero_point])

    ReduceMean over axes 2 and 3 and AveragePool over the whole image are GlobalAveragePool. A
    following Flatten, Reshape or Squeeze to [N, C] becomes keepdims = 0. An integer kernel sums
    exactly, where the nodes round each sum: the mean may differ by one step of y.

Conditions of MaxPool and AveragePool:
    1. two spatial axes, and the shapes of input and result are known
    2. dilations 1, ceil_mode 0, indices not read
Conditions of the averages:
    3. x is dequantized per tensor from int8 or uint8, and has 4 axes
    4. ReduceMean is over the whole of axes 2 and 3
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading, windows
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_integer_pool"
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if reading.is_op(node, "MaxPool"):
        return _max_pool(node)
    if reading.is_op(node, "GlobalAveragePool", "AveragePool", "ReduceMean"):
        return _average(node)
    return None


def _max_pool(node: ir.Node) -> Replacement | Refused | None:
    """MaxPool on bytes."""
    x = reading.data(node)
    if x.dtype not in _BYTES:
        return None
    attributes = _window(node)
    if isinstance(attributes, str):
        return Refused(attributes)
    new = ops.make_node(ops.Variant("QMaxPool"), {"x": x}, attributes, node)
    return Replacement(node.outputs[0], new.outputs[0], (new,))


def _window(node: ir.Node) -> dict[str, Sequence[int]] | str:
    """Window, strides and pads of a pooling, or why no kernel has them."""
    kernel, ones = reading.ints_attribute(node, "kernel_shape", ()), (1, 1)
    shape = reading.shape_of(reading.data(node))
    if shape is None or reading.shape_of(node.outputs[0]) is None:
        return "the shape of its input or result is not known"
    if len(kernel) != 2:
        return f"it pools over {len(kernel)} axes; expected 2"
    if reading.ints_attribute(node, "dilations", ones) != ones:
        return "its window is dilated"
    if reading.int_attribute(node, "ceil_mode", 0):
        return "it rounds its output size up (ceil_mode)"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its indices are read"
    pads = windows.explicit_pads(node, kernel, shape[2:])
    strides = reading.ints_attribute(node, "strides", ones)
    return {"kernel_shape": kernel, "strides": strides, "pads": pads}


def _average(node: ir.Node) -> Replacement | Refused | None:
    """A global average of a dequantized tensor."""
    source = reading.data(node)
    if not reading.is_op(source.producer(), "DequantizeLinear"):
        return None
    x = quantizers.dequantizer(source)
    if isinstance(x, str):
        return Refused(x)
    if node.op_type == "AveragePool" and not _is_whole(node):
        return _window_average(node, x)
    if reason := _not_global(node):
        return Refused(reason)
    keepdims = node.op_type != "ReduceMean" or bool(reading.int_attribute(node, "keepdims", 1))
    inputs = {"x": x.source, "x_scale": x.scale, "x_zero_point": x.zero_point}
    result, flat = _flattened(node.outputs[0])
    y = quantizers.sole_quantizer(result)
    if not isinstance(y, str):
        inputs |= {"y_scale": y.scale, "y_zero_point": y.zero_point}
        result, flat_after = _flattened(y.result)
        flat = flat or flat_after
    variant = ops.Variant("QGlobalAveragePool", float_out=isinstance(y, str))
    attributes = {"keepdims": int(keepdims and not flat)}
    new = ops.make_node(variant, inputs, attributes, node)
    return Replacement(result, new.outputs[0], (new,))


def _window_average(node: ir.Node, x: quantizers.PerTensor) -> Replacement | Refused:
    """An average over windows of a dequantized tensor."""
    attributes = _window(node)
    if isinstance(attributes, str):
        return Refused(attributes)
    include_pad = reading.int_attribute(node, "count_include_pad", 0)
    inputs = {"x": x.source, "x_scale": x.scale, "x_zero_point": x.zero_point}
    old = node.outputs[0]
    y = quantizers.sole_quantizer(old)
    if not isinstance(y, str):
        inputs |= {"y_scale": y.scale, "y_zero_point": y.zero_point}
        old = y.result
    variant = ops.Variant("QAveragePool", float_out=isinstance(y, str))
    new = ops.make_node(variant, inputs, {**attributes, "count_include_pad": include_pad}, node)
    return Replacement(old, new.outputs[0], (new,))


def _not_global(node: ir.Node) -> str:
    """Why the node is not an average over the whole of axes 2 and 3; "" if it is."""
    shape = reading.shape_of(reading.data(node))
    if shape is None or len(shape) != 4:
        return (
            f"its input has shape {reading.shape_text(reading.data(node))}; expected 4 known axes"
        )
    if node.op_type == "ReduceMean":
        axes = reading.ints_attribute(node, "axes", ()) or reading.int_list(node, 1) or ()
        if sorted(axis % 4 for axis in axes) != [2, 3]:
            return f"it averages over axes {list(axes)}; expected 2 and 3"
    return ""


def _is_whole(node: ir.Node) -> bool:
    """Whether the window of an AveragePool is the image."""
    shape = reading.shape_of(reading.data(node))
    kernel = reading.ints_attribute(node, "kernel_shape", ())
    if shape is None or kernel != shape[2:]:
        return False
    return not any(windows.explicit_pads(node, kernel, shape[2:]))


def _flattened(value: ir.Value) -> tuple[ir.Value, bool]:
    """The value after a Flatten, Reshape or Squeeze to [N, C] that alone reads it, if any."""
    reader = reading.sole_reader(value)
    shape = reading.shape_of(value)
    if isinstance(reader, str) or shape is None:
        return value, False
    if not reading.is_op(reader, "Flatten", "Reshape", "Squeeze"):
        return value, False
    if reading.shape_of(reader.outputs[0]) != shape[:2]:
        return value, False
    return reader.outputs[0], True

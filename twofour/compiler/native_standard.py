"""Standard ONNX nodes read as native operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import (
    QUANTIZED,
    REAL,
    TYPES,
    Array,
    MapOp,
    NativeOp,
    NotNative,
    PoolOp,
    activation_map,
    constant,
    extent,
    name_of,
    operand,
    shape,
    stored,
    window_of,
)
from twofour.compiler.native_resize import read_linear
from twofour.compiler.passes import activations, windows
from twofour.core.functions import Activation
from twofour.kernels.cpu.pointwise import MapConstants


def _per_tensor(node: ir.Node) -> tuple[float, Array]:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear over a whole tensor."""
    scale = constant(node.inputs[1])
    if scale.size != 1:
        raise NotNative("quantized per channel")
    zero = (
        constant(node.inputs[2])
        if len(node.inputs) > 2 and node.inputs[2] is not None
        else np.zeros(1)
    )
    return float(scale.reshape(-1)[0]), zero.reshape(-1)[0]


def _quantize(node: ir.Node) -> MapOp:
    x, y = _ends(node)
    if x.dtype != ir.DataType.FLOAT or y.dtype not in QUANTIZED:
        raise NotNative(f"quantizes {x.dtype} to {y.dtype}")
    scale, zero = _per_tensor(node)
    return MapOp(
        node.name or "",
        node.op_type,
        "map",
        operand(x),
        name_of(y),
        op="convert",
        constants=MapConstants(y_scale=scale, y_zero=stored(zero, y.dtype)),
    )


def _dequantize(node: ir.Node) -> MapOp:
    x, y = _ends(node)
    if x.dtype not in QUANTIZED or y.dtype != ir.DataType.FLOAT:
        raise NotNative(f"dequantizes {x.dtype} to {y.dtype}")
    scale, zero = _per_tensor(node)
    return MapOp(
        node.name or "",
        node.op_type,
        "map",
        operand(x),
        name_of(y),
        op="convert",
        constants=MapConstants(x_scale=scale, x_zero=stored(zero, x.dtype)),
    )


def _cast(node: ir.Node) -> MapOp:
    x, y = _ends(node)
    if x.dtype not in REAL or y.dtype not in REAL:
        raise NotNative(f"casts {x.dtype} to {y.dtype}")
    return MapOp(node.name or "", node.op_type, "map", operand(x), name_of(y), op="convert")


def _ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Input and output; ranks the native layout can hold."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or not 2 <= len(shape(x)) <= 4 or not 2 <= len(shape(y)) <= 4:
        raise NotNative("native tensors have 2 to 4 dimensions")
    return x, y


def _float_ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x, y = _ends(node)
    if x.dtype != ir.DataType.FLOAT:
        raise NotNative(f"native kernels take float32 and quantized tensors, not {x.dtype}")
    return x, y


def _activation(node: ir.Node) -> MapOp:
    x, y = _float_ends(node)
    activation = activations.read(node)
    if not isinstance(activation, Activation):
        raise NotNative(activation or "the operator has another meaning")
    return activation_map(node.name or "", node.op_type, (x, y), activation)


def _add(node: ir.Node) -> MapOp:
    x, y = _float_ends(node)
    other = node.inputs[1]
    if other is None or other.const_value is not None or shape(other) != shape(x):
        raise NotNative("the operands of the addition are broadcast")
    return MapOp(node.name or "", "Add", "map", operand(x), name_of(y), operand(other), op="add")


def _mean(node: ir.Node) -> PoolOp:
    x, y = _float_ends(node)
    if len(shape(x)) != 4:
        raise NotNative("native pooling is 2-D")
    if node.op_type == "ReduceMean" and sorted(a % 4 for a in _axes(node)) != [2, 3]:
        raise NotNative("averages over something other than the image")
    return PoolOp(node.name or "", node.op_type, "pool", operand(x), name_of(y), op="mean")


def _axes(node: ir.Node) -> list[int]:
    """The axes of a reduction: an attribute, or from opset 18 on an input."""
    given = node.attributes.get("axes")
    if given is not None:
        return list(given.as_ints())
    if len(node.inputs) < 2 or node.inputs[1] is None:
        raise NotNative("averages over all axes")
    return [int(a) for a in constant(node.inputs[1]).reshape(-1)]


def _max(node: ir.Node) -> PoolOp:
    x, y = _float_ends(node)
    get = node.attributes
    kernel, dilations = get["kernel_shape"].as_ints(), get.get_ints("dilations", (1, 1))
    if len(kernel) != 2:
        raise NotNative("native pooling is 2-D")
    if get.get_int("ceil_mode", 0) or get.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise NotNative("a maximum with ceil_mode or auto_pad has no native kernel yet")
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise NotNative("the indices of the maximum are read")
    strides, pads = get.get_ints("strides", (1, 1)), get.get_ints("pads", (0, 0, 0, 0))
    window = window_of(kernel, strides, dilations, pads)
    return PoolOp(
        node.name or "", "MaxPool", "pool", operand(x), name_of(y), op="max", window=window
    )


def _average(node: ir.Node) -> PoolOp:
    x, y = _float_ends(node)
    kernel = tuple(node.attributes["kernel_shape"].as_ints())
    if len(kernel) != 2:
        raise NotNative("native pooling is 2-D")
    if node.attributes.get_int("ceil_mode", 0):
        raise NotNative("an average with ceil_mode has no native kernel yet")
    strides, dilations = (node.attributes.get_ints(n, (1, 1)) for n in ("strides", "dilations"))
    pads = windows.explicit_pads(node, kernel, shape(x)[2:])
    return PoolOp(
        node.name or "",
        "AveragePool",
        "pool",
        operand(x),
        name_of(y),
        op="average",
        window=window_of(kernel, strides or (1, 1), dilations or (1, 1), pads),
        include_pad=bool(node.attributes.get_int("count_include_pad", 0)),
    )


def _alias(node: ir.Node) -> NativeOp:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.dtype not in TYPES:
        raise NotNative("native kernels take float32 and quantized tensors")
    before, after = shape(x), shape(y)
    if not before or not after or extent(before) != extent(after):
        raise NotNative("the reshape would reorder a channels-last tensor")
    return NativeOp(node.name or "", node.op_type, "alias", operand(x), name_of(y))


READERS = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Cast": _cast,
    **dict.fromkeys(("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh"), _activation),
    "Add": _add,
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "MaxPool": _max,
    "AveragePool": _average,
    "Resize": read_linear,
    "Reshape": _alias,
    "Flatten": _alias,
    "Squeeze": _alias,
    "Unsqueeze": _alias,
}

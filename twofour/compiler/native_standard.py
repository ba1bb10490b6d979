"""Standard ONNX nodes read as native operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import (
    QUANTIZED,
    Array,
    MapOp,
    NativeOp,
    NotNative,
    PoolOp,
    constant,
    name_of,
    shape,
    stored,
)
from twofour.core.numerics import Window
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
        name_of(x),
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
        name_of(x),
        name_of(y),
        op="convert",
        constants=MapConstants(x_scale=scale, x_zero=stored(zero, x.dtype)),
    )


def _ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Input and output; ranks the native layout can hold."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or len(shape(x)) not in (2, 4) or len(shape(y)) not in (2, 4):
        raise NotNative("native tensors have 2 or 4 dimensions")
    return x, y


def _float_ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x, y = _ends(node)
    if x.dtype != ir.DataType.FLOAT:
        raise NotNative(f"native kernels take float32 and quantized tensors, not {x.dtype}")
    return x, y


def _relu(node: ir.Node) -> MapOp:
    x, y = _float_ends(node)
    return MapOp(node.name or "", "Relu", "map", name_of(x), name_of(y), op="convert", relu=True)


def _add(node: ir.Node) -> MapOp:
    x, y = _float_ends(node)
    other = node.inputs[1]
    if other is None or other.const_value is not None or shape(other) != shape(x):
        raise NotNative("the operands of the addition are broadcast")
    return MapOp(node.name or "", "Add", "map", name_of(x), name_of(y), name_of(other), op="add")


def _mean(node: ir.Node) -> PoolOp:
    x, y = _float_ends(node)
    if node.op_type == "ReduceMean":
        given = node.attributes.get("axes")
        axes = tuple(given.as_ints()) if given else tuple(constant(node.inputs[1]).tolist())
        if sorted(a % len(shape(x)) for a in axes) != [2, 3]:
            raise NotNative(f"averages over axes {axes}, not over the image")
    if len(shape(x)) != 4:
        raise NotNative("native pooling is 2-D")
    return PoolOp(node.name or "", node.op_type, "pool", name_of(x), name_of(y), op="mean")


def _max(node: ir.Node) -> PoolOp:
    x, y = _float_ends(node)
    given = {key: node.attributes[key] for key in node.attributes}
    kernel = tuple(given["kernel_shape"].as_ints())
    extra = {"ceil_mode", "auto_pad", "dilations", "storage_order"} & set(given)
    if len(kernel) != 2 or any(
        a.as_ints() != [1, 1]
        if k == "dilations"
        else a.as_string() != "NOTSET"
        if k == "auto_pad"
        else a.as_int()
        for k, a in given.items()
        if k in extra
    ):
        raise NotNative("a maximum with ceil_mode, auto_pad or dilation has no native kernel yet")
    strides = tuple(given["strides"].as_ints()) if "strides" in given else (1, 1)
    pads = tuple(given["pads"].as_ints()) if "pads" in given else (0, 0, 0, 0)
    return PoolOp(
        node.name or "",
        "MaxPool",
        "pool",
        name_of(x),
        name_of(y),
        op="max",
        window=Window(kernel, strides, (1, 1), pads),
    )  # type: ignore[arg-type]


def _alias(node: ir.Node) -> NativeOp:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.dtype not in (*QUANTIZED, ir.DataType.FLOAT):
        raise NotNative("native kernels take float32 and quantized tensors")
    before, after = shape(x), shape(y)
    if (
        before[0] != after[0]
        or before[1:2] != after[1:2]
        or any(d != 1 for d in (*before[2:], *after[2:]))
    ):
        raise NotNative("the reshape would reorder a channels-last tensor")
    return NativeOp(node.name or "", node.op_type, "alias", name_of(x), name_of(y))


READERS = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Relu": _relu,
    "Add": _add,
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "MaxPool": _max,
    "Reshape": _alias,
    "Flatten": _alias,
    "Squeeze": _alias,
    "Unsqueeze": _alias,
}

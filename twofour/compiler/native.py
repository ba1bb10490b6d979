"""What the native kernels take: a fused node read as a native operator, or the reason why it is none.

Integer tensors are kept as stored bytes here: int8 values plus 128, zero points likewise, so kernels see uint8 only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.compiler.ops import FusedOp, is_fused, parse_op
from twofour.core.numerics import MAX_K, Epilogue, Window
from twofour.kernels.cpu.pointwise import MapConstants

Array = NDArray[Any]
_QUANTIZED = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True)
class NativeOp:
    """One operator for a native kernel.

    Attributes:
        name: of the layer, in the source model's words.
        op_type: of the fused node.
        kind: "conv", "map", "pool" or "alias".
        x: the value it reads.
        y: the value it writes.
        r: the second value it reads, or "".
    """

    name: str
    op_type: str
    kind: str
    x: str
    y: str
    r: str = ""


@dataclass(frozen=True)
class ConvOp(NativeOp):
    """A convolution, or a matrix product as a 1x1 convolution.

    Attributes:
        w: [N, C / groups, KH, KW], int8 or float32.
        window: where it looks.
        groups: number of groups.
        epilogue: constants, zero points as stored.
        x_zero: zero point of x as stored.
        add: dtype of the residual, or "".
    """

    w: Array = field(default_factory=lambda: np.empty(0))
    window: Window = Window((1, 1))
    groups: int = 1
    epilogue: Epilogue = field(default_factory=lambda: Epilogue(np.empty(0), np.empty(0)))
    x_zero: int = 0
    add: str = ""


@dataclass(frozen=True)
class MapOp(NativeOp):
    """An operator that touches each element once, see kernels/cpu/pointwise.py.

    Attributes:
        op: "copy", "convert" or "add".
        constants: scales and zero points.
        relu: negative results become zero.
        steps: the (row, column) steps x is read with.
        channel_pads: channels of y before and after those of x.
    """

    op: str = "copy"
    constants: MapConstants = MapConstants()
    relu: bool = False
    steps: tuple[int, int] = (1, 1)
    channel_pads: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PoolOp(NativeOp):
    """A maximum over windows, or the mean of each channel.

    Attributes:
        op: "max" or "mean".
        window: of the maximum.
        scale: of the mean: x_scale / y_scale (1 for floats).
        x_zero: zero point of x as stored.
        y_zero: zero point of y as stored.
    """

    op: str = "max"
    window: Window = Window((1, 1))
    scale: float = 1.0
    x_zero: int = 0
    y_zero: int = 0


class _No(Exception):
    """A node is not native; the message is the reason."""


def read(node: ir.Node) -> NativeOp | str:
    """The node as a native operator, or why it is none."""
    try:
        if is_fused(node):
            return _FUSED[(op := parse_op(node)).base](op)
        if node.op_type in _STANDARD and node.domain == "":
            return _STANDARD[node.op_type](node)
    except _No as e:
        return str(e)
    return f"no native kernel for {node.domain + '.' if node.domain else ''}{node.op_type}"


def constant(value: ir.Value | None) -> Array:
    """The contents of an initializer; an empty value is no array."""
    if value is None or value.const_value is None:
        raise _No(f"{'an input' if value is None else value.name} is not a constant")
    return value.const_value.numpy()


def shape(value: ir.Value) -> tuple[int, ...]:
    """The static shape."""
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        raise _No(f"the shape of {value.name} is not known")
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def _stored(zero_point: Array, dtype: ir.DataType | None) -> int:
    """A zero point as stored."""
    return int(zero_point) + (128 if dtype == ir.DataType.INT8 else 0)


def _name(value: ir.Value) -> str:
    return value.name or ""


def _conv(op: FusedOp) -> ConvOp:
    strides, pads, dilations = (op.attributes[key] for key in ("strides", "pads", "dilations"))
    w = constant(op.inputs["w"])
    if w.ndim != 4:
        raise _No(f"native convolutions are 2-D, this one has weights {list(w.shape)}")
    window = Window(w.shape[2:], strides, dilations, pads)  # type: ignore[arg-type]
    return _product(op, w, window, int(op.attributes["group"]))  # type: ignore[arg-type]


def _gemm(op: FusedOp) -> ConvOp:
    w = constant(op.inputs["w"])
    return _product(op, w[:, :, None, None], Window((1, 1)), 1)


def _product(op: FusedOp, w: Array, window: Window, groups: int) -> ConvOp:
    """The part that Conv and Gemm, integer and float, have in common."""
    for value in (op.inputs["x"], op.output):
        shape(value)
    quantized = op.base.startswith("Q")
    if quantized and w[0].size > MAX_K:
        raise _No(f"sums of {w[0].size} products may overflow int32 (limit {MAX_K})")
    if not quantized and op.inputs["x"].dtype != ir.DataType.FLOAT:
        raise _No(f"native kernels take float32 and quantized tensors, not {op.inputs['x'].dtype}")
    if w.shape[1] * groups >= 4 and w.shape[1] == 1 and groups > 1 and w.shape[0] == groups:
        raise _No("depthwise convolution has no native kernel yet")
    if op.has_add and shape(op.inputs["res"]) != shape(op.output):
        raise _No(f"the residual is broadcast from {list(shape(op.inputs['res']))}")
    add = "" if not op.has_add else "float32" if op.add_is_float else "int8"
    return ConvOp(
        op.name,
        op.op_type,
        "conv",
        _name(op.inputs["x"]),
        _name(op.output),
        _name(op.inputs["res"]) if op.has_add else "",
        w=w,
        window=window,
        groups=groups,
        epilogue=_epilogue(op, quantized),
        add=add,
        x_zero=_stored(constant(op.inputs["x_zero_point"]), op.inputs["x"].dtype)
        if quantized
        else 0,
    )


def _epilogue(op: FusedOp, quantized: bool) -> Epilogue:
    """Scales divided by y_scale, in float64 and then rounded once."""
    bias = constant(op.inputs["bias"]).astype(np.float64)
    if not quantized:
        return Epilogue(np.ones(bias.shape, np.float32), bias.astype(np.float32), 1.0, 0, op.relu)
    out = op.output.dtype in _QUANTIZED
    y_scale = float(constant(op.inputs["y_scale"])) if out else 1.0
    sums = float(constant(op.inputs["x_scale"])) * constant(op.inputs["w_scale"]).astype(np.float64)
    residual_scale, residual_zero = 0.0, 0
    if op.has_add and op.add_is_float:
        residual_scale = 1.0 / y_scale
    elif op.has_add:
        residual_scale = float(constant(op.inputs["res_scale"])) / y_scale
        residual_zero = _stored(constant(op.inputs["res_zero_point"]), op.inputs["res"].dtype)
    return Epilogue(
        scale=np.broadcast_to(sums / y_scale, bias.shape).astype(np.float32),
        bias=(bias / y_scale).astype(np.float32),
        residual_scale=float(np.float32(residual_scale)),
        residual_zero_point=residual_zero,
        relu=op.relu,
        zero_point=_stored(constant(op.inputs["y_zero_point"]), op.output.dtype) if out else None,
        unsigned=True,
    )


def _quantized_add(op: FusedOp) -> MapOp:
    if shape(op.inputs["a"]) != shape(op.inputs["b"]):
        raise _No("the operands of the addition are broadcast")
    constants = MapConstants(
        x_scale=float(constant(op.inputs["a_scale"])),
        x_zero=_stored(constant(op.inputs["a_zero_point"]), op.inputs["a"].dtype),
        r_scale=float(constant(op.inputs["b_scale"])),
        r_zero=_stored(constant(op.inputs["b_zero_point"]), op.inputs["b"].dtype),
        y_scale=float(constant(op.inputs["y_scale"])),
        y_zero=_stored(constant(op.inputs["y_zero_point"]), op.output.dtype),
    )
    return MapOp(
        op.name,
        op.op_type,
        "map",
        _name(op.inputs["a"]),
        _name(op.output),
        _name(op.inputs["b"]),
        op="add",
        constants=constants,
        relu=op.relu,
    )


def _quantized_mean(op: FusedOp) -> PoolOp:
    x_scale, quantized = float(constant(op.inputs["x_scale"])), not op.float_out
    return PoolOp(
        op.name,
        op.op_type,
        "pool",
        _name(op.inputs["x"]),
        _name(op.output),
        op="mean",
        scale=x_scale / float(constant(op.inputs["y_scale"])) if quantized else x_scale,
        x_zero=_stored(constant(op.inputs["x_zero_point"]), op.inputs["x"].dtype),
        y_zero=_stored(constant(op.inputs["y_zero_point"]), op.output.dtype) if quantized else 0,
    )


def _quantized_max(op: FusedOp) -> PoolOp:
    kernel, strides, pads = (op.attributes[key] for key in ("kernel_shape", "strides", "pads"))
    if len(kernel) != 2:  # type: ignore[arg-type]
        raise _No("native pooling is 2-D")
    return PoolOp(
        op.name,
        op.op_type,
        "pool",
        _name(op.inputs["x"]),
        _name(op.output),
        op="max",
        window=Window(kernel, strides, (1, 1), pads),
    )  # type: ignore[arg-type]


def _slice_pad(op: FusedOp) -> MapOp:
    x = op.inputs["x"]
    if x.dtype not in (*_QUANTIZED, ir.DataType.FLOAT):
        raise _No(f"native kernels take float32 and quantized tensors, not {x.dtype}")
    value = constant(op.inputs["value"])
    if x.dtype == ir.DataType.FLOAT and float(value) != 0.0:
        raise _No("channels are padded with something other than zero")
    return MapOp(
        op.name,
        op.op_type,
        "map",
        _name(x),
        _name(op.output),
        op="copy",
        constants=MapConstants(y_zero=_stored(value, x.dtype) if x.dtype in _QUANTIZED else 0),
        steps=op.attributes["steps"],
        channel_pads=op.attributes["channel_pads"],  # type: ignore[arg-type]
    )


def _per_tensor(node: ir.Node) -> tuple[float, Array]:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear over a whole tensor."""
    scale = constant(node.inputs[1])
    if scale.size != 1:
        raise _No("quantized per channel")
    zero = (
        constant(node.inputs[2])
        if len(node.inputs) > 2 and node.inputs[2] is not None
        else np.zeros(1)
    )
    return float(scale.reshape(-1)[0]), zero.reshape(-1)[0]


def _quantize(node: ir.Node) -> MapOp:
    x, y = _ends(node)
    if x.dtype != ir.DataType.FLOAT or y.dtype not in _QUANTIZED:
        raise _No(f"quantizes {x.dtype} to {y.dtype}")
    scale, zero = _per_tensor(node)
    return MapOp(
        node.name or "",
        node.op_type,
        "map",
        _name(x),
        _name(y),
        op="convert",
        constants=MapConstants(y_scale=scale, y_zero=_stored(zero, y.dtype)),
    )


def _dequantize(node: ir.Node) -> MapOp:
    x, y = _ends(node)
    if x.dtype not in _QUANTIZED or y.dtype != ir.DataType.FLOAT:
        raise _No(f"dequantizes {x.dtype} to {y.dtype}")
    scale, zero = _per_tensor(node)
    return MapOp(
        node.name or "",
        node.op_type,
        "map",
        _name(x),
        _name(y),
        op="convert",
        constants=MapConstants(x_scale=scale, x_zero=_stored(zero, x.dtype)),
    )


def _ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Input and output; ranks the native layout can hold."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or len(shape(x)) not in (2, 4) or len(shape(y)) not in (2, 4):
        raise _No("native tensors have 2 or 4 dimensions")
    return x, y


def _float_ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x, y = _ends(node)
    if x.dtype != ir.DataType.FLOAT:
        raise _No(f"native kernels take float32 and quantized tensors, not {x.dtype}")
    return x, y


def _relu(node: ir.Node) -> MapOp:
    x, y = _float_ends(node)
    return MapOp(node.name or "", "Relu", "map", _name(x), _name(y), op="convert", relu=True)


def _add(node: ir.Node) -> MapOp:
    x, y = _float_ends(node)
    other = node.inputs[1]
    if other is None or other.const_value is not None or shape(other) != shape(x):
        raise _No("the operands of the addition are broadcast")
    return MapOp(node.name or "", "Add", "map", _name(x), _name(y), _name(other), op="add")


def _mean(node: ir.Node) -> PoolOp:
    x, y = _float_ends(node)
    if node.op_type == "ReduceMean":
        given = node.attributes.get("axes")
        axes = tuple(given.as_ints()) if given else tuple(constant(node.inputs[1]).tolist())
        if sorted(a % len(shape(x)) for a in axes) != [2, 3]:
            raise _No(f"averages over axes {axes}, not over the image")
    if len(shape(x)) != 4:
        raise _No("native pooling is 2-D")
    return PoolOp(node.name or "", node.op_type, "pool", _name(x), _name(y), op="mean")


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
        raise _No("a maximum with ceil_mode, auto_pad or dilation has no native kernel yet")
    strides = tuple(given["strides"].as_ints()) if "strides" in given else (1, 1)
    pads = tuple(given["pads"].as_ints()) if "pads" in given else (0, 0, 0, 0)
    return PoolOp(
        node.name or "",
        "MaxPool",
        "pool",
        _name(x),
        _name(y),
        op="max",
        window=Window(kernel, strides, (1, 1), pads),
    )  # type: ignore[arg-type]


def _alias(node: ir.Node) -> NativeOp:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.dtype not in (*_QUANTIZED, ir.DataType.FLOAT):
        raise _No("native kernels take float32 and quantized tensors")
    before, after = shape(x), shape(y)
    if (
        before[0] != after[0]
        or before[1:2] != after[1:2]
        or any(d != 1 for d in (*before[2:], *after[2:]))
    ):
        raise _No("the reshape would reorder a channels-last tensor")
    return NativeOp(node.name or "", node.op_type, "alias", _name(x), _name(y))


_FUSED = {
    "QConv": _conv,
    "Conv": _conv,
    "QGemm": _gemm,
    "Gemm": _gemm,
    "QAdd": _quantized_add,
    "QGlobalAveragePool": _quantized_mean,
    "QMaxPool": _quantized_max,
    "SlicePad": _slice_pad,
}
_STANDARD = {
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

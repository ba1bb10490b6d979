"""Fused nodes read as native operators."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import (
    QUANTIZED,
    REAL,
    TYPES,
    Array,
    ConvOp,
    MapOp,
    NotNative,
    PoolOp,
    activation_map,
    constant,
    name_of,
    operand,
    shape,
    stored,
    window_of,
)
from twofour.compiler.ops import FusedOp
from twofour.core.dynamic import ROW, ROW_ZERO, TENSOR
from twofour.core.functions import NO_ACTIVATION, Activation
from twofour.core.gates import Gate
from twofour.core.numerics import MAX_K, Epilogue, Window
from twofour.kernels.cpu.pointwise import MapConstants


def _ints(op: FusedOp, name: str) -> tuple[int, ...]:
    """The integers of an attribute, one or several."""
    value = op.attributes[name]
    return value if isinstance(value, tuple) else (int(value),)


def _pair(op: FusedOp, name: str) -> tuple[int, int]:
    """An attribute of two integers."""
    first, second = _ints(op, name)
    return first, second


def _conv(op: FusedOp) -> ConvOp:
    strides, pads, dilations = (_ints(op, key) for key in ("strides", "pads", "dilations"))
    (groups,) = _ints(op, "group")
    w = _weight(op)
    if w.ndim != 4:
        raise NotNative(f"native convolutions are 2-D, this one has weights {list(w.shape)}")
    return _product(op, w, window_of(w.shape[2:], strides, dilations, pads), groups)


def _gemm(op: FusedOp) -> ConvOp:
    w = _weight(op)
    if len(shape(op.inputs["x"])) == 4:
        raise NotNative("native matrix products take tensors of at most 3 dimensions")
    return _product(op, w[:, :, None, None], Window((1, 1)), 1)


def _weight(op: FusedOp) -> Array:
    """The weight, int8 or float32."""
    w = constant(op.inputs["w"])
    return w if w.dtype == np.int8 else w.astype(np.float32)


def _require_shapes(op: FusedOp) -> None:
    """Refuses an operator whose sizes are not known when the engine is built."""
    for value in (op.inputs["x"], op.output):
        shape(value)


def _product(op: FusedOp, w: Array, window: Window, groups: int) -> ConvOp:
    """The part that Conv and Gemm, integer and float, have in common."""
    _require_shapes(op)
    quantized = op.base.startswith("Q")
    if quantized and w[0].size > MAX_K:
        raise NotNative(f"sums of {w[0].size} products may overflow int32 (limit {MAX_K})")
    if not quantized and op.inputs["x"].dtype not in REAL:
        raise NotNative(
            f"native kernels take float32 and quantized tensors, not {op.inputs['x'].dtype}"
        )
    if op.has_add and shape(op.inputs["res"]) != shape(op.output):
        raise NotNative(f"the residual is broadcast from {list(shape(op.inputs['res']))}")
    add = "" if not op.has_add else _dtype(op.inputs["res"]) if op.add_is_float else "int8"
    zero = stored(constant(op.inputs["x_zero_point"]), op.inputs["x"].dtype) if quantized else 0
    return ConvOp(
        op.name,
        op.op_type,
        "conv",
        operand(op.inputs["x"]),
        name_of(op.output),
        operand(op.inputs["res"]) if op.has_add else "",
        w=w,
        window=window,
        groups=groups,
        epilogue=_epilogue(op, quantized),
        add=add,
        x_zero=zero,
    )


_DYNAMIC = {"RowGemm": (ROW, ROW_ZERO), "TensorGemm": (TENSOR, 1)}
"""The form, and the zero point that weights are packed for: 1 is multiplied at run time."""


def _dynamic_gemm(op: FusedOp) -> ConvOp:
    """A product whose input is quantized at run time."""
    if (k := shape(op.inputs["x"])[-1]) > MAX_K:
        raise NotNative(f"sums of {k} products may overflow int32 (limit {MAX_K})")
    product = _gemm(op)
    form, zero = _DYNAMIC[op.base]
    scale = constant(op.inputs["w_scale"]).astype(np.float32)
    return replace(
        product, dynamic=form, x_zero=zero, epilogue=replace(product.epilogue, scale=scale)
    )


def _dtype(value: ir.Value) -> str:
    """Of a residual that is not quantized."""
    return "bfloat16" if value.dtype == ir.DataType.BFLOAT16 else "float32"


def _epilogue(op: FusedOp, quantized: bool) -> Epilogue:
    """Scales divided by y_scale, in float64 and then rounded once.

    An activation that does more than clamp needs fractions of a step, where it is a gate, or real
    numbers: y_scale then comes after it.
    """
    bias = constant(op.inputs["bias"]).astype(np.float64)
    if not quantized:
        ones = np.ones(bias.shape, np.float32)
        rounded = op.output.dtype == ir.DataType.BFLOAT16
        plain = Epilogue(ones, bias.astype(np.float32), 1.0, op.activation, bfloat16=rounded)
        return replace(plain, add_last=op.add_last)
    out = op.output.dtype in QUANTIZED
    if out and constant(op.inputs["y_scale"]).ndim:
        return _epilogue_of_parts(op)
    if op.add_last:
        return _epilogue_adding_last(op, out)
    y_scale = float(constant(op.inputs["y_scale"])) if out else 1.0
    gate = Gate.of(op.activation.name, y_scale) if out else None
    step = gate.step if gate else y_scale if op.activation.clamps else 1.0
    sums = float(constant(op.inputs["x_scale"])) * constant(op.inputs["w_scale"]).astype(np.float64)
    residual_scale, offset = 0.0, 0.0
    if op.has_add and op.add_is_float:
        residual_scale = 1.0 / step
    elif op.has_add:
        residual_scale = float(constant(op.inputs["res_scale"])) / step
        zero = stored(constant(op.inputs["res_zero_point"]), op.inputs["res"].dtype)
        offset = float(np.float32(residual_scale)) * zero
    return Epilogue(
        scale=np.broadcast_to(sums / step, bias.shape).astype(np.float32),
        bias=(bias / step - offset).astype(np.float32),
        residual_scale=float(np.float32(residual_scale)),
        activation=op.activation.divided(step),
        zero_point=stored(constant(op.inputs["y_zero_point"]), op.output.dtype) if out else None,
        unsigned=True,
        y_factor=1.0 if gate or op.activation.clamps else float(np.float32(1.0 / y_scale)),
        gate=gate,
    ).in_stored_steps()


def _epilogue_adding_last(op: FusedOp, out: bool) -> Epilogue:
    """Of a residual behind the activation: its zero point, and that of y, are added there too."""
    y_scale = float(constant(op.inputs["y_scale"])) if out else 1.0
    y_zero = stored(constant(op.inputs["y_zero_point"]), op.output.dtype) if out else 0
    r_scale, r_zero = 1.0 / y_scale, 0
    if not op.add_is_float:
        r_scale = float(constant(op.inputs["res_scale"])) / y_scale
        r_zero = stored(constant(op.inputs["res_zero_point"]), op.inputs["res"].dtype)
    may_gate = out and not op.add_is_float
    gate = Gate.of(op.activation.name, y_scale, r_scale, r_zero) if may_gate else None
    step = gate.step if gate else 1.0
    bias = constant(op.inputs["bias"]).astype(np.float64)
    sums = float(constant(op.inputs["x_scale"])) * constant(op.inputs["w_scale"]).astype(np.float64)
    return Epilogue(
        scale=np.broadcast_to(sums / step, bias.shape).astype(np.float32),
        bias=(bias / step).astype(np.float32),
        residual_scale=float(np.float32(r_scale)),
        activation=op.activation,
        zero_point=y_zero if out else None,
        unsigned=True,
        y_factor=1.0 if gate else float(np.float32(1.0 / y_scale)),
        gate=gate,
        add_last=True,
        residual_zero=r_zero,
    )


def _epilogue_of_parts(op: FusedOp) -> Epilogue:
    """Of joined products, each with a y_scale of its own."""
    y_scale = constant(op.inputs["y_scale"]).astype(np.float64)
    zeros = constant(op.inputs["y_zero_point"])
    if op.has_add or op.activation != NO_ACTIVATION or len(set(zeros.tolist())) > 1:
        raise NotNative("native products with a y_scale per channel have one zero point alone")
    sums = float(constant(op.inputs["x_scale"])) * constant(op.inputs["w_scale"]).astype(np.float64)
    return Epilogue(
        scale=(sums / y_scale).astype(np.float32),
        bias=(constant(op.inputs["bias"]).astype(np.float64) / y_scale).astype(np.float32),
        zero_point=stored(zeros[0], op.output.dtype),
        unsigned=True,
    ).in_stored_steps()


def _quantized_add(op: FusedOp) -> MapOp:
    if shape(op.inputs["a"]) != shape(op.inputs["b"]):
        raise NotNative("the operands of the addition are broadcast")
    constants = MapConstants(
        x_scale=float(constant(op.inputs["a_scale"])),
        x_zero=stored(constant(op.inputs["a_zero_point"]), op.inputs["a"].dtype),
        r_scale=float(constant(op.inputs["b_scale"])),
        r_zero=stored(constant(op.inputs["b_zero_point"]), op.inputs["b"].dtype),
        y_scale=float(constant(op.inputs["y_scale"])),
        y_zero=stored(constant(op.inputs["y_zero_point"]), op.output.dtype),
        low=op.activation.low,
        high=op.activation.high,
    )
    return _of_two(op, "add", constants)


def _quantized_mul(op: FusedOp) -> MapOp:
    a, b = (shape(op.inputs[name]) for name in "ab")
    if b != a and not (len(a) == 4 and b == (*a[:2], 1, 1)):
        raise NotNative(f"the product broadcasts {list(b)} to {list(a)}")
    constants = MapConstants(
        x_scale=float(constant(op.inputs["a_scale"])) / float(constant(op.inputs["y_scale"])),
        x_zero=stored(constant(op.inputs["a_zero_point"]), op.inputs["a"].dtype),
        y_zero=stored(constant(op.inputs["y_zero_point"]), op.output.dtype),
    )
    if "b_scale" in op.inputs:
        r_zero = stored(constant(op.inputs["b_zero_point"]), op.inputs["b"].dtype)
        r_scale = float(constant(op.inputs["b_scale"]))
        constants = replace(constants, r_scale=r_scale, r_zero=r_zero)
    elif op.inputs["b"].dtype != ir.DataType.FLOAT:
        raise NotNative(f"native kernels multiply by float32, not by {op.inputs['b'].dtype}")
    return _of_two(op, "mul", constants)


def _of_two(op: FusedOp, kind: str, constants: MapConstants) -> MapOp:
    """A pointwise operator on `a` and `b`, with the activation that the node has."""
    return MapOp(
        op.name,
        op.op_type,
        "map",
        operand(op.inputs["a"]),
        name_of(op.output),
        operand(op.inputs["b"]),
        op=kind,
        constants=constants,
        activation=op.activation,
    )


def _float_activation(op: FusedOp) -> MapOp:
    _require_shapes(op)
    if op.inputs["x"].dtype != ir.DataType.FLOAT:
        raise NotNative(f"native kernels take float32, not {op.inputs['x'].dtype}")
    return activation_map(op.name, op.op_type, (op.inputs["x"], op.output), Activation(op.base))


def _quantized_activation(op: FusedOp) -> MapOp:
    _require_shapes(op)
    x_scale, x_zero = op.inputs["x_scale"], op.inputs["x_zero_point"]
    constants = MapConstants(
        x_scale=float(constant(x_scale)), x_zero=stored(constant(x_zero), op.inputs["x"].dtype)
    )
    if not op.float_out:
        y_zero = stored(constant(op.inputs["y_zero_point"]), op.output.dtype)
        constants = replace(constants, y_scale=float(constant(op.inputs["y_scale"])), y_zero=y_zero)
    return activation_map(
        op.name, op.op_type, (op.inputs["x"], op.output), op.activation, constants
    )


def _quantized_mean(op: FusedOp) -> PoolOp:
    _require_shapes(op)
    x_scale, quantized = float(constant(op.inputs["x_scale"])), not op.float_out
    return PoolOp(
        op.name,
        op.op_type,
        "pool",
        operand(op.inputs["x"]),
        name_of(op.output),
        op="mean",
        scale=x_scale / float(constant(op.inputs["y_scale"])) if quantized else x_scale,
        x_zero=stored(constant(op.inputs["x_zero_point"]), op.inputs["x"].dtype),
        y_zero=stored(constant(op.inputs["y_zero_point"]), op.output.dtype) if quantized else 0,
    )


def _quantized_average(op: FusedOp) -> PoolOp:
    (include_pad,) = _ints(op, "count_include_pad")
    mean = _quantized_mean(op)
    return replace(mean, op="average", window=_window(op), include_pad=bool(include_pad))


def _window(op: FusedOp) -> Window:
    """The window of a pooling."""
    kernel, strides, pads = (_ints(op, key) for key in ("kernel_shape", "strides", "pads"))
    if len(kernel) != 2:
        raise NotNative("native pooling is 2-D")
    return window_of(kernel, strides, (1, 1), pads)


def _max(op: FusedOp) -> PoolOp:
    _require_shapes(op)
    return PoolOp(
        op.name,
        op.op_type,
        "pool",
        operand(op.inputs["x"]),
        name_of(op.output),
        op="max",
        window=_window(op),
    )


def _mean(op: FusedOp) -> PoolOp:
    _require_shapes(op)
    return PoolOp(
        op.name, op.op_type, "pool", operand(op.inputs["x"]), name_of(op.output), op="mean"
    )


def _slice_pad(op: FusedOp) -> MapOp:
    _require_shapes(op)
    x = op.inputs["x"]
    if x.dtype not in TYPES:
        raise NotNative(f"native kernels take float32 and quantized tensors, not {x.dtype}")
    value = constant(op.inputs["value"])
    if x.dtype in REAL and float(value) != 0.0:
        raise NotNative("channels are padded with something other than zero")
    return MapOp(
        op.name,
        op.op_type,
        "map",
        operand(x),
        name_of(op.output),
        op="copy",
        constants=MapConstants(y_zero=stored(value, x.dtype) if x.dtype in QUANTIZED else 0),
        steps=_pair(op, "steps"),
        channel_pads=_pair(op, "channel_pads"),
    )


READERS = {
    "QConv": _conv,
    "Conv": _conv,
    "QGemm": _gemm,
    "Gemm": _gemm,
    **dict.fromkeys(_DYNAMIC, _dynamic_gemm),
    "QAdd": _quantized_add,
    "QMul": _quantized_mul,
    "QMulFloat": _quantized_mul,
    "QActivation": _quantized_activation,
    **dict.fromkeys(("Silu", "Gelu", "GeluTanh"), _float_activation),
    "QGlobalAveragePool": _quantized_mean,
    "QAveragePool": _quantized_average,
    "QMaxPool": _max,
    "BConv": _conv,
    "BGemm": _gemm,
    "BGlobalAveragePool": _mean,
    "BMaxPool": _max,
    "BSlicePad": _slice_pad,
    "SlicePad": _slice_pad,
}

"""Turns Conv and Gemm between quantizers into integer operators.

    Conv[Add][Relu](DQ(x), DQ(w), bias [, DQ(res)])  -> [Q]
        ->  QConv[Add][Relu](x, ..., w, ..., bias [, res, ...], y_scale, y_zero_point)

    By the meaning of the fused operator nothing changes: it is defined by the same nodes. An
    integer kernel sums (q_x - z_x) * q_w exactly and multiplies by x_scale * w_scale / y_scale
    once, where the nodes round each product: results may differ by one step of y. A float residual
    gives AddFloat. Without a quantizer that alone reads the result, the result stays float (F).
    A weight of another zero point is shifted, q - z, where that fits int8, and a scale per tensor
    is repeated for each output channel. Likewise for Gemm.

Conditions:
    1. x is dequantized per tensor from int8 or uint8
    2. w is a dequantized constant, int8 or uint8, whose q - zero_point fits int8
    3. the scale of w is per tensor or per output channel, finite and positive
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.fuse_epilogue import variant_of
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_integer"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    variant = variant_of(node)
    if variant is None:
        return None
    op = ops.parse_op(node)
    x = quantizers.dequantizer(op.inputs["x"])
    weight = _weight(op.inputs["w"])
    if reasons := [reason for reason in (x, weight) if isinstance(reason, str)]:
        return Refused("; ".join(reasons))
    if isinstance(x, str) or isinstance(weight, str):
        raise TypeError("reasons were returned above")
    inputs = {**_named("x", x), "w": weight[0], "w_scale": weight[1], "bias": op.inputs["bias"]}
    add = ""
    if op.has_add:
        res = quantizers.dequantizer(op.inputs["res"])
        add = "AddFloat" if isinstance(res, str) else "Add"
        inputs |= {"res": op.inputs["res"]} if isinstance(res, str) else _named("res", res)
    y = quantizers.sole_quantizer(op.output)
    float_out = isinstance(y, str)
    old = op.output
    if not isinstance(y, str):
        inputs |= {"y_scale": y.scale, "y_zero_point": y.zero_point}
        old = y.result
    new = ops.make_node(
        ops.Variant(f"Q{op.base}", add, op.relu, float_out), inputs, op.attributes, node
    )
    return Replacement(old, new.outputs[0], (new,), note=_float_note(op.output, y))


def _named(name: str, params: quantizers.PerTensor) -> dict[str, ir.Value]:
    """The three inputs of a quantized tensor."""
    return {
        name: params.source,
        f"{name}_scale": params.scale,
        f"{name}_zero_point": params.zero_point,
    }


def _float_note(result: ir.Value, y: quantizers.PerTensor | str) -> str:
    """Why the result stays float although some quantizer reads it; "" otherwise."""
    if isinstance(y, str) and any(
        reading.is_op(use.node, "QuantizeLinear") for use in result.uses()
    ):
        return f"the result is stored as float: {y}"
    return ""


def _weight(value: ir.Value) -> tuple[ir.Value, ir.Value] | str:
    """The weight as int8 with zero point 0 and its scale as float32 [N], or why there is none."""
    producer = value.producer()
    if producer is None or not reading.is_op(producer, "DequantizeLinear"):
        return f"the weight {value.name!r} is float"
    q_value, scale_value = reading.data(producer), reading.data(producer, 1)
    q, scale = reading.array(q_value), reading.array(scale_value)
    zero_point = reading.array(reading.optional(producer, 2))
    if q is None or scale is None or q.dtype not in (np.int8, np.uint8):
        return f"the weight {value.name!r} is not a dequantized int8 or uint8 constant"
    if not (np.isfinite(scale) & (scale > 0)).all():
        return f"the weight {value.name!r} has a scale that is not finite and positive"
    axis = reading.int_attribute(producer, "axis", 1) % q.ndim
    if scale.size > 1 and axis != 0:
        return f"the weight {value.name!r} is quantized along axis {axis}; expected 0"
    along = reading.broadcast_shape(q.ndim, scale, axis)
    zeros = zero_point.reshape(along).astype(np.int32) if zero_point is not None else np.int32(0)
    centred = q.astype(np.int32) - zeros
    if centred.min() < -128 or centred.max() > 127:
        return (
            f"the weight {value.name!r} is quantized with zero point {zeros.flat[0]}; less that, it"
            f" spans {centred.min()}..{centred.max()}; expected int8 with zero point 0"
        )
    if q.dtype != np.int8 or np.any(zeros):
        q_value = reading.constant(f"{q_value.name}_centred", centred.astype(np.int8))
    if scale.shape != (q.shape[0],):
        spread = np.broadcast_to(scale.reshape(-1), q.shape[:1])
        scale_value = reading.constant(f"{scale_value.name}_channels", spread)
    return q_value, scale_value

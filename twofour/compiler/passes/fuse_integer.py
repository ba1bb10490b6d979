"""Turns Conv and Gemm between quantizers into integer operators.

    Conv[Add][Relu](DQ(x), DQ(w), bias [, DQ(res)])  -> [Q]
        ->  QConv[Add][Relu](x, ..., w, ..., bias [, res, ...], y_scale, y_zero_point)
    ConvSiluAdd likewise

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
    if isinstance(x, str) or isinstance(weight, str):
        return Refused("; ".join(reason for reason in (x, weight) if isinstance(reason, str)))
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
        ops.Variant(f"Q{op.base}", add, op.activation.name, float_out, add_last=op.add_last),
        inputs,
        op.attributes,
        node,
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
    if value.is_initializer():
        return f"the weight {value.name!r} is float"
    stored = quantizers.quantized_constant(value)
    if stored is None or stored.q.dtype not in (np.int8, np.uint8):
        return f"the weight {value.name!r} is not a dequantized int8 or uint8 constant"
    if not (np.isfinite(stored.scale) & (stored.scale > 0)).all():
        return f"the weight {value.name!r} has a scale that is not finite and positive"
    if stored.axis != 0:
        return f"the weight {value.name!r} is quantized along axis {stored.axis}; expected 0"
    centred = stored.centred
    if centred.min() < -128 or centred.max() > 127:
        return (
            f"the weight {value.name!r} is quantized with zero point {stored.zero_point.flat[0]};"
            f" less that, it spans {centred.min()}..{centred.max()};"
            " expected int8 with zero point 0"
        )
    q_value, scale_value = reading.data(stored.node), reading.data(stored.node, 1)
    if stored.q.dtype != np.int8 or stored.zero_point.any():
        q_value = reading.constant(f"{q_value.name}_centred", centred.astype(np.int8))
    channels = stored.q.shape[:1]
    if stored.scale.shape != channels:
        spread = np.broadcast_to(stored.scale.reshape(-1), channels)
        scale_value = reading.constant(f"{scale_value.name}_channels", spread)
    return q_value, scale_value

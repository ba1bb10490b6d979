"""Turns an activation of a quantized tensor, which no Conv or Gemm took, into one operator.

    [Q](Silu(DQ(x)))  ->  twofour.QActivationSilu(x, ..., y_scale, y_zero_point), likewise Clip, ...

    By the meaning of the fused operator nothing changes. Without a quantizer that alone reads the
    result, the result stays float (F).

Conditions:
    1. the kernels have the activation
    2. x is dequantized per tensor from int8 or uint8
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import activations, quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_integer_activation"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    activation = activations.read(node)
    if activation is None or not reading.is_op(reading.data(node).producer(), "DequantizeLinear"):
        return None
    x = quantizers.dequantizer(reading.data(node))
    if isinstance(activation, str) or isinstance(x, str):
        return Refused("; ".join(reason for reason in (activation, x) if isinstance(reason, str)))
    inputs = {"x": x.source, "x_scale": x.scale, "x_zero_point": x.zero_point}
    old = node.outputs[0]
    y = quantizers.sole_quantizer(old)
    if not isinstance(y, str):
        inputs |= {"y_scale": y.scale, "y_zero_point": y.zero_point}
        old = y.result
    variant = ops.Variant("QActivation", "", activation.name, isinstance(y, str))
    new = ops.make_node(variant, inputs, activations.attributes(activation), node)
    return Replacement(old, new.outputs[0], (new,))

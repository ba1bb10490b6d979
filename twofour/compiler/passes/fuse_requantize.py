"""Turns a change of scale into one operator on bytes.

    Q(DQ(x))  ->  twofour.QActivation(x, x_scale, x_zero_point, y_scale, y_zero_point)

    By the meaning of the fused operator nothing changes.

Conditions:
    1. both quantizers are per tensor, int8 or uint8, with constant parameters
    2. x is computed while running
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_requantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "QuantizeLinear"):
        return None
    if not reading.is_op(reading.data(node).producer(), "DequantizeLinear"):
        return None
    x, y = quantizers.dequantizer(reading.data(node)), quantizers.per_tensor(node)
    if isinstance(x, str) or isinstance(y, str):
        return Refused("; ".join(reason for reason in (x, y) if isinstance(reason, str)))
    if reading.array(x.source) is not None:
        return Refused(f"{x.source.name!r} is a constant")
    inputs = {"x": x.source, "x_scale": x.scale, "x_zero_point": x.zero_point}
    inputs |= {"y_scale": y.scale, "y_zero_point": y.zero_point}
    new = ops.make_node(ops.Variant("QActivation"), inputs, {}, node)
    return Replacement(y.result, new.outputs[0], (new,))

"""Moves Relu above a quantizer, next to the operator that can do it for free.

    Relu(DQ(Q(x)))  ->  DQ(Q(Relu(x)))

    Exact: Q is monotone and Q(0) is the zero point, so max(Q(x), zero_point) = Q(max(x, 0)), and
    Relu(DQ(q)) = DQ(max(q, zero_point)) for a positive scale.

Conditions:
    1. Q and DQ are per tensor and have equal parameters
    2. nobody else reads Q(x) or DQ(Q(x))
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "move_relu"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Relu"):
        return None
    dequantize = reading.data(node).producer()
    if dequantize is None or not reading.is_op(dequantize, "DequantizeLinear"):
        return None
    quantize = reading.data(dequantize).producer()
    if quantize is None or not reading.is_op(quantize, "QuantizeLinear"):
        return None
    down, up = quantizers.per_tensor(quantize), quantizers.per_tensor(dequantize)
    if isinstance(down, str) or isinstance(up, str):
        return Refused(down if isinstance(down, str) else str(up))
    if not down.same_as(up):
        return Refused(f"{quantize.name!r} and {dequantize.name!r} have different scales")
    for between in (down.result, up.result):
        if isinstance(reader := reading.sole_reader(between), str):
            return Refused(reader)
    relu = ir.node("Relu", [down.source], name=node.name)
    new_down = ir.node("QuantizeLinear", [relu.outputs[0], down.scale, down.zero_point])
    new_up = ir.node("DequantizeLinear", [new_down.outputs[0], up.scale, up.zero_point])
    for new, old in ((relu, down.source), (new_down, down.result)):
        new.outputs[0].shape, new.outputs[0].type = old.shape, old.type
    return Replacement(node.outputs[0], new_up.outputs[0], (relu, new_down, new_up))

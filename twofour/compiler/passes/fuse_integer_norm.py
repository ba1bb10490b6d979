"""Lets a layer normalization store bytes, besides floats where somebody reads those.

    Q(twofour.LayerNorm(x, ...))                  ->  twofour.QLayerNorm(x, ..., y_scale, ...)
    y = twofour.LayerNorm(x, ...), Q(y), more(y)  ->  y, q = twofour.LayerNormQ(x, ...), more(y)

    The same sums and the same rounding. In a transformer q is what the next matrix product reads,
    and y what the residual adds.

Conditions:
    1. the quantizer is per tensor, int8 or uint8, with constant parameters
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_integer_norm"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not ops.is_fused(node) or node.op_type != "LayerNorm":
        return None
    y = node.outputs[0]
    quantize = next((u.node for u in y.uses() if reading.is_op(u.node, "QuantizeLinear")), None)
    if quantize is None:
        return None
    params = quantizers.per_tensor(quantize)
    if isinstance(params, str):
        return Refused(params)
    op = ops.parse_op(node)
    inputs = {**op.inputs, "y_scale": params.scale, "y_zero_point": params.zero_point}
    if isinstance(reading.sole_reader(y), str):
        new = ops.make_node(ops.Variant("LayerNormQ"), inputs, op.attributes, node)
        pair = (params.result, new.outputs[1])
        return Replacement(y, new.outputs[0], (new,), more=(pair,))
    new = ops.make_node(ops.Variant("QLayerNorm"), inputs, op.attributes, node)
    return Replacement(params.result, new.outputs[0], (new,))

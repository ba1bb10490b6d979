"""Makes one quantizer of several equal ones.

    Q(x), Q(x)  ->  one Q(x), read by the readers of both

    Then the operator before them has one reader, and can store bytes itself.

Conditions:
    1. both are per tensor, int8 or uint8, with constant parameters
    2. scale, zero point and type are equal
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "merge_quantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "QuantizeLinear"):
        return None
    x = reading.data(node)
    others = [
        use.node
        for use in x.uses()
        if use.node is not node and use.node.graph is node.graph
        if reading.is_op(use.node, "QuantizeLinear") and use.idx == 0
    ]
    if not others or node.outputs[0].is_graph_output():
        return None
    mine = quantizers.per_tensor(node)
    if isinstance(mine, str):
        return Refused(mine)
    reasons = []
    for other in others:
        theirs = quantizers.per_tensor(other)
        if isinstance(theirs, str):
            reasons.append(theirs)
        elif not mine.same_as(theirs):
            reasons.append(
                f"{x.name!r} is quantized with scale {mine.scale_number:g} here and with"
                f" {theirs.scale_number:g} by {other.name!r}"
            )
        elif reading.precedes(other, node):
            return Replacement(node.outputs[0], other.outputs[0])
    return Refused("; ".join(reasons)) if reasons else None

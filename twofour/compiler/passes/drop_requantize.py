"""Removes a dequantizer that an equal quantizer undoes.

    Q(DQ(x))  ->  x

    Exact: (q - z) * s is off by at most one part in 2**24, its quotient by s by one part in 2**23,
    and |q - z| <= 255 rounds back to the integer it was.

Conditions:
    1. both are per tensor, int8 or uint8, with constant parameters
    2. scale, zero point and type are equal
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "drop_requantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "QuantizeLinear"):
        return None
    dequantize = reading.data(node).producer()
    if dequantize is None or not reading.is_op(dequantize, "DequantizeLinear"):
        return None
    up, down = quantizers.per_tensor(dequantize), quantizers.per_tensor(node)
    if isinstance(up, str) or isinstance(down, str):
        return Refused(up if isinstance(up, str) else str(down))
    if not up.same_as(down):
        return Refused(
            f"{up.result.name!r} changes its scale from {up.scale_number:g} (zero point"
            f" {up.zero_point_number}) to {down.scale_number:g} ({down.zero_point_number})"
        )
    return Replacement(node.outputs[0], up.source)

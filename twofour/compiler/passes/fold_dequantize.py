"""Dequantizes constants that no integer operator took.

    DequantizeLinear(constant q, scale, zero_point)  ->  constant (q - zero_point) * scale

    The definition of the operator, so exact. What reads the constant stays a float operator, and
    fuse_integer says why.

Conditions:
    1. q, scale and zero point are constants, per tensor or per axis
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fold_dequantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "DequantizeLinear"):
        return None
    q_value = reading.data(node)
    if reading.array(q_value) is None:
        return None
    stored = quantizers.quantized_constant(node.outputs[0])
    if stored is None:
        return Refused(
            f"the constant {q_value.name!r} has a scale in blocks or computed at run time"
        )
    return Replacement(
        node.outputs[0], reading.constant(f"{q_value.name}_dequantized", stored.real)
    )

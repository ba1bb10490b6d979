"""Quantizes constants now.

    QuantizeLinear(constant w, scale, zero_point)  ->  constant q

    q = saturate(round_half_even(w / scale) + zero_point), the definition of the operator, so this
    is exact. Afterwards a weight written as f32 -> Q -> DQ is an int8 constant -> DQ, the usual
    form.

Conditions:
    1. scale and zero point are constants
    2. the zero point is int8 or uint8
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.core import numerics

NAME = "fold_weight_quantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "QuantizeLinear"):
        return None
    w_value = reading.data(node)
    w = reading.array(w_value)
    if w is None:
        return None
    scale = reading.array(node.inputs[1])
    zero_point = reading.array(reading.optional(node, 2))
    if scale is None or zero_point is None:
        return Refused(
            f"the weight {w_value.name!r} is quantized with a scale computed at run time"
        )
    if zero_point.dtype not in (np.int8, np.uint8):
        return Refused(f"the weight {w_value.name!r} becomes {zero_point.dtype}; expected int8")
    along = reading.broadcast_shape(w.ndim, reading.int_attribute(node, "axis", 1))
    q = numerics.quantize(w, scale.reshape(along), zero_point.reshape(along), zero_point.dtype)
    return Replacement(node.outputs[0], reading.constant(f"{w_value.name}_quantized", q))

"""Turns an Add between quantizers into one integer operator.

    Q([Relu](Add(DQ(a), DQ(b))))  ->  twofour.QAdd[Relu](a, ..., b, ..., y_scale, y_zero_point)

    By the meaning of the fused operator nothing changes. Relu may be any activation.

Conditions:
    1. both operands are dequantized per tensor from int8 or uint8
    2. they have equal shapes: no broadcasting
    3. the sum, or an activation that alone reads it, is read by one per-tensor quantizer alone
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import activations, quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.core.functions import NO_ACTIVATION, Activation

NAME = "fuse_integer_add"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Add"):
        return None
    operands = [reading.data(node, index) for index in (0, 1)]
    if not any(reading.is_op(value.producer(), "DequantizeLinear") for value in operands):
        return None
    a, b = (quantizers.dequantizer(value) for value in operands)
    if isinstance(a, str) or isinstance(b, str):
        return Refused("; ".join(reason for reason in (a, b) if isinstance(reason, str)))
    if reading.shape_of(a.source) is None or reading.shape_of(a.source) != reading.shape_of(
        b.source
    ):
        left, right = reading.shape_text(a.source), reading.shape_text(b.source)
        return Refused(f"its operands have shapes {left} and {right}; expected equal ones")
    total = node.outputs[0]
    activation = NO_ACTIVATION
    if isinstance(reader := reading.sole_reader(total), ir.Node):
        if isinstance(found := activations.read(reader), Activation):
            activation, total = found, reader.outputs[0]
    y = quantizers.sole_quantizer(total)
    if isinstance(y, str):
        return Refused(y)
    inputs = {
        **{"a": a.source, "a_scale": a.scale, "a_zero_point": a.zero_point},
        **{"b": b.source, "b_scale": b.scale, "b_zero_point": b.zero_point},
        **{"y_scale": y.scale, "y_zero_point": y.zero_point},
    }
    variant = ops.Variant("QAdd", activation=activation.name)
    new = ops.make_node(variant, inputs, activations.attributes(activation), node)
    return Replacement(y.result, new.outputs[0], (new,))

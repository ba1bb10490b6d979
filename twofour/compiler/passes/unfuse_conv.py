"""Writes a fused convolution of ONNX Runtime as standard operators.

    com.microsoft.FusedConv<activation>(x, w [, b] [, z])  ->  activation(Conv(x, w, b) [+ z])

Conditions:
    1. the activation is Relu, Tanh, Sigmoid, LeakyRelu, HardSigmoid or Clip, or there is none
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.compiler.passes.unfuse import activated, replaced

NAME = "unfuse_conv"
_NAMES = {"Clip": ("min", "max")}


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_contrib(node, "FusedConv"):
        return None
    own = {"activation", "activation_params"}
    given = {name: value for name, value in node.attributes.items() if name not in own}
    inputs = [value for value in node.inputs[:3] if value is not None]
    conv = ir.node("Conv", inputs, name=f"{node.name}_conv")
    conv.attributes.update(given)
    x = conv.outputs[0]
    if (residual := reading.optional(node, 3)) is not None:
        x = reading.made("Add", [x, residual])
    name = reading.string_attribute(node, "activation", "")
    numbers = reading.floats_attribute(node, "activation_params", ())
    parameters = dict(zip(_NAMES.get(name, ("alpha", "beta")), numbers, strict=False))
    result = activated(x, name, parameters)
    return Refused(result) if isinstance(result, str) else replaced(node, result)

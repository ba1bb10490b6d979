"""Writes the activations of ONNX Runtime as standard operators.

    com.microsoft.Gelu(x)               ->  x / 2 * (1 + Erf(x / sqrt(2)))
    com.microsoft.BiasGelu(x, b)        ->  the same of x + b
    com.microsoft.FastGelu(x [, b])     ->  x / 2 * (1 + Tanh(...)), of x + b
    com.microsoft.QuickGelu<alpha>(x)   ->  x * Sigmoid(alpha * x)

Conditions:
    1. the input is float32: the constants that appear are
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.compiler.passes.unfuse import gelu, gelu_tanh, number, replaced

NAME = "unfuse_gelu"
_QUICK = 1.702


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_contrib(node, "Gelu", "BiasGelu", "FastGelu", "QuickGelu"):
        return None
    x = reading.data(node)
    if x.dtype != ir.DataType.FLOAT:
        return Refused(f"its input is {x.dtype}; expected float32")
    if (bias := reading.optional(node, 1)) is not None:
        x = reading.made("Add", [x, bias])
    if node.op_type == "QuickGelu":
        alpha = reading.float_attribute(node, "alpha", _QUICK)
        scaled = x if alpha == 1.0 else reading.made("Mul", [x, number("alpha", alpha)])
        return replaced(node, reading.made("Mul", [x, reading.made("Sigmoid", [scaled])]))
    return replaced(node, gelu_tanh(x) if node.op_type == "FastGelu" else gelu(x))

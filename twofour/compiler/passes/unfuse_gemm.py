"""Writes the fused matrix products of ONNX Runtime as standard operators.

    com.microsoft.FusedGemm<activation>(a, b [, c])    ->  activation(Gemm(a, b, c))
    com.microsoft.FusedMatMul<alpha, transA, transB>   ->  alpha * MatMul(a', b')
    com.microsoft.FusedMatMulActivation                ->  activation(alpha * MatMul(a', b'))
    com.microsoft.TransposeMatMul                      ->  alpha * MatMul(a', b')

    transA and transB swap the last two axes; transBatchA and transBatchB first move the first
    axis before the last one.

Conditions:
    1. the activation is Relu, Tanh, Sigmoid, LeakyRelu, HardSigmoid or Clip, or there is none
    2. the number of axes of an operand that is transposed is known
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.compiler.passes.unfuse import activated, number, replaced

NAME = "unfuse_gemm"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if reading.is_contrib(node, "FusedGemm"):
        gemm = ir.node("Gemm", list(node.inputs), name=f"{node.name}_gemm")
        kept = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
        gemm.attributes.update(kept)
        return _activated(node, gemm.outputs[0])
    if not reading.is_contrib(node, "FusedMatMul", "FusedMatMulActivation", "TransposeMatMul"):
        return None
    operands: list[ir.Value | None] = []
    for index, side in enumerate("AB"):
        operand = _operand(node, index, side)
        if isinstance(operand, str):
            return Refused(operand)
        operands.append(operand)
    result = reading.made("MatMul", operands)
    alpha = reading.float_attribute(node, "alpha", 1.0)
    if alpha != 1.0:
        result = reading.made("Mul", [result, number("alpha", alpha)])
    return _activated(node, result)


def _operand(node: ir.Node, index: int, side: str) -> ir.Value | str:
    """An operand as MatMul reads it, or why not."""
    value = reading.data(node, index)
    swap = reading.int_attribute(node, f"trans{side}", 0)
    batch = reading.int_attribute(node, f"transBatch{side}", 0)
    if not swap and not batch:
        return value
    if value.shape is None:
        return f"{value.name!r} has no known number of dimensions, and is transposed"
    axes = list(range(len(value.shape)))
    if len(axes) < 2:
        return value
    if batch:
        axes = [*axes[1:-1], axes[0], axes[-1]]
    if swap:
        axes[-2:] = axes[:-3:-1]
    return reading.made("Transpose", [value], perm=axes)


def _activated(node: ir.Node, x: ir.Value) -> Replacement | Refused:
    """The node as x with its activation."""
    name = reading.string_attribute(node, "activation", "")
    keys = {"alpha": "activation_alpha", "beta": "activation_beta"}
    given = {
        key: reading.float_attribute(node, attribute, 0.0)
        for key, attribute in keys.items()
        if attribute in node.attributes
    }
    result = activated(x, name, given)
    return Refused(result) if isinstance(result, str) else replaced(node, result)

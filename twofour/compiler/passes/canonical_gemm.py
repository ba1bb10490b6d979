"""Spells every product with a constant matrix the same way.

    Gemm<alpha, beta, transA, transB>(a, b [, c])  ->  twofour.Gemm(a, w, bias)
    MatMul(a, b)                                   ->  twofour.Gemm(a, w, zeros)

    alpha * a @ b + beta * c = a @ (alpha * b) + beta * c. The weight w is [N, K]: b, transposed
    unless transB. A dequantized weight DQ(q, scale) stays one: q is transposed, alpha goes into the
    scale, so no weight is rounded twice. transA becomes a Transpose of a. MatMul takes a of any
    rank >= 2 ([..., K] -> [..., N]).

Conditions:
    1. b is a constant matrix, or a DequantizeLinear of one, possibly transposed
    2. a is float32 and has at least 2 axes, and its shape is known
    3. c is absent, or a constant of one number or one per column
    4. alpha is positive where the weight is quantized
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.canonical_conv import bias_constant
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "canonical_gemm"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Gemm", "MatMul"):
        return None
    a, b = reading.data(node), reading.data(node, 1)
    flip, source = _untransposed(b)
    transposed = flip ^ bool(reading.int_attribute(node, "transB", 0))
    matrix = quantizers.float_constant(source)
    if matrix is None or matrix.ndim != 2:
        return Refused(f"its right operand {b.name!r} is not a constant matrix")
    shape = reading.shape_of(a)
    if a.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 2:
        return Refused(
            f"its input is {a.dtype} {reading.shape_text(a)}; expected float32 rank >= 2"
        )
    bias = bias_constant(node, matrix.shape[0 if transposed else 1])
    if isinstance(bias, str):
        return Refused(bias)
    alpha = reading.float_attribute(node, "alpha", 1.0)
    if alpha <= 0 and not source.is_initializer():
        return Refused(f"alpha is {alpha}; expected > 0 with a quantized weight")
    nodes, w = _weight(source, matrix, transposed, alpha)
    bias = _scaled_bias(bias, reading.float_attribute(node, "beta", 1.0))
    if reading.int_attribute(node, "transA", 0):
        nodes += (ir.node("Transpose", [a], {"perm": [1, 0]}),)
        a = nodes[-1].outputs[0]
        a.type = ir.TensorType(ir.DataType.FLOAT)
        a.shape = ir.Shape(shape[::-1])
    new = ops.make_node(ops.Variant("Gemm"), {"x": a, "w": w, "bias": bias}, {}, node)
    return Replacement(node.outputs[0], new.outputs[0], (*nodes, new))


def _untransposed(value: ir.Value) -> tuple[bool, ir.Value]:
    """Whether the matrix is a Transpose of another, and that other."""
    producer = value.producer()
    if producer is not None and reading.is_op(producer, "Transpose"):
        if reading.ints_attribute(producer, "perm", (1, 0)) == (1, 0):
            return True, reading.data(producer)
    return False, value


def _scaled_bias(bias: ir.Value, beta: float) -> ir.Value:
    """The bias times beta; the same value where beta is 1."""
    if beta == 1.0 or bias.const_value is None:
        return bias
    return reading.constant(f"{bias.name}_scaled", bias.const_value.numpy() * np.float32(beta))


def _weight(
    source: ir.Value, matrix: reading.Array, transposed: bool, alpha: float
) -> tuple[tuple[ir.Node, ...], ir.Value]:
    """The weight as float32 [N, K], and the DequantizeLinear that computes it, if any."""
    stored = quantizers.quantized_constant(source)
    if transposed and alpha == 1.0:
        return (), source
    if stored is None:
        w = np.float32(alpha) * (matrix if transposed else matrix.T)
        return (), reading.constant(f"{source.name}_nk", w)
    q_value, scale_value = reading.data(stored.node), reading.data(stored.node, 1)
    if not transposed:
        q_value = reading.constant(f"{q_value.name}_nk", stored.q.T)
    if alpha != 1.0:
        scale = stored.scale * np.float32(alpha)
        scale_value = reading.constant(f"{scale_value.name}_alpha", scale)
    axis = stored.axis if transposed else 1 - stored.axis
    attributes = {"axis": axis} if stored.scale.size > 1 else {}
    inputs = [q_value, scale_value, *stored.node.inputs[2:]]
    new = ir.node("DequantizeLinear", inputs, attributes, name=stored.node.name)
    w_value = new.outputs[0]
    w_value.type = ir.TensorType(ir.DataType.FLOAT)
    w_value.shape = q_value.shape
    return (new,), w_value

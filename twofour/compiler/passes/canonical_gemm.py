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
from twofour.compiler.passes import reading
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
    matrix = reading.float_constant(source)
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
    nodes, w = _weight(source, transposed, alpha)
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
    source: ir.Value, transposed: bool, alpha: float
) -> tuple[tuple[ir.Node, ...], ir.Value]:
    """The weight as float32 [N, K], and the DequantizeLinear that computes it, if any."""
    if transposed and alpha == 1.0:
        return (), source
    contents = reading.array(source)
    if contents is not None:
        w = np.float32(alpha) * (contents if transposed else contents.T)
        return (), reading.constant(f"{source.name}_nk", w)
    dequantize = source.producer()
    if dequantize is None:
        raise ValueError(f"{source.name!r} is neither a constant nor a dequantized one")
    q_value, scale_value = reading.data(dequantize), reading.data(dequantize, 1)
    q, scale = reading.array(q_value), reading.array(scale_value)
    if q is None or scale is None:
        raise ValueError(f"{source.name!r} is not a dequantized constant")
    if not transposed:
        q_value = reading.constant(f"{q_value.name}_nk", q.T)
    if alpha != 1.0:
        scale_value = reading.constant(f"{scale_value.name}_alpha", scale * np.float32(alpha))
    axis = reading.int_attribute(dequantize, "axis", 1) % 2
    attributes = {"axis": axis if transposed else 1 - axis} if scale.size > 1 else {}
    inputs = [q_value, scale_value, *dequantize.inputs[2:]]
    new = ir.node("DequantizeLinear", inputs, attributes, name=dequantize.name)
    w_value = new.outputs[0]
    w_value.type = ir.TensorType(ir.DataType.FLOAT)
    w_value.shape = ir.Shape(q.shape if transposed else q.T.shape)
    return (new,), w_value

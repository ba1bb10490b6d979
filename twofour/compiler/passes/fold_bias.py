"""Adds a constant per output channel into the bias.

    Add(twofour.Conv(x, w, bias), c)  ->  twofour.Conv(x, w, bias + c)

    (x * w + bias) + c = x * w + (bias + c). The same for twofour.Gemm, RowGemm and
    TensorGemm; exporters write a linear layer as MatMul and Add. Float sums are rounded in another
    order.

Conditions:
    1. c is a float32 constant, or a DequantizeLinear of one
    2. c is one number, or one per output channel (axis 1 of Conv, the last axis of Gemm)
    3. adding c does not change the shape
    4. nobody else reads the result of the Conv or Gemm
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.bases import PLAIN
from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fold_bias"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Add"):
        return None
    for value, other in ((0, 1), (1, 0)):
        producer = reading.data(node, value).producer()
        if producer is not None and plain(producer):
            c = quantizers.float_constant(reading.data(node, other))
            if c is not None:
                return _fold(node, producer, c)
    return None


def plain(node: ir.Node) -> bool:
    """Whether the node is a product of floats without epilogue."""
    return ops.is_fused(node) and node.op_type in PLAIN


def _fold(node: ir.Node, producer: ir.Node, c: reading.Array) -> Replacement | Refused:
    """The Conv or Gemm with the larger bias."""
    op = ops.parse_op(producer)
    result = op.output
    bias = reading.array(op.inputs["bias"])
    if bias is None or result.shape is None:
        return Refused(f"the shape of {result.name!r} is not known")
    channels, rank = bias.shape[0], len(result.shape)
    axis = 1 if op.base == "Conv" else rank - 1
    aligned = (1,) * (rank - c.ndim) + c.shape
    per_channel = tuple(channels if d == axis else 1 for d in range(rank))
    if c.size != 1 and aligned != per_channel:
        return Refused(f"the constant of shape {c.shape} is not one number per output channel")
    if len(aligned) > rank:
        return Refused(f"adding a constant of shape {c.shape} changes the shape of {result.name!r}")
    if isinstance(reader := reading.sole_reader(result), str):
        return Refused(reader)
    total = bias + np.broadcast_to(c.reshape(-1), bias.shape)
    inputs = {**op.inputs, "bias": reading.constant(f"{producer.name}_bias", total)}
    new = ops.make_node(ops.Variant(op.base), inputs, op.attributes, producer)
    return Replacement(node.outputs[0], new.outputs[0], (new,))

"""Moves DequantizeLinear down, so that elements are moved as bytes.

    op(DQ(x))  ->  DQ(op(x))        for the operators of movers.py, Concat and Split (joins.py)

    Exact: a per-tensor DQ is a monotone function of single elements. Other readers of DQ(x) keep
    theirs.

Conditions:
    1. the quantizer is per tensor, int8 or uint8, with constant parameters
    2. a pad constant is exactly a value of the quantized type
    3. the indices of MaxPool are not read
    4. all inputs of a Concat have the same scale, zero point and type
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import joins, movers, quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "move_dequantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if reading.is_op(node, "Concat"):
        return joins.dequantized_concat(node)
    if reading.is_op(node, "Split"):
        return joins.dequantized_split(node)
    if not movers.is_mover(node):
        return None
    producer = reading.data(node).producer()
    if producer is None or not reading.is_op(producer, "DequantizeLinear"):
        return None
    params = quantizers.per_tensor(producer)
    if isinstance(params, str):
        return Refused(params)
    moved = movers.commuted(node, params.source, params, exact=True)
    if isinstance(moved, str):
        return Refused(moved)
    inputs = [moved.outputs[0], params.scale, params.zero_point]
    dequantize = ir.node("DequantizeLinear", inputs)
    return Replacement(node.outputs[0], dequantize.outputs[0], (moved, dequantize))

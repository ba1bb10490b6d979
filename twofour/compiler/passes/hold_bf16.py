"""Stores results in bfloat16 where all who read them can read that.

    twofour.BConv...F(...)       ->  Cast<float>(twofour.BConv...(...)), likewise BGemm
    twofour.Conv[Relu](x, w, b)  ->  Cast<float>(twofour.BConv[Relu](x, w, b)), likewise Gemm
    y = twofour.LayerNorm(x, ...), Cast<bfloat16>(y)             ->  twofour.BLayerNorm(x, ...)
    y = twofour.LayerNorm(x, ...), Cast<bfloat16>(y), more(y)
        ->  y, q = twofour.LayerNormB(x, ...), more(y)

    The second: a depthwise Conv, which multiplies in float32. The Casts vanish with read_bf16.

Conditions:
    1. all who read the result can read bfloat16 (bfloats.py); of a LayerNorm: a Cast does
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import bfloats
from twofour.compiler.passes.rewrite import Replacement

NAME = "hold_bf16"


def rule(node: ir.Node) -> Replacement | None:
    """See the module."""
    base = bfloats.base_of(node)
    if base == "LayerNorm":
        return _norm(node)
    variant = ops.parse_type(node.op_type) if base else None
    if variant is None or base not in ("Conv", "Gemm", *bfloats.PRODUCTS) or variant.rounded_out:
        return None
    if not bfloats.is_wanted(node.outputs[0]):
        return None
    op = ops.parse_op(node)
    name = base if base in bfloats.PRODUCTS else f"B{base}"
    stored = replace(variant, base=name, float_out=False)
    return rounded(node, ops.make_node(stored, op.inputs, op.attributes, node))


def rounded(node: ir.Node, new: ir.Node) -> Replacement:
    """The node's result, stored as bfloat16 by a new one and made float32 again."""
    result = new.outputs[0]
    result.shape, result.type = node.outputs[0].shape, ir.TensorType(bfloats.BFLOAT16)
    back = bfloats.cast(result, bfloats.FLOAT)
    return Replacement(node.outputs[0], back.outputs[0], (new, back))


def _norm(node: ir.Node) -> Replacement | None:
    """A layer normalization whose result is rounded by a reader."""
    y = node.outputs[0]
    cast = next((use.node for use in y.uses() if bfloats.is_rounding(use.node)), None)
    if cast is None:
        return None
    op = ops.parse_op(node)
    if len(y.uses()) > 1 or y.is_graph_output():
        new = ops.make_node(ops.Variant("LayerNormB"), op.inputs, op.attributes, node)
        pair = (cast.outputs[0], new.outputs[1])
        return Replacement(y, new.outputs[0], (new,), more=(pair,))
    new = ops.make_node(ops.Variant("BLayerNorm"), op.inputs, op.attributes, node)
    return Replacement(cast.outputs[0], new.outputs[0], (new,))

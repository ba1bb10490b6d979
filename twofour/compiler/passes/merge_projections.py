"""Joins the projections of an attention into one product.

    q = [Q]Gemm(x, wq, bq), k = [Q]Gemm(x, wk, bk), v = [Q]Gemm(x, wv, bv)
        ->  q, k, v = Split<axis = -1>([Q]Gemm(x, [wq; wk; wv], [bq; bk; bv]))

    Each channel is the same sum as before. One larger product keeps the kernel busy longer and
    reads x once; the parts are channels of one wide tensor, so the Split moves nothing. Quantized
    parts keep their own scales: y_scale has one number per channel.

Conditions:
    1. the products read the same x, in the same form, and have no residual and no activation
    2. their results are read by attentions alone
    3. quantized results have the same type and zero point
"""

from __future__ import annotations

import re
from itertools import takewhile

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.bases import DYNAMIC
from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "merge_projections"
_PRODUCTS = ("Gemm", "QGemm", *DYNAMIC)


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not _is_projection(node) or node.graph is None:
        return None
    same = [other for other in node.graph if _is_projection(other) and _same_input(node, other)]
    if len(same) < 2 or same[0] is not node:
        return None
    if reason := _differences(same):
        return Refused(reason)
    return _joined(same)


def _is_projection(node: ir.Node) -> bool:
    """Whether the node is a plain product whose result attentions alone read."""
    if not ops.is_fused(node) or ops.parse_type(node.op_type).base not in _PRODUCTS:
        return False
    variant = ops.parse_type(node.op_type)
    result = node.outputs[0]
    if variant != ops.Variant(variant.base, float_out=variant.float_out):
        return False
    readers = [use.node for use in result.uses()]
    if result.is_graph_output() or not readers:
        return False
    if any(reading.array(node.inputs[i]) is None for i, n in enumerate(variant.inputs) if n != "x"):
        return False
    return all(ops.is_fused(reader) and _is_attention(reader) for reader in readers)


def _is_attention(node: ir.Node) -> bool:
    return ops.parse_type(node.op_type).base in ("Attention", "QAttention")


def _same_input(one: ir.Node, other: ir.Node) -> bool:
    """Whether both read the same x in the same form."""
    mine, theirs = ops.parse_op(one), ops.parse_op(other)
    if mine.op_type != theirs.op_type or mine.inputs["x"] is not theirs.inputs["x"]:
        return False
    return all(
        np.array_equal(_array(mine, name), _array(theirs, name))
        for name in ("x_scale", "x_zero_point")
        if name in mine.inputs
    )


def _differences(nodes: list[ir.Node]) -> str:
    """Why results cannot be stored in one tensor; "" if they can."""
    parsed = [ops.parse_op(node) for node in nodes]
    if "y_zero_point" not in parsed[0].inputs:
        return ""
    zeros = [_array(op, "y_zero_point") for op in parsed]
    if len({(zero.dtype, int(zero.reshape(-1)[0])) for zero in zeros}) > 1:
        text = ", ".join(f"{op.name!r} {zero}" for op, zero in zip(parsed, zeros, strict=True))
        return f"the results differ in type or zero point: {text}"
    return ""


def _array(op: ops.FusedOp, name: str) -> reading.Array:
    """A constant input."""
    held = reading.array(op.inputs[name])
    if held is None:
        raise ValueError(f"{name} of {op.name!r} is not a constant")
    return held


def _joined(nodes: list[ir.Node]) -> Replacement:
    """One product and its parts."""
    parsed = [ops.parse_op(node) for node in nodes]
    first = parsed[0]
    sizes = [_array(op, "w").shape[0] for op in parsed]
    inputs = dict(first.inputs)
    for name in ("w", "w_scale", "bias"):
        if name in inputs:
            joined = np.concatenate([_array(op, name) for op in parsed])
            inputs[name] = reading.constant(f"{first.inputs[name].name}_joined", joined)
    for name in ("y_scale", "y_zero_point"):
        if name in inputs:
            each = [np.full(n, _array(op, name)) for op, n in zip(parsed, sizes, strict=True)]
            stem = first.inputs[name].name
            inputs[name] = reading.constant(f"{stem}_joined", np.concatenate(each))
    variant = ops.parse_type(first.op_type)
    product = ops.make_node(variant, inputs, first.attributes, nodes[0])
    product.name = _joined_name([op.name for op in parsed])
    wide = product.outputs[0]
    wide.type = first.output.type
    shape = reading.shape_of(first.output)
    wide.shape = None if shape is None else ir.Shape((*shape[:-1], sum(sizes)))
    split = ir.node(
        "Split",
        [wide, reading.constant("sizes", np.array(sizes, np.int64))],
        {"axis": -1},
        num_outputs=len(nodes),
    )
    for part, op in zip(split.outputs, parsed, strict=True):
        part.shape, part.type = op.output.shape, op.output.type
    pairs = tuple(zip((op.output for op in parsed), split.outputs, strict=True))
    return Replacement(*pairs[0], nodes=(product, split), more=pairs[1:])


def _joined_name(names: list[str]) -> str:
    """`layer.0.query` and `layer.0.key` become `layer.0.query+key`."""
    parts = [re.split(r"([./])", name) for name in names]
    before = _same_parts(parts)
    rest = [part[len(before) :][::-1] for part in parts]
    after = _same_parts(rest)
    middle = "+".join("".join(part[len(after) :][::-1]) for part in rest)
    return "".join(before) + middle + "".join(after[::-1])


def _same_parts(parts: list[list[str]]) -> list[str]:
    """What all begin with."""
    columns = zip(*parts, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]

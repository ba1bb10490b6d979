"""Gives each quantized part of a joint projection a product of its own.

    Q(heads of Gemm(x, [wq; wk; wv], [bq; bk; bv]))  ->  heads of Q(Gemm(x, wk, bk))

    Exact: each channel is the same sum. q, k and v of a joint projection are quantized behind the
    Split or Gather that tells them apart, each with a scale of its own; so the quantizer has to get
    to the product, whose parts merge_projections joins again. A dequantized weight stays one.

Conditions:
    1. the quantizer is per tensor, with constant parameters
    2. what it reads are heads that lie side by side in some channels of the product, not in all
    3. the weight is a constant, or a DequantizeLinear of one
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading, tracing
from twofour.compiler.passes.attention_ends import Heads, heads_of
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "split_projections"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "QuantizeLinear"):
        return None
    part = reading.data(node)
    if not tracing.is_move(part.producer()):
        return None
    for transposed in (False, True):
        heads = heads_of(part, transposed=transposed)
        if isinstance(heads, str) or heads.quantizer is not None or heads.factor != 1.0:
            continue
        producer = heads.source.producer()
        width = (reading.shape_of(heads.source) or (0,))[-1]
        if producer is None or not ops.is_fused(producer) or producer.op_type != "Gemm":
            return None
        if width == heads.heads * heads.channels:
            return None
        params = quantizers.per_tensor(node)
        if isinstance(params, str):
            return Refused(params)
        return _split(node, params, heads, transposed=transposed)
    return None


def _split(
    node: ir.Node, params: quantizers.PerTensor, heads: Heads, *, transposed: bool
) -> Replacement | Refused:
    """The part's own product, quantizer and moves."""
    producer = heads.source.producer()
    assert producer is not None
    op = ops.parse_op(producer)
    end = heads.first + heads.heads * heads.channels
    channels = range(heads.first, end)
    weight = _rows(op.inputs["w"], channels)
    bias = reading.array(op.inputs["bias"])
    if isinstance(weight, str) or bias is None:
        return Refused(weight if isinstance(weight, str) else "its bias is computed")
    w_nodes, w = weight
    part_bias = reading.constant(f"{op.inputs['bias'].name}_part", bias[channels.start : end])
    product = ops.make_node(
        ops.Variant("Gemm"), {"x": op.inputs["x"], "w": w, "bias": part_bias}, {}, producer
    )
    product.name = f"{producer.name}.{channels.start}-{end - 1}"
    result = product.outputs[0]
    result.type = ir.TensorType(ir.DataType.FLOAT)
    result.shape = ir.Shape((*(reading.shape_of(heads.source) or ())[:-1], len(channels)))
    quantize = ir.node("QuantizeLinear", [result, params.scale, params.zero_point], name=node.name)
    value = quantize.outputs[0]
    value.type, value.shape = ir.TensorType(params.dtype), result.shape
    moves = _moves(value, heads, reading.shape_of(params.result) or (), transposed=transposed)
    nodes = (*w_nodes, product, quantize, *moves)
    return Replacement(params.result, nodes[-1].outputs[0], nodes)


def _rows(value: ir.Value, channels: range) -> tuple[tuple[ir.Node, ...], ir.Value] | str:
    """The rows of the weight [N, K] that compute these channels, and the node they need."""
    window = slice(channels.start, channels.stop)
    held = reading.array(value)
    if held is not None:
        return (), reading.constant(f"{value.name}_part", held[window])
    stored = quantizers.quantized_constant(value)
    if stored is None or (stored.scale.size > 1 and stored.axis != 0):
        return f"the weight {value.name!r} is not a constant with a scale per output channel"
    arrays = [stored.q[window], stored.scale, stored.zero_point]
    if stored.scale.size > 1:
        arrays[1:] = [stored.scale[window], stored.zero_point[window]]
    names = [reading.data(stored.node, 0).name, f"{value.name}_scale", f"{value.name}_zero_point"]
    constants = [
        reading.constant(f"{name}_part", array) for name, array in zip(names, arrays, strict=True)
    ]
    attributes = {"axis": 0} if stored.scale.size > 1 else {}
    node = ir.node("DequantizeLinear", constants, attributes)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(arrays[0].shape)
    return (node,), node.outputs[0]


def _moves(
    value: ir.Value, heads: Heads, shape: tuple[int, ...], *, transposed: bool
) -> list[ir.Node]:
    """From rows of heads to the shape of the part."""
    split = (heads.batch, heads.length, heads.heads, heads.channels)
    perm = (0, 2, 3, 1) if transposed else (0, 2, 1, 3)
    nodes = [
        ir.node("Reshape", [value, reading.constant("heads", np.array(split, np.int64))]),
    ]
    nodes[0].outputs[0].shape, nodes[0].outputs[0].type = ir.Shape(split), value.type
    nodes.append(ir.node("Transpose", [nodes[0].outputs[0]], {"perm": perm}))
    moved = tuple(split[axis] for axis in perm)
    nodes[1].outputs[0].shape, nodes[1].outputs[0].type = ir.Shape(moved), value.type
    if moved != shape:
        to = reading.constant("part", np.array(shape, np.int64))
        nodes.append(ir.node("Reshape", [nodes[1].outputs[0], to]))
    return nodes

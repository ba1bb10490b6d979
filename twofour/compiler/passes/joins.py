"""Concat and Split: they move elements as movers.py says, between several tensors.

Concat(DQ(x1), .., DQ(xn)) = DQ(Concat(x1, .., xn))   where all have one scale and zero point
Q(Concat(x1, .., xn)) = Concat(Q(x1), .., Q(xn))
Split(DQ(x)) = DQ(Split(x))   and   Q(Split(x)) = Split(Q(x)), each result alike
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.quantizers import PerTensor
from twofour.compiler.passes.rewrite import Refused, Replacement


def commuted(node: ir.Node, inputs: Sequence[ir.Value], dtype: ir.DataType) -> ir.Node:
    """The same Concat or Split on quantized tensors.

    Args:
        node: on float.
        inputs: the quantized tensors it shall read instead; further inputs stay.
        dtype: of these.
    """
    every = [*inputs, *node.inputs[len(inputs) :]]
    new = ir.node(node.op_type, every, name=node.name, num_outputs=len(node.outputs))
    for attribute in node.attributes.values():
        new.attributes.add(attribute)
    for old, result in zip(node.outputs, new.outputs, strict=True):
        result.shape, result.type = old.shape, ir.TensorType(dtype)
    return new


def quantize(x: ir.Value, params: PerTensor, name: str | None) -> ir.Node:
    """Q(x)."""
    node = ir.node("QuantizeLinear", [x, params.scale, params.zero_point], name=name)
    node.outputs[0].shape, node.outputs[0].type = x.shape, ir.TensorType(params.dtype)
    return node


def dequantized_concat(node: ir.Node) -> Replacement | Refused | None:
    """Concat(DQ(x1), .., DQ(xn)) -> DQ(Concat(x1, .., xn)), or why not."""
    inputs = [reading.data(node, index) for index in range(len(node.inputs))]
    if not any(reading.is_op(value.producer(), "DequantizeLinear") for value in inputs):
        return None
    found = [quantizers.dequantizer(value) for value in inputs]
    if reasons := [reason for reason in found if isinstance(reason, str)]:
        return Refused("; ".join(dict.fromkeys(reasons)))
    params = [one for one in found if isinstance(one, PerTensor)]
    if not all(one.same_as(params[0]) for one in params[1:]):
        return Refused(f"its inputs have different scales: {_scales(params)}")
    moved = commuted(node, [one.source for one in params], params[0].dtype)
    scheme = [params[0].scale, params[0].zero_point]
    new = ir.node("DequantizeLinear", [moved.outputs[0], *scheme])
    return Replacement(node.outputs[0], new.outputs[0], (moved, new))


def dequantized_split(node: ir.Node) -> Replacement | Refused | None:
    """Split(DQ(x)) -> DQ(Split(x)), or why not."""
    if not reading.is_op(reading.data(node).producer(), "DequantizeLinear"):
        return None
    params = quantizers.dequantizer(reading.data(node))
    if isinstance(params, str):
        return Refused(params)
    moved = commuted(node, [params.source], params.dtype)
    nodes, pairs = [moved], []
    for old, part in zip(node.outputs, moved.outputs, strict=True):
        if old.uses() or old.is_graph_output():
            nodes.append(ir.node("DequantizeLinear", [part, params.scale, params.zero_point]))
            pairs.append((old, nodes[-1].outputs[0]))
    if not pairs:
        return None
    (old, new), *more = pairs
    return Replacement(old, new, tuple(nodes), more=tuple(more))


def quantized_concat(node: ir.Node, params: PerTensor) -> Replacement:
    """Q(Concat(x1, .., xn)) -> Concat(Q(x1), .., Q(xn)).

    Args:
        node: the Concat.
        params: its only reader; the inputs may be quantized.
    """
    inputs = [reading.data(node, index) for index in range(len(node.inputs))]
    above = {value: quantize(value, params, None) for value in inputs}
    moved = commuted(node, [above[value].outputs[0] for value in inputs], params.dtype)
    return Replacement(params.result, moved.outputs[0], (*above.values(), moved))


def quantized_split(node: ir.Node, params: PerTensor) -> Replacement | Refused | None:
    """Split whose results are all read by Q -> Split(Q(x)), or why not.

    Args:
        node: the Split.
        params: a reader of one of its results; the input may be quantized.
    """
    read = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    below = [quantizers.sole_quantizer(value) for value in read]
    if reasons := [reason for reason in below if isinstance(reason, str)]:
        return Refused("; ".join(reasons))
    found = [one for one in below if isinstance(one, PerTensor)]
    if not all(one.same_as(params) for one in found):
        return Refused(f"its results have different scales: {_scales(found)}")
    if any(reading.precedes(one.node, params.node) for one in found if one.node != params.node):
        return None  # the first of them does it for all
    x = reading.data(node)
    above = quantize(x, params, params.node.name)
    moved = commuted(node, [above.outputs[0]], params.dtype)
    parts = dict(zip(node.outputs, moved.outputs, strict=True))
    pairs = [(one.result, parts[one.source]) for one in found]
    pairs.sort(key=lambda pair: pair[0] is not params.result)
    return Replacement(*pairs[0], (above, moved), more=tuple(pairs[1:]))


def _scales(params: Sequence[PerTensor]) -> str:
    """Scale and zero point of each tensor."""
    return ", ".join(
        f"{p.source.name!r} {p.scale_number:g} ({p.zero_point_number})"
        for p in {p.source: p for p in params}.values()
    )

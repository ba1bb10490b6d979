"""Finds the weight of a Conv, Gemm or MatMul, float or quantized, laid out for the patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from twofour.core import numerics
from twofour.onnx_tools.edit import Array, constant, is_standard, operand

LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Weight:
    """A constant weight, as the pattern definitions want it.

    Attributes:
        name: of the initializer.
        stored: the array as it is in the file.
        values: [N, C, ...]: output channels first, input channels second; integers relative to the
            zero point where the weight is quantized.
        scale: float32 [] or [N] of the DequantizeLinear; None for a float weight.
    """

    name: str
    stored: Array
    values: Array
    scale: Array | None = None


def layer_weights(model: ir.Model) -> Iterator[tuple[ir.Node, Weight]]:
    """Each layer of the main graph and its subgraphs with its weight, in order.

    A layer whose weight is computed from an input of the model is passed over.
    """
    for layer in model.graph.all_nodes():
        weight = find_weight(layer)
        if weight is not None:
            yield layer, weight


def find_weight(layer: ir.Node) -> Weight | None:
    """The constant weight of a Conv, Gemm or MatMul; None for other nodes and computed weights.

    Followed are DequantizeLinear, QuantizeLinear, Transpose and Identity.
    """
    if not is_standard(layer, *LAYERS):
        return None
    found = _resolve(operand(layer, 1))
    if found is None or layer.op_type == "Conv":
        return found
    if layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1:
        return found
    if found.values.ndim != 2:
        return found
    return replace(found, values=found.values.T)


def _resolve(value: ir.Value | None) -> Weight | None:
    array = constant(value)
    if value is None or array is not None:
        return None if value is None or array is None else Weight(str(value.name), array, array)
    node = value.producer()
    if node is None or not is_standard(node, *_FOLLOWED):
        return None
    source = _resolve(operand(node, 0))
    if source is None or node.op_type == "Identity":
        return source
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", tuple(reversed(range(source.values.ndim))))
        return replace(source, values=source.values.transpose(perm))
    return _through_quantization(node, source)


_FOLLOWED = ("Identity", "Transpose", "QuantizeLinear", "DequantizeLinear")


def _through_quantization(node: ir.Node, source: Weight) -> Weight | None:
    scale, zero_point = constant(operand(node, 1)), constant(operand(node, 2))
    given = operand(node, 2) is not None
    if scale is None or (given and zero_point is None) or scale.ndim > 1:
        return None
    if node.op_type == "DequantizeLinear":
        values = source.values
        if zero_point is not None and zero_point.any():
            values = values.astype(np.int32) - _along(node, zero_point, values.ndim)
        return replace(source, values=values, scale=scale)
    dtype = np.uint8 if zero_point is None else zero_point.dtype
    if dtype not in (np.int8, np.uint8):
        return None
    ndim = source.values.ndim
    point = np.zeros((), dtype) if zero_point is None else _along(node, zero_point, ndim)
    quantized = numerics.quantize(source.values, _along(node, scale, ndim), point, dtype)
    return replace(source, values=quantized)


def _along(node: ir.Node, per_channel: Array, ndim: int) -> Array:
    """Shapes a scale or zero point so that it broadcasts along the node's axis."""
    if per_channel.size == 1:
        return per_channel.reshape(())
    shape = [1] * ndim
    shape[node.attributes.get_int("axis", 1) % ndim] = -1
    return per_channel.reshape(shape)

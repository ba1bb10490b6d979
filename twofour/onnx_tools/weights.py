"""Finds the weight of a Conv, Gemm or MatMul, float or quantized, laid out for the patterns.

A MatMulInteger is a MatMul whose weight is quantized.

It may be an initializer or a Constant node, of the main graph or of a body of If, Loop or Scan, and
stand behind DequantizeLinear, QuantizeLinear, Transpose and Identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from twofour.core import numerics
from twofour.onnx_tools import experts
from twofour.onnx_tools.edit import Array, constant, is_standard, operand

_MOST_FOLLOWED = 16
LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Weight:
    """A constant weight, as the pattern definitions want it.

    Attributes:
        name: of the initializer.
        stored: the array as it is in the file.
        values: [N, C, ...]: output channels first, input channels second; integers relative to the
            zero point where the weight is quantized.
        source: the initializer, or the output of the Constant node.
        axes: axis i of `values` is axis `axes[i]` of `stored`.
        zero: what stands for zero in `stored`: a number, or an array shaped like it.
        scale: float32 [] or [N] of the DequantizeLinear; None for a float weight.
    """

    name: str
    stored: Array
    values: Array
    source: ir.Value
    axes: tuple[int, ...]
    zero: Array
    scale: Array | None = None

    def turned(self, perm: Sequence[int]) -> Weight:
        """The same weight with the axes of `values` in another order, as by numpy.transpose."""
        axes = tuple(self.axes[i] for i in perm)
        return replace(self, values=self.values.transpose(perm), axes=axes)

    def as_stored(self, array: Array) -> Array:
        """An array laid out like `values`, laid out like `stored`."""
        return array.transpose(tuple(np.argsort(self.axes)))

    def store(self, array: Array) -> None:
        """Writes the weight to where it was read: an initializer or a Constant node.

        Args:
            array: laid out like `stored`, of its type.
        """
        old = ir.convenience.get_const_tensor(self.source)
        dtype = None if old is None else old.dtype
        tensor = ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=self.name)
        producer = self.source.producer()
        if producer is None:
            self.source.const_value = tensor
        else:
            producer.attributes["value"] = ir.AttrTensor("value", tensor)


def layer_weights(model: ir.Model) -> Iterator[tuple[ir.Node, Weight]]:
    """Each layer of the main graph and its subgraphs with its weight, in order.

    A layer whose weight is computed from an input of the model is passed over. Experts
    (experts.py) have two: [N, C, experts].
    """
    for layer in model.graph.all_nodes():
        for value in experts.matrices(layer):
            found = _resolve(value)
            if found is not None:
                yield layer, found.turned(experts.axes_of(found.values))
        weight = find_weight(layer)
        if weight is not None:
            yield layer, weight


def find_weight(layer: ir.Node) -> Weight | None:
    """The constant weight of a Conv, Gemm, MatMul or MatMulInteger; None for all others.

    The weights of a MatMul of more than two axes stay several matrices: [.., K, .., N].
    """
    if not is_standard(layer, *LAYERS, "MatMulInteger"):
        return None
    found = _resolve(operand(layer, 1))
    if found is not None and layer.op_type == "MatMulInteger":
        found = _integer(layer, found)
    if found is None or layer.op_type == "Conv":
        return found
    if layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1:
        return found
    dims = found.values.ndim
    if dims == 2:
        return found.turned((1, 0))
    return found if dims < 2 else found.turned((0, dims - 2, *range(1, dims - 2), dims - 1))


def _resolve(value: ir.Value | None, most: int = _MOST_FOLLOWED) -> Weight | None:
    array = constant(value)
    if value is not None and array is not None:
        # Types that numpy does not know, such as int4 and bfloat16, are exact as float32.
        values = array if array.dtype.kind in "fiu" else array.astype(np.float32)
        zero = np.zeros((), array.dtype)
        return Weight(str(value.name), array, values, value, tuple(range(array.ndim)), zero)
    if value is None:
        return None
    node = value.producer()
    if node is None or not most or not is_standard(node, *_FOLLOWED):
        return None
    source = _resolve(operand(node, 0), most - 1)
    if source is None or node.op_type == "Identity":
        return source
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", tuple(reversed(range(source.values.ndim))))
        return source.turned(perm) if sorted(perm) == list(range(source.values.ndim)) else None
    return _through_quantization(node, source)


_FOLLOWED = ("Identity", "Transpose", "QuantizeLinear", "DequantizeLinear")


def _through_quantization(node: ir.Node, source: Weight) -> Weight | None:
    scale, zero_point = constant(operand(node, 1)), constant(operand(node, 2))
    given = operand(node, 2) is not None
    if scale is None or (given and zero_point is None) or scale.ndim > 1:
        return None
    shape, axis = source.values.shape, node.attributes.get_int("axis", 1)
    size = shape[axis] if -len(shape) <= axis < len(shape) else 1
    if any(array is not None and array.size not in (1, size) for array in (scale, zero_point)):
        return None
    if node.op_type == "DequantizeLinear":
        if zero_point is None or not zero_point.any():
            return replace(source, scale=scale)
        point = _along(node, zero_point, source.values.ndim)
        return replace(_relative(source, point), scale=scale)
    dtype = np.uint8 if zero_point is None else zero_point.dtype
    if dtype not in (np.int8, np.uint8):
        return None
    ndim = source.values.ndim
    point = np.zeros((), dtype) if zero_point is None else _along(node, zero_point, ndim)
    quantized = numerics.quantize(source.values, _along(node, scale, ndim), point, dtype)
    return replace(source, values=quantized)


def _integer(layer: ir.Node, source: Weight) -> Weight | None:
    """The weight of a MatMulInteger, whose zero point is one number or one for each column."""
    given, point = operand(layer, 3), constant(operand(layer, 3))
    if given is None or (point is not None and not point.any()):
        return source
    columns = source.values.shape[-1:]
    if point is None or (point.size != 1 and point.shape != columns):
        return None
    return _relative(source, point.reshape(-1))


def _relative(source: Weight, point: Array) -> Weight:
    """Integers relative to a zero point that broadcasts to them."""
    values = source.values
    if source.stored.dtype.kind in "iu":
        source = replace(source, zero=source.as_stored(np.broadcast_to(point, values.shape)))
    return replace(source, values=values.astype(np.int32) - point)


def _along(node: ir.Node, per_channel: Array, ndim: int) -> Array:
    """Shapes a scale or zero point so that it broadcasts along the node's axis."""
    if per_channel.size == 1:
        return per_channel.reshape(())
    shape = [1] * ndim
    shape[node.attributes.get_int("axis", 1) % ndim] = -1
    return per_channel.reshape(shape)

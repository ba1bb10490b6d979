"""What QuantizeLinear and DequantizeLinear nodes say, once canonical_quantize has run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.core import numerics


@dataclass(frozen=True)
class PerTensor:
    """A per-tensor quantizer with constant parameters.

    Attributes:
        node: the QuantizeLinear or DequantizeLinear.
        scale: float32 scalar initializer, finite and positive.
        zero_point: int8 or uint8 scalar initializer.
    """

    node: ir.Node
    scale: ir.Value
    zero_point: ir.Value

    @property
    def source(self) -> ir.Value:
        """What it reads."""
        return reading.data(self.node)

    @property
    def result(self) -> ir.Value:
        """What it computes."""
        return self.node.outputs[0]

    @property
    def dtype(self) -> ir.DataType:
        """Of the quantized side."""
        return ir.DataType.from_numpy(self._numbers()[1].dtype)

    def _numbers(self) -> tuple[reading.Array, reading.Array]:
        scale, zero_point = reading.array(self.scale), reading.array(self.zero_point)
        if scale is None or zero_point is None:
            raise ValueError(f"the parameters of {self.node.name!r} are not constants")
        return scale, zero_point

    @property
    def scale_number(self) -> float:
        """The scale."""
        return float(self._numbers()[0])

    @property
    def zero_point_number(self) -> int:
        """The zero point."""
        return int(self._numbers()[1])

    def same_as(self, other: PerTensor) -> bool:
        """Whether scale, zero point and type are equal."""
        mine, theirs = self._numbers(), other._numbers()
        return all(a.dtype == b.dtype and a == b for a, b in zip(mine, theirs, strict=True))


def per_tensor(node: ir.Node) -> PerTensor | str:
    """Reads a QuantizeLinear or DequantizeLinear, or says why it is not a usable per-tensor one."""
    what = f"{node.op_type} {node.name!r}"
    scale_value, zero_point_value = reading.data(node, 1), reading.optional(node, 2)
    scale, zero_point = reading.array(scale_value), reading.array(zero_point_value)
    if scale is None or zero_point is None or zero_point_value is None:
        return f"{what} has a scale or zero point that is computed at run time"
    if scale.ndim:
        return f"{what} is per channel; activations are quantized per tensor"
    if zero_point.dtype not in (np.int8, np.uint8):
        return f"{what} quantizes to {zero_point.dtype}; expected int8 or uint8"
    if scale.dtype != np.float32 or not np.isfinite(scale) or scale <= 0:
        return f"{what} has scale {scale} ({scale.dtype}); expected a positive float32"
    return PerTensor(node, scale_value, zero_point_value)


def dequantizer(value: ir.Value) -> PerTensor | str:
    """The per-tensor DequantizeLinear that computes the value, or why there is none."""
    producer = value.producer()
    if producer is None:
        origin = "an input of the model" if value.is_graph_input() else "a constant"
        return f"{value.name!r} is float: it is {origin}"
    if not reading.is_op(producer, "DequantizeLinear"):
        return f"{value.name!r} is float: it comes from {producer.op_type} {producer.name!r}"
    return per_tensor(producer)


def sole_quantizer(value: ir.Value) -> PerTensor | str:
    """The per-tensor QuantizeLinear that alone reads the value, or why there is none."""
    reader = reading.sole_reader(value)
    if isinstance(reader, str):
        return reader
    if not reading.is_op(reader, "QuantizeLinear"):
        return f"its result is read as float by {reader.op_type} {reader.name!r}"
    return per_tensor(reader)


@dataclass(frozen=True)
class QuantizedConstant:
    """A DequantizeLinear of constants: a weight or bias as files store it.

    Attributes:
        node: the DequantizeLinear.
        q: integers, any shape.
        scale: float32, of one element or one per index of `axis`.
        zero_point: integers, likewise.
        axis: of `q`, counted from 0.
    """

    node: ir.Node
    q: reading.Array
    scale: reading.Array
    zero_point: reading.Array
    axis: int

    @property
    def along(self) -> tuple[int, ...]:
        """The shape in which scale and zero point broadcast to `q`."""
        return reading.broadcast_shape(self.q.ndim, self.axis)

    @property
    def centred(self) -> reading.Array:
        """Int32, q - zero_point."""
        return self.q.astype(np.int32) - self.zero_point.reshape(self.along).astype(np.int32)

    @property
    def real(self) -> reading.Array:
        """Float32, (q - zero_point) * scale."""
        shape = self.along
        return numerics.dequantize(
            self.q, self.scale.reshape(shape), self.zero_point.reshape(shape)
        )


def quantized_constant(value: ir.Value) -> QuantizedConstant | None:
    """Reads the DequantizeLinear of constants that computes the value; None if there is none."""
    node = value.producer()
    if node is None or not reading.is_op(node, "DequantizeLinear"):
        return None
    given = reading.optional(node, 2)
    q, scale, zero_point = (reading.array(v) for v in (*node.inputs[:2], given))
    if q is None or scale is None or (given is not None and zero_point is None):
        return None
    blocks = scale.ndim > 1 or reading.int_attribute(node, "block_size", 0)
    if blocks or q.dtype.kind not in "iu" or scale.dtype != np.float32:
        return None
    if zero_point is None:
        zero_point = np.zeros(scale.shape, q.dtype)
    axis = reading.int_attribute(node, "axis", 1) % max(1, q.ndim) if scale.size > 1 else 0
    return QuantizedConstant(node, q, scale, zero_point, axis)


def float_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of `float_constant`, without its contents."""
    stored = quantized_constant(value)
    if stored is not None:
        return stored.q.shape
    contents = reading.array(value)
    return contents.shape if contents is not None and contents.dtype == np.float32 else None


def float_constant(value: ir.Value) -> reading.Array | None:
    """The float32 contents of an initializer, or of a DequantizeLinear of one."""
    contents = reading.array(value)
    if contents is not None:
        return contents if contents.dtype == np.float32 else None
    stored = quantized_constant(value)
    return None if stored is None else stored.real

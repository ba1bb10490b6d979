"""What QuantizeLinear and DequantizeLinear nodes say, once canonical_quantize has run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading


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

"""Where the operands of an attention come from, and where its result goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading, tracing


@dataclass(frozen=True)
class Heads:
    """An operand: heads side by side in the rows of `source`.

    Attributes:
        source: [..., width] of batch * length rows.
        first: the channel where head 0 starts.
        batch: sequences.
        heads: heads of a sequence.
        length: rows of a sequence.
        channels: of a head.
        factor: what the operand is multiplied with.
        quantizer: its DequantizeLinear, or None.
    """

    source: ir.Value
    first: int
    batch: int
    heads: int
    length: int
    channels: int
    factor: float
    quantizer: quantizers.PerTensor | None

    def rows(self, nodes: list[ir.Node]) -> ir.Value:
        """The operand as [batch, length, heads * channels]; new nodes are appended."""
        shape = reading.shape_of(self.source) or ()
        width, wanted = shape[-1], self.heads * self.channels
        value = self.source
        if shape != (self.batch, self.length, width):
            value = _reshaped(value, (self.batch, self.length, width), nodes)
        if wanted == width:
            return value
        bounds = [
            reading.constant(name, np.array([number], np.int64))
            for name, number in (
                ("first", self.first),
                ("end", self.first + wanted),
                ("axis", 2),
            )
        ]
        return _appended(ir.node("Slice", [value, *bounds]), self._shape, value.dtype, nodes)

    def dequantized(self, value: ir.Value, nodes: list[ir.Node]) -> ir.Value:
        """The operand's rows as float32."""
        assert self.quantizer is not None
        inputs = [value, self.quantizer.scale, self.quantizer.zero_point]
        node = ir.node("DequantizeLinear", inputs)
        return _appended(node, self._shape, ir.DataType.FLOAT, nodes)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.batch, self.length, self.heads * self.channels)


def _reshaped(value: ir.Value, shape: tuple[int, ...], nodes: list[ir.Node]) -> ir.Value:
    """The value in another shape."""
    to = reading.constant("shape", np.array(shape, np.int64))
    return _appended(ir.node("Reshape", [value, to]), shape, value.dtype, nodes)


def _appended(
    node: ir.Node, shape: tuple[int, ...], dtype: ir.DataType | None, nodes: list[ir.Node]
) -> ir.Value:
    """The result of a new node, typed."""
    nodes.append(node)
    result = node.outputs[0]
    result.shape = ir.Shape(shape)
    result.type = None if dtype is None else ir.TensorType(dtype)
    return result


def heads_of(value: ir.Value, *, transposed: bool) -> Heads | str:
    """Reads an operand of one of the two products.

    Args:
        value: [batch, heads, length, channels], or batch * heads in one axis; the last two axes
            the other way round if `transposed`.
        transposed: it is k'.
    """
    found: Heads | None = None
    for step in tracing.way_up(value):
        index = step.index()
        if index is None:
            continue
        index = index.swapaxes(-1, -2) if transposed else index
        found = _side_by_side(index, step) or found
    if found is not None:
        return found
    return f"the heads of {value.name!r} do not lie side by side in the rows of a value before it"


def _side_by_side(index: reading.Array, step: tracing.Step) -> Heads | None:
    """The heads, if they lie in the rows of the step's value, each head in consecutive channels."""
    shape = reading.shape_of(step.value)
    if shape is None or len(shape) not in (2, 3) or index.ndim < 3:
        return None
    length, channels = index.shape[-2:]
    width, size = shape[-1], int(np.prod(shape))
    batch, rest = divmod(size, length * width)
    count = index.size // (length * channels)
    if rest or batch < 1 or count % batch or (len(shape) == 3 and shape[0] != batch):
        return None
    heads, first = count // batch, int(index.reshape(-1)[0])
    if first + heads * channels > width:
        return None
    rows = np.arange(batch * length).reshape(batch, 1, length, 1) * width
    inside = first + np.arange(heads * channels).reshape(1, heads, 1, channels)
    if not np.array_equal(index.reshape(batch, heads, length, channels), rows + inside):
        return None
    return Heads(step.value, first, batch, heads, length, channels, step.factor, step.quantizer)


@dataclass(frozen=True)
class Result:
    """Where the result lies in rows again.

    Attributes:
        value: whose elements are [batch, length, heads * channels] in this order.
        quantizer: met on the way, or None.
    """

    value: ir.Value
    quantizer: quantizers.PerTensor | None

    def back(self, rows: ir.Value, q: Heads, stored: quantizers.PerTensor | None) -> list[ir.Node]:
        """What makes `value` of the attention's result, if anything.

        Args:
            rows: the attention's result.
            q: its first operand.
            stored: the quantizer that the attention applies itself, or None.
        """
        nodes: list[ir.Node] = []
        shape = reading.shape_of(self.value) or ()
        size = int(np.prod(shape))
        rows.shape = ir.Shape((q.batch, q.length, size // (q.batch * q.length)))
        held = self.quantizer
        stored_type = ir.DataType.FLOAT if stored is None else stored.dtype
        rows.type = ir.TensorType(stored_type)
        if held is not None and stored is None:
            inputs = [rows, held.scale, held.zero_point]
            node = ir.node("QuantizeLinear", inputs)
            rows = _appended(node, tuple(rows.shape.numpy()), held.dtype, nodes)
        if tuple(rows.shape.numpy() if rows.shape is not None else ()) != shape:
            _reshaped(rows, shape, nodes)
        return nodes


def result_of(product: ir.Value, q: Heads, channels: int) -> Result | str:
    """Follows the second product to where the heads lie side by side again.

    Args:
        product: [batch, heads, length, channels] in some shape.
        q: the first operand.
        channels: of a head of v.
    """
    count = q.batch * q.heads * q.length * channels
    order = np.arange(count).reshape(q.batch, q.heads, q.length, channels)
    wanted = order.transpose(0, 2, 1, 3).reshape(-1)
    shape = reading.shape_of(product)
    if shape is None or int(np.prod(shape)) != count:
        return f"the product {product.name!r} has an unexpected shape"
    value, index = product, order.reshape(shape)
    quantizer: quantizers.PerTensor | None = None
    while True:
        if len(index.shape) in (2, 3) and index.shape[-1] == q.heads * channels:
            if np.array_equal(index.reshape(-1), wanted):
                return _quantized(value, quantizer)
        reader = reading.sole_reader(value)
        if isinstance(reader, str):
            return f"the product is not moved back to rows: {reader}"
        if reading.is_op(reader, "QuantizeLinear") and quantizer is None:
            params = quantizers.per_tensor(reader)
            if isinstance(params, str):
                return params
            quantizer, value = params, params.result
            continue
        moved = tracing.moved(index, reader.outputs[0]) if tracing.is_move(reader) else None
        if moved is None or len(reader.outputs) > 1 or moved.size != index.size:
            return (
                f"the product is not moved back to rows: {reader.op_type} {reader.name!r} reads it"
            )
        value, index = reader.outputs[0], moved


def _quantized(value: ir.Value, quantizer: quantizers.PerTensor | None) -> Result:
    """The result, with the quantizer that may follow it."""
    if quantizer is None:
        after = quantizers.sole_quantizer(value)
        if not isinstance(after, str):
            return Result(after.result, after)
    return Result(value, quantizer)

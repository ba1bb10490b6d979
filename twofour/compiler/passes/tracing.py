"""Where the elements of a value come from, through everything that only moves elements.

Exporters spell the same move in many ways: `Reshape, Transpose`, `Reshape, Transpose, Reshape` for
a product of 3 dimensions, `Transpose<1, 0, 2>`, `Split` or `Gather` of a joint projection, and so
on. Instead of one pattern for each spelling, the places of all elements are computed and compared
with the places that are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading

_SAME_ORDER = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_MOVERS = (*_SAME_ORDER, "Transpose", "Slice", "Gather", "Split")
_LONGEST = 12  # moves between a projection and its product; more have not been seen


def is_move(node: ir.Node | None) -> bool:
    """Whether each element of the results is one of input 0, in the same or another place."""
    return reading.is_op(node, *_MOVERS)


def moved(index: reading.Array, value: ir.Value) -> reading.Array | None:
    """What becomes of an array of places when the producer of `value` moves it.

    Args:
        index: in the shape of the producer's input 0.
        value: a result of a node that `is_move`.

    Returns:
        The places of the elements of `value`; None where the move depends on what is computed, or
        is to a shape that does not hold as many.
    """
    node, shape = value.producer(), reading.shape_of(value)
    if node is None or shape is None:
        return None
    if node.op_type in _SAME_ORDER:
        return index.reshape(shape) if index.size == math.prod(shape) else None
    if node.op_type == "Transpose":
        return index.transpose(reading.ints_attribute(node, "perm", (*range(index.ndim),)[::-1]))
    if node.op_type == "Gather":
        rows = reading.array(node.inputs[1])
        axis = reading.int_attribute(node, "axis", 0)
        return None if rows is None else index.take(rows, axis)
    if node.op_type == "Split":
        axis = reading.int_attribute(node, "axis", 0) % index.ndim
        before = [reading.shape_of(v) for v in node.outputs[: value.index() or 0]]
        start = sum(dims[axis] for dims in before if dims is not None)
        return index.take(range(start, start + shape[axis]), axis)
    return _sliced(index, node)


def _sliced(index: reading.Array, node: ir.Node) -> reading.Array | None:
    """Slice with constant bounds."""
    starts, ends = reading.int_list(node, 1), reading.int_list(node, 2)
    if starts is None or ends is None:
        return None
    axes = reading.int_list(node, 3) or tuple(range(len(starts)))
    steps = reading.int_list(node, 4) or (1,) * len(starts)
    if min(steps) < 1:
        return None
    window = [slice(None)] * index.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        window[axis] = slice(start, end, step)
    return index[tuple(window)]


@dataclass(frozen=True)
class Step:
    """A value on the way up, and what was met between it and where the way began.

    Attributes:
        value: the elements come from here.
        factor: what they are multiplied with on the way down.
        quantizer: the DequantizeLinear they pass on the way down, or None.
        below: the values on the way down, the first one just under `value`.
    """

    value: ir.Value
    factor: float = 1.0
    quantizer: quantizers.PerTensor | None = None
    below: tuple[ir.Value, ...] = ()

    def index(self) -> reading.Array | None:
        """For each element where the way began, its place in `value`."""
        shape = reading.shape_of(self.value)
        index = None if shape is None else np.arange(int(np.prod(shape))).reshape(shape)
        for value in self.below:
            if index is not None and is_move(value.producer()):
                index = moved(index, value)
        return index


def way_up(value: ir.Value) -> Iterator[Step]:
    """From a value to what its elements come from, through moves, factors and one dequantizer."""
    step = Step(value)
    yield step
    for _ in range(_LONGEST):
        node = step.value.producer()
        if node is None:
            return
        source, factor, quantizer = node.inputs[0], step.factor, step.quantizer
        if not is_move(node):
            scaled = scale_of(node)
            if scaled is not None:
                source, factor = scaled[0], factor * scaled[1]
            elif reading.is_op(node, "DequantizeLinear") and quantizer is None:
                read = quantizers.per_tensor(node)
                if isinstance(read, str):
                    return
                quantizer = read
            else:
                return
        if source is None:
            return
        step = Step(source, factor, quantizer, (step.value, *step.below))
        yield step


def scale_of(node: ir.Node) -> tuple[ir.Value, float] | None:
    """What a Mul or Div by one constant number multiplies, and by how much."""
    if not reading.is_op(node, "Mul", "Div"):
        return None
    for index in (0, 1) if node.op_type == "Mul" else (1,):
        number = reading.array(node.inputs[index])
        other = node.inputs[1 - index]
        if number is not None and number.size == 1 and other is not None:
            if reading.array(other) is None and number.dtype == np.float32:
                factor = float(number.reshape(()))
                return other, factor if node.op_type == "Mul" else 1.0 / factor
    return None


def images_as_rows(shape: Sequence[int]) -> reading.Array:
    """The places of [N, H * W, C] in [N, C, H, W]."""
    index = np.arange(int(np.prod(shape))).reshape(tuple(shape))
    return index.transpose(0, 2, 3, 1).reshape(shape[0], shape[2] * shape[3], shape[1])

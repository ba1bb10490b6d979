"""Constants of an exported graph: weights that are cut and turned before a layer reads them.

The exporter leaves some of that to each run: `in_proj_weight` of an attention over other tokens is
split, a weight that was quantized is transposed. Here it is done once, to the integers and scales
of a quantized weight alike, so that parts of a packed weight are weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from twofour.core.errors import InputError

Array = NDArray[Any]
Weights = dict[onnx_ir.Value, "Rounded"]

_MOVES = ("Split", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice")


@dataclass(frozen=True)
class Rounded:
    """A weight as integers times scales.

    Attributes:
        w8: int8, any shape.
        scale: float32, the shape of `w8`; the same along all axes but one.
    """

    w8: Array
    scale: Array

    @property
    def floats(self) -> Array:
        """What it stands for: float32."""
        return self.w8.astype(np.float32) * self.scale

    def parts(self, cut: Callable[[Array], list[Array]]) -> list[Rounded]:
        """What becomes of it where both are cut or moved in the same way."""
        return [Rounded(*both) for both in zip(cut(self.w8), cut(self.scale), strict=True)]

    def channels(self, default: int) -> tuple[int, Array]:
        """The axis that the scale depends on, or the default one, and the scale along it."""
        for axis in (default, *range(self.w8.ndim)):
            others = tuple(i for i in range(self.w8.ndim) if i != axis)
            low, high = (f(self.scale, axis=others) for f in (np.min, np.max))
            if np.array_equal(low, high):
                return axis, np.ascontiguousarray(low)
        raise InputError(
            "cannot export a weight whose channels were moved together",
            ["its scales differ along more than one axis of what a layer reads"],
            "reshape the weight before it is quantized",
        )


def constant(value: onnx_ir.Value | None) -> Array | None:
    """The array that an initializer holds; None for what is computed."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def cut_constants(graph: onnx_ir.Graph, weights: Weights) -> None:
    """Computes what only cuts, turns or shapes a constant.

    Args:
        graph: changed.
        weights: initializer -> the integers behind it; the parts are added.
    """
    for node in list(graph):
        source = node.inputs[0] if node.op_type in _MOVES and not node.domain else None
        inputs = [value for value in node.inputs if value is not None]
        given = [array for value in inputs if (array := constant(value)) is not None]
        if source is None or len(given) < len(inputs):
            continue
        if any(value.is_graph_output() for value in node.outputs):
            continue
        cut = _cut(node, given[1:], graph.opset_imports[""])
        parts = cut(given[0])
        twins = weights[source].parts(cut) if source in weights else []
        for i, value in enumerate(node.outputs):
            tensor = onnx_ir.tensor(np.ascontiguousarray(parts[i]), name=str(value.name))
            made = onnx_ir.val(tensor.name, tensor.dtype, parts[i].shape, const_value=tensor)
            value.replace_all_uses_with(made)
            value.name = None
            graph.register_initializer(made)
            if twins:
                weights[made] = twins[i]
        graph.remove(node, safe=True)
        if source.is_initializer() and not source.uses():
            del graph.initializers[str(source.name)]
            weights.pop(source, None)


def _cut(node: onnx_ir.Node, others: list[Array], opset: int) -> Callable[[Array], list[Array]]:
    """What the node makes of its first input."""
    names = [str(value.name) for value in node.inputs if value is not None]
    evaluator = ReferenceEvaluator(onnx_ir.to_proto(node), opsets={"": opset})

    def cut(whole: Array) -> list[Array]:
        made = evaluator.run(None, dict(zip(names, [whole, *others], strict=True)))
        return [np.ascontiguousarray(each) for each in made]

    return cut

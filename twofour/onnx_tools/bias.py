"""Where the bias of a layer is, or can be: what is added to its output, one number a channel.

It is the last input of what follows:

Conv(x, w, b)               input 2, which may still be missing
Gemm(x, w, c)               input 2, which may still be missing, times beta
Add(MatMul(x, w), c)        the constant
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.onnx_tools.edit import Array, Editor, constant, is_standard, operand, sole_reader
from twofour.onnx_tools.weights import Weight

_FLOATS = (np.float16, np.float32, np.float64)


@dataclass(frozen=True)
class Bias:
    """The place of a layer's bias.

    Attributes:
        node: that reads it: the layer, or the Add after it.
        index: which of its inputs it is.
        channels: of the output.
        axis: of the output, counts the channels.
        dtype: of the output.
        factor: what the node multiplies it by.
    """

    node: ir.Node
    index: int
    channels: int
    axis: int
    dtype: np.dtype[np.generic]
    factor: float = 1.0

    @property
    def output(self) -> ir.Value:
        """The value that the bias is part of."""
        return self.node.outputs[0]

    def scale_and_shift(self, editor: Editor, scale: Array, shift: Array) -> None:
        """The new bias is the old one * scale + shift.

        Args:
            editor: of the node's graph.
            scale: float64 [channels].
            shift: float64 [channels], of the output.
        """
        found, factor = constant(operand(self.node, self.index)), self.factor
        old = np.zeros(1) if found is None or not factor else found
        if not factor:  # whatever was there, it was multiplied away
            self.node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
            factor = 1.0
        new = old * scale + shift / factor
        editor.set_constant(self.node, self.index, new.astype(self.dtype))


def find_bias(layer: ir.Node, found: Weight) -> Bias | str:
    """The place of a layer's bias, or in words why it has none.

    Args:
        layer: a Conv, Gemm or MatMul.
        found: its weight, float or quantized.
    """
    weight = found.values
    dtype = weight.dtype if found.scale is None else found.scale.dtype
    if dtype not in _FLOATS:
        return f"its weight is {dtype}"
    if layer.op_type != "MatMul":
        given = operand(layer, 2)
        if given is not None and constant(given) is None:
            return "its bias is computed"
        factor = layer.attributes.get_float("beta", 1.0) if layer.op_type == "Gemm" else 1.0
        return Bias(layer, 2, len(weight), 1, dtype, factor)
    if weight.ndim != 2:
        return f"its weight is {weight.ndim - 1} axes of matrices"
    output = layer.outputs[0]
    reader = sole_reader(output)
    if reader is None or not is_standard(reader, "Add"):
        return "no Add of a bias follows"
    index = 1 if reader.inputs[0] is output else 0
    array = constant(operand(reader, index))
    if array is None:
        return "what is added to it is no constant"
    if array.ndim and array.shape[-1] not in (1, len(weight)):
        return "what is added to it has more channels"
    return Bias(reader, index, len(weight), -1, dtype)

"""Brings any float model into the one form that quantization starts from.

Functions inlined, constants as initializers, opset 13 or later, weights that are stored rounded as
the floats they stand for, BatchNorm folded into the convolution before it, value types and shapes
inferred.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray

from twofour.core import numerics
from twofour.onnx_tools.edit import Editor, bypass, constant, is_standard, operand, sole_use
from twofour.onnx_tools.folding import fold_constants
from twofour.onnx_tools.infer import infer_shapes
from twofour.onnx_tools.plugins import inline
from twofour.onnx_tools.upgrade import upgrade

Array = NDArray[Any]

LEAST_OPSET = 13
"""The first with an axis in DequantizeLinear."""


def prepare(model: ir.Model) -> ir.Model:
    """Returns an equivalent model in the form described above; the given one stays as it is.

    Raises:
        UnsupportedError: the opset is below 13 and cannot be converted.
    """
    model = model.clone()
    common_passes.RemoveInitializersFromInputsPass()(model)
    inline(model)
    model = upgrade(model, LEAST_OPSET)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fold_constants(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _drop_identities(model.graph)
    fold_quantizers(model)
    fold_batchnorm(model)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.NameFixPass()(model)
    infer_shapes(model)
    return model


def fold_batchnorm(model: ir.Model) -> int:
    """Conv(x, w, b) -> BatchNormalization   =>   Conv(x, w * g, (b - mean) * g + beta).

    With g = gamma / sqrt(variance + epsilon), one factor per output channel; so zeros stay zeros.
    The result keeps the name of the BatchNormalization's: it is that value.
    Legal if: 1. the Conv's output goes to the BatchNormalization alone; 2. that is in inference
    mode; 3. weight, bias and the four parameters are float32 constants.

    Returns:
        How many were folded.
    """
    editor = Editor(model.graph)
    norms = [node for node in model.graph if is_standard(node, "BatchNormalization")]
    return sum(_fold_into_conv(editor, norm) for norm in norms)


def fold_quantizers(model: ir.Model) -> int:
    """DequantizeLinear(w8, scale, zero_point)   =>   (w8 - zero_point) * scale, for constants.

    QuantizeLinear of a constant likewise, so that a weight in either form is the floats it stands
    for.

    Returns:
        How many were folded.
    """
    editor = Editor(model.graph)
    nodes = [n for n in model.graph if is_standard(n, "QuantizeLinear", "DequantizeLinear")]
    return sum(_fold_quantizer(editor, node) for node in nodes)


def _fold_quantizer(editor: Editor, node: ir.Node) -> bool:
    """Folds one, or returns False and leaves it."""
    given = [value for value in node.inputs if value is not None]
    arrays = [constant(value) for value in given]
    found = [array for array in arrays if array is not None]
    if len(found) != len(given) or node.outputs[0].is_graph_output():
        return False
    x, scale = found[0], _along(node, found[1], found[0].shape)
    point = _along(node, found[2], x.shape) if len(found) > 2 else np.zeros((), np.uint8)
    if node.op_type == "DequantizeLinear":
        real = (x.astype(np.float32) - point.astype(np.float32)) * scale.astype(np.float32)
        array = real.astype(found[1].dtype)
    elif point.dtype in (np.int8, np.uint8):
        array = numerics.quantize(x, scale, point, point.dtype)
    else:
        return False
    result = node.outputs[0]
    result.replace_all_uses_with(editor.initializer(f"{result.name}_folded", array))
    editor.graph.remove(node, safe=True)
    return True


def _along(node: ir.Node, per_channel: Array, shape: tuple[int, ...]) -> Array:
    """A scale or zero point for each value: one number, one a channel, or one a block."""
    if per_channel.size == 1:
        return per_channel.reshape(())
    axis = node.attributes.get_int("axis", 1) % len(shape)
    if per_channel.ndim > 1:
        even = -(-shape[axis] // per_channel.shape[axis])
        block = node.attributes.get_int("block_size", 0) or even
        return per_channel.repeat(block, axis).take(range(shape[axis]), axis)
    return per_channel.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _drop_identities(graph: ir.Graph) -> None:
    """Takes out what hands its input on, where that keeps the names of inputs and outputs."""
    for node in [node for node in graph if is_standard(node, "Identity")]:
        before, after = operand(node, 0), node.outputs[0]
        if before is not None and (before.producer() is not None or not after.is_graph_output()):
            if not (before.is_graph_output() and after.is_graph_output()):
                bypass(after, before)


def _fold_into_conv(editor: Editor, norm: ir.Node) -> bool:
    """Folds one BatchNormalization, or returns False and leaves it."""
    between = operand(norm, 0)
    conv = between.producer() if between is not None else None
    if between is None or conv is None or not is_standard(conv, "Conv") or not sole_use(between):
        return False
    if norm.attributes.get_int("training_mode", 0):
        return False
    bias = operand(conv, 2)
    arrays = [constant(value) for value in (operand(conv, 1), *norm.inputs[1:5])]
    arrays.append(np.zeros(1, np.float32) if bias is None else constant(bias))
    floats = [a.astype(np.float64) for a in arrays if a is not None and a.dtype == np.float32]
    if len(floats) != 6:
        return False
    w, gamma, beta, mean, variance, b = floats
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    w *= factor.reshape(-1, *[1] * (w.ndim - 1))
    editor.set_constant(conv, 1, w.astype(np.float32))
    editor.set_constant(conv, 2, ((b - mean) * factor + beta).astype(np.float32))
    name = norm.outputs[0].name
    bypass(norm.outputs[0], between)
    between.name = name  # what it holds now
    return True

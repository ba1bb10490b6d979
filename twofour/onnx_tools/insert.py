"""Writes Q/DQ pairs and int8 weights into a prepared float model.

    x -> Conv(w) -> Relu -> y     =>     x -> Q -> DQ -> Conv(DQ(w8)) -> Relu -> Q -> DQ -> y

Weights are symmetric int8 per output channel and stored as int8; zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from twofour.core.errors import InputError
from twofour.core.ranges import Affine
from twofour.core.rounding import quantize_weight
from twofour.onnx_tools.edit import Array, Editor, constant
from twofour.onnx_tools.options import WeightForm
from twofour.onnx_tools.placement import Placement, output_axis

Rounded = Mapping[str, tuple[Array, Array]]
"""Layer name -> its weight as int8 in -127..127, and float32 [N] scales of the output channels."""


def insert(
    model: ir.Model,
    placement: Placement,
    schemes: Mapping[str, Affine],
    rounded: Rounded | None = None,
    weights: WeightForm = "int8",
) -> None:
    """Writes Q/DQ pairs and int8 weights into the model.

    Args:
        model: the one that `placement` was made from; changed.
        placement: what is quantized.
        schemes: by the names of `placement.sources`, see `Placement.schemes`.
        rounded: weights that a step of the recipe rounded; the others go to the nearest.
        weights: `int8`: stored so, with a DequantizeLinear; `float`: the floats, with Q -> DQ.

    Raises:
        InputError: a weight is not finite.
    """
    editor = Editor(model.graph)
    _quantize_weights(editor, placement.layers, rounded or {}, weights)
    constants = {
        source: _scheme_constants(editor, str(source.name), schemes[str(source.name)])
        for source in placement.sources
    }
    for value, source in placement.scale_of.items():
        _quantize_activation(editor, value, constants[source], placement.stay_float)


def _weight_constants(
    editor: Editor, layer: ir.Node, rounded: Rounded, form: WeightForm
) -> list[ir.Value]:
    """Adds weight, scale and zero point of a layer; the weight as it is to be stored."""
    weight = layer.inputs[1]
    if weight is None:
        raise ValueError(f"{layer.name!r} has no weight")
    chosen = rounded.get(str(layer.name))
    w8, scale = chosen or nearest(layer)
    if form == "int8":
        stored = editor.initializer(f"{weight.name}_quantized", w8)
    elif chosen is None:
        stored = weight
    else:
        along = np.moveaxis(np.moveaxis(w8, output_axis(layer), -1) * scale, -1, output_axis(layer))
        stored = editor.initializer(f"{weight.name}_rounded", along.astype(np.float32))
    return [
        stored,
        editor.initializer(f"{weight.name}_scale", scale),
        editor.initializer(f"{weight.name}_zero_point", np.zeros(len(scale), np.int8)),
    ]


def nearest(layer: ir.Node) -> tuple[Array, Array]:
    """Each weight rounded to the nearest step, and the scales.

    Args:
        layer: a Conv, Gemm or MatMul with a constant weight.

    Returns:
        int8 in -127..127, laid out as the weight is, and float32 [N].

    Raises:
        InputError: the weight is not finite.
    """
    weight = layer.inputs[1]
    array = constant(weight)
    if weight is None or array is None:
        raise ValueError(f"{layer.name!r} has no constant weight")
    try:
        return quantize_weight(array, output_axis(layer))
    except ValueError as error:
        raise not_finite_weight(layer, array) from error


def not_finite_weight(layer: ir.Node, array: Array) -> InputError:
    """The error for a weight that is NaN or infinite.

    Args:
        layer: that reads it.
        array: the weight.
    """
    name = "" if layer.inputs[1] is None else layer.inputs[1].name
    return InputError(
        f"weight {name!r} of {layer.op_type} {layer.name!r} is not finite",
        [f"{np.count_nonzero(~np.isfinite(array))} of its values are NaN or infinite"],
        "load a checkpoint from before training diverged",
    )


def _quantize_weights(
    editor: Editor, layers: tuple[ir.Node, ...], rounded: Rounded, form: WeightForm
) -> None:
    constants: dict[tuple[ir.Value | None, int], list[ir.Value]] = {}
    for layer in layers:
        weight, axis = layer.inputs[1], output_axis(layer)
        if (weight, axis) not in constants:
            constants[weight, axis] = _weight_constants(editor, layer, rounded, form)
        stored, *scheme = constants[weight, axis]
        base = str(stored.name).removesuffix("_quantized")
        if form == "float":
            name = f"{base}_quantized"
            q = editor.node(
                "QuantizeLinear", [stored, *scheme], name, stored, ir.DataType.INT8, axis
            )
            layer.prepend(q)
            stored = q.outputs[0]
        name, inputs = f"{base}_dequantized", [stored, *scheme]
        dq = editor.node("DequantizeLinear", inputs, name, stored, ir.DataType.FLOAT, axis)
        layer.prepend(dq)
        layer.replace_input_with(1, dq.outputs[0])
    for weight, _ in constants:
        if weight is not None and _is_left(weight):
            del editor.graph.initializers[str(weight.name)]


def _is_left(weight: ir.Value) -> bool:
    """Whether the weight is an initializer that nobody reads any more."""
    return weight.is_initializer() and not weight.uses() and not weight.is_graph_output()


def _scheme_constants(editor: Editor, name: str, scheme: Affine) -> tuple[ir.Value, ir.Value]:
    scale = editor.initializer(f"{name}_scale", np.array(scheme.scale, np.float32))
    point = np.array(scheme.zero_point, scheme.dtype)
    return scale, editor.initializer(f"{name}_zero_point", point)


def _quantize_activation(
    editor: Editor,
    value: ir.Value,
    scheme: tuple[ir.Value, ir.Value],
    stay_float: frozenset[ir.Node],
) -> None:
    """Puts Q -> DQ before all readers but graph outputs and `stay_float`."""
    uses = [use for use in value.uses() if use.node not in stay_float]
    kind = scheme[1].dtype or ir.DataType.INT8
    q = editor.node("QuantizeLinear", [value, *scheme], f"{value.name}_quantized", value, kind)
    dq = editor.node(
        "DequantizeLinear",
        [q.outputs[0], *scheme],
        f"{value.name}_dequantized",
        value,
        ir.DataType.FLOAT,
    )
    producer = value.producer()
    if producer is None:
        editor.graph.insert_before(editor.graph[0], [q, dq])
    else:
        producer.append([q, dq])
    for use in uses:
        use.node.replace_input_with(use.idx, dq.outputs[0])

"""Post-training quantization of an ONNX file: float model and sample data in, INT8 model out.

    x -> Conv(w) -> Relu -> y     =>     x -> Q -> DQ -> Conv(DQ(w8)) -> Relu -> Q -> DQ -> y

The result is explicit (QuantizeLinear and DequantizeLinear, opset 13 or later), which every tool
reads. Weights are symmetric int8 per output channel and stored as int8; zeros stay zeros, so a 2:4
weight stays 2:4. Activations have one scale a tensor. Graph inputs and outputs stay float. Where
quantization goes is decided in `placement.py`, by how much in `histogram.py`.

Source: Jacob et al. 2018, arXiv:1712.05877; Wu et al. 2020, arXiv:2004.09602.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core import numerics
from twofour.core.data import DataLike
from twofour.core.errors import InputError
from twofour.core.progress import Report
from twofour.onnx_tools.calibrate import calibrate
from twofour.onnx_tools.edit import Array, Editor, constant
from twofour.onnx_tools.histogram import Affine, Range, affine
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.placement import Placement, output_axis, place
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.promises import carry, require_kept

WEIGHT_MAX = 127
"""Weights use -127..127, so that a weight and its negative are both representable."""


def quantize(
    model: ir.Model,
    data: DataLike,
    options: QuantizeOptions | None = None,
    progress: Report | None = None,
) -> ir.Model:
    """Quantizes a model after training.

    Args:
        model: float32; stays as it is.
        data: samples like those the model will see, some hundred. See `twofour.core.data`.
        options: method, kind of activation, placement, exclusions.
        progress: called while calibrating.

    Returns:
        A new model with Q/DQ pairs and int8 weights.

    Raises:
        NothingToQuantizeError: the model is quantized already, or no layer can be.
        InputError: the data does not fit (see `calibrate`).
        UnsupportedError: the opset cannot be converted, or ONNX Runtime cannot run the model.
        GateError: a weight does not have the pattern that the model's metadata promises.
    """
    options = options or QuantizeOptions()
    require_kept(model)
    source, model = model, prepare(model)
    placement = place(model, options)
    names = [str(value.name) for value in placement.calibrated]
    ranges = calibrate(model, names, data, options, progress)
    insert(model, placement, ranges, options)
    carry(source, model)
    require_kept(model, "quantization")
    return model


def insert(
    model: ir.Model, placement: Placement, ranges: dict[str, Range], options: QuantizeOptions
) -> None:
    """Writes Q/DQ pairs and int8 weights into the model.

    Args:
        model: the one that `placement` was made from; changed.
        placement: what is quantized.
        ranges: by the names of `placement.calibrated`.
        options: `activation` counts here.
    """
    editor = Editor(model.graph)
    _quantize_weights(editor, placement.layers)
    schemes: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for source in placement.sources:
        span = placement.span(source, ranges)
        kind = "int8" if source in placement.symmetric else options.activation
        scheme = affine(span, kind)
        schemes[source] = _scheme_constants(editor, str(source.name), scheme)
    for value, source in placement.scale_of.items():
        _quantize_activation(editor, value, schemes[source], placement.stay_float)


def quantize_weight(w: Array, axis: int = 0) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """w8 = round_half_even(w / scale), scale = max(|w|) / 127 for each output channel.

    Args:
        w: float32, any shape; finite.
        axis: counts the output channels.

    Returns:
        int8 in -127..127 of the shape of `w`, zero wherever `w` is, and float32 [N] scales; a
        channel of zeros has scale 1.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    others = tuple(i for i in range(w.ndim) if i != axis)
    peak = np.abs(w).max(axis=others).astype(np.float64)
    if not np.isfinite(peak).all():
        raise ValueError("NaN or infinite")
    # No smaller scale, so that w / scale stays in range.
    scale = np.where(peak > 0, np.maximum(peak / WEIGHT_MAX, 2.0**-120), 1).astype(np.float32)
    shape = [1] * w.ndim
    shape[axis] = -1
    w8 = numerics.quantize(w, scale.reshape(shape), 0, np.int8)
    return np.maximum(w8, -WEIGHT_MAX).astype(np.int8), scale


def _weight_constants(editor: Editor, layer: ir.Node) -> list[ir.Value]:
    """Adds int8 weight, scale and zero point of a layer."""
    weight = layer.inputs[1]
    array = constant(weight)
    if weight is None or array is None:
        raise ValueError(f"{layer.name!r} has no constant weight")
    try:
        w8, scale = quantize_weight(array, output_axis(layer))
    except ValueError as error:
        raise InputError(
            f"weight {weight.name!r} of {layer.op_type} {layer.name!r} is not finite",
            [f"{np.count_nonzero(~np.isfinite(array))} of its values are NaN or infinite"],
            "load a checkpoint from before training diverged",
        ) from error
    return [
        editor.initializer(f"{weight.name}_quantized", w8),
        editor.initializer(f"{weight.name}_scale", scale),
        editor.initializer(f"{weight.name}_zero_point", np.zeros(len(scale), np.int8)),
    ]


def _quantize_weights(editor: Editor, layers: tuple[ir.Node, ...]) -> None:
    constants: dict[tuple[ir.Value | None, int], list[ir.Value]] = {}
    for layer in layers:
        weight, axis = layer.inputs[1], output_axis(layer)
        if (weight, axis) not in constants:
            constants[weight, axis] = _weight_constants(editor, layer)
        inputs = constants[weight, axis]
        name = str(inputs[0].name).replace("_quantized", "_dequantized")
        dq = editor.node("DequantizeLinear", inputs, name, inputs[0], ir.DataType.FLOAT, axis)
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

"""Post-training quantization of an ONNX file: float model and sample data in, INT8 model out.

    x -> Conv(w) -> Relu -> y     =>     x -> Q -> DQ -> Conv(DQ(w8)) -> Relu -> Q -> DQ -> y

The result is explicit (QuantizeLinear and DequantizeLinear, opset 13 or later), which every tool
reads. Weights are symmetric int8 per output channel and stored as int8; zeros stay zeros, so a 2:4
weight stays 2:4. Activations have one scale a tensor. Graph inputs and outputs stay float. The
stages, those in brackets where the recipe has them (`options.py`):

    prepare -> [equalize] -> [smooth] -> place -> calibrate -> [round] -> insert -> [bias]

Where quantization goes is decided in `placement.py`, by how much in `core/ranges.py`.

Source: Jacob et al. 2018, arXiv:1712.05877; Wu et al. 2020, arXiv:2004.09602.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from twofour.core.data import DataLike
from twofour.core.histogram import Histogram
from twofour.core.progress import Report, silent
from twofour.core.ranges import Affine, Range
from twofour.onnx_tools.calibrate import calibrate_with_report, decided
from twofour.onnx_tools.eligible import FloatLayer, float_layers
from twofour.onnx_tools.insert import insert
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.placement import place
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.promises import carry, require_kept
from twofour.onnx_tools.steps import StepReport, Steps


@dataclass(frozen=True)
class Quantized:
    """A quantized model, and what was decided on the way.

    Attributes:
        model: with Q/DQ pairs and int8 weights.
        floats: the float model that they were put into, after the steps on floats: its tensors have
            the names of those of `model`.
        options: it was made with; the type of activations is decided.
        ranges: of each tensor that was calibrated, by name.
        schemes: tensor that is quantized -> its scale and zero point.
        scale_of: tensor that is quantized -> tensor that its scale is named after: itself, or one
            that its data was moved from.
        histograms: what calibration saw of each tensor; not of those in a table of TensorRT.
        calibration: where the ranges come from if the model was not run for them; else "".
        left: nodes that the user left float -> why, by name.
        steps: what each step did, in the order in which they ran.
    """

    model: ir.Model
    floats: ir.Model
    options: QuantizeOptions
    ranges: Mapping[str, Range]
    schemes: Mapping[str, Affine]
    scale_of: Mapping[str, str]
    histograms: Mapping[str, Histogram]
    calibration: str = ""
    left: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[StepReport, ...] = ()

    @property
    def float_layers(self) -> tuple[FloatLayer, ...]:
        """The layers with weights that stayed float, and why."""
        return float_layers(self.model, self.left)


def quantize(
    model: ir.Model,
    data: DataLike | None,
    options: QuantizeOptions | None = None,
    progress: Report | None = None,
    calibration_cache: str | os.PathLike[str] | None = None,
) -> ir.Model:
    """Quantizes a model after training.

    Args:
        model: float32; stays as it is.
        data: samples like those the model will see, some hundred. See `twofour.core.data`. None
            where the cache has all that is needed.
        options: recipe, method, kind of activation, placement, exclusions.
        progress: called while calibrating.
        calibration_cache: a file that keeps what calibration saw, or a calibration table of
            TensorRT to take the scales from (see `calibrate`).

    Returns:
        A new model with Q/DQ pairs and int8 weights.

    Raises:
        NothingToQuantizeError: the model is quantized already, or no layer can be.
        InputError: the data does not fit (see `calibrate`).
        UnsupportedError: the opset cannot be converted, or ONNX Runtime cannot run the model.
        GateError: a weight does not have the pattern that the model's metadata promises.
    """
    return quantize_with_report(model, data, options, progress, calibration_cache).model


def quantize_with_report(
    model: ir.Model,
    data: DataLike | None,
    options: QuantizeOptions | None = None,
    progress: Report | None = None,
    calibration_cache: str | os.PathLike[str] | None = None,
) -> Quantized:
    """As `quantize`, with what was decided on the way."""
    options = decided(options or QuantizeOptions(), calibration_cache)
    require_kept(model)
    source, model = model, prepare(model)
    steps = Steps(data, options, progress or silent)
    steps.on_floats(model)
    placement = place(model, options)
    names = [str(value.name) for value in placement.calibrated]
    found = calibrate_with_report(model, names, data, options, progress, calibration_cache)
    floats = model.clone()
    schemes = placement.schemes(found.ranges, options.ranges.activation)
    scale_of = {str(v.name): str(source.name) for v, source in placement.scale_of.items()}
    rounded = steps.rounded(model, placement)
    insert(model, placement, schemes, rounded, options.weights)
    model = steps.on_integers(floats, model)
    carry(source, model)
    require_kept(model, "quantization")
    return Quantized(
        model,
        floats,
        options,
        found.ranges,
        {name: schemes[source] for name, source in scale_of.items()},
        scale_of,
        found.histograms,
        found.note,
        {str(node.name): why for node, why in placement.left.items()},
        tuple(steps.done),
    )

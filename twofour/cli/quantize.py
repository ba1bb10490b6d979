"""twofour quantize: a float ONNX file to INT8 with Q/DQ, calibrated on samples."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from twofour.cli.options import require_writable
from twofour.cli.output import Json, Output, Quiet, by_reason


class Method(StrEnum):
    """How the range of an activation is chosen, those of `onnx_tools.options.Method`."""

    mse = "mse"
    entropy = "entropy"
    percentile = "percentile"
    minmax = "minmax"


class Activation(StrEnum):
    """The type of quantized activations."""

    int8 = "int8"
    uint8 = "uint8"


class AddInputs(StrEnum):
    """Which inputs of a residual Add are quantized."""

    shortcut = "shortcut"
    both = "both"


def quantize(
    model: Annotated[Path, typer.Argument(help="A float ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    data: Annotated[
        str, typer.Option(help="Samples to calibrate with: .npz, folder of .npy, module:function.")
    ],
    method: Annotated[Method, typer.Option(help="How ranges are chosen.")] = Method.mse,
    activation: Annotated[
        Activation, typer.Option(help="int8: symmetric; uint8: with a zero point.")
    ] = Activation.int8,
    add_inputs: Annotated[
        AddInputs, typer.Option(help="both: as ONNX Runtime likes it; shortcut: one rounding less.")
    ] = AddInputs.shortcut,
    attention: Annotated[
        bool, typer.Option(help="Quantize the products within attention, too.")
    ] = True,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Shell pattern of node names that stay float.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize an ONNX file to INT8, calibrated on samples.

    Every runtime that reads Q/DQ can run the result.

    Example: twofour quantize resnet20.onnx -o resnet20_int8.onnx --data samples.npz
    """
    from twofour.compiler.importer import standardized
    from twofour.onnx_tools.eligible import count_integer, float_layers
    from twofour.onnx_tools.inspect import patterns_of, require_patterns
    from twofour.onnx_tools.load import load_model, save_model
    from twofour.onnx_tools.options import QuantizeOptions
    from twofour.onnx_tools.quantize import quantize as quantize_model

    out = Output(as_json, quiet)
    require_writable(output)
    options = QuantizeOptions(
        method.value, activation.value, add_inputs.value, attention, tuple(exclude or ())
    )
    source = standardized(load_model(model))
    with out.stage("calibrating") as report:
        quantized = quantize_model(source, data, options, report)
    patterns = patterns_of(source)
    require_patterns(quantized, patterns)
    save_model(quantized, output)
    left = float_layers(quantized, options.exclude)
    document = {
        "model": str(output),
        "size_bytes": output.stat().st_size,
        "patterns": patterns,
        "method": method.value,
        "activation": activation.value,
        "int8_layers": count_integer(quantized),
        "float_layers": [asdict(layer) for layer in left],
    }
    out.show(_summary(document, model.stat().st_size))
    out.show(*by_reason("float", ((each.reason, f"{each.node} ({each.op})") for each in left)))
    out.data("quantize/1", document)


def _summary(document: dict[str, Any], source_bytes: int) -> str:
    size_bytes, layers = document["size_bytes"], document["int8_layers"]
    patterns = len(document["patterns"])
    return (
        f"{document['model']}: {size_bytes / 1e3:.0f} kB instead of {source_bytes / 1e3:.0f}, "
        f"{layers} of {layers + len(document['float_layers'])} layers with weights in int8"
        + (f", the patterns of {patterns} kept" if patterns else "")
    )

"""twofour quantize: a float ONNX file to INT8 with Q/DQ, calibrated on samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.cli import quantize_options as given
from twofour.cli.calibration import CalibrationFile, Data, TableFile, require_data
from twofour.cli.output import Json, Output, Quiet, by_reason
from twofour.cli.quantize_budget import (
    CacheFile,
    EvalData,
    Jobs,
    MaxDrop,
    MaxEvaluations,
    MetricName,
    MetricOutput,
    Wanted,
    document_of,
    left_layers,
    parts,
    require_held,
)
from twofour.cli.quantize_check import Check, RequireCosine, require_samples
from twofour.cli.quantize_files import Files
from twofour.cli.quantize_quality import (
    ReportPage,
    measured,
    quality_document,
    quality_parts,
    write_page,
)
from twofour.cli.spread import OnRay, RayAddress

if TYPE_CHECKING:
    from twofour.compiler.prunable import Network
    from twofour.onnx_tools.eligible import FloatLayer
    from twofour.onnx_tools.options import QuantizeOptions
    from twofour.onnx_tools.quantize import Quantized


def quantize(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A float ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    data: Data = None,
    dynamic: given.DynamicOption = False,
    calibration_cache: CalibrationFile = None,
    tensorrt_table: TableFile = None,
    recipe: given.RecipeOption = given.Recipe.fast,
    step: given.StepOption = None,
    no_step: given.NoStepOption = None,
    method: given.MethodOption = given.Method.mse,
    activation: given.ActivationOption = None,
    weights: given.WeightsOption = given.Form.int8,
    add_inputs: given.AddInputsOption = given.AddInputs.shortcut,
    attention: given.AttentionOption = True,
    softmax: given.SoftmaxOption = True,
    first_last: given.FirstLastOption = given.Form.int8,
    include: given.IncludeOption = None,
    exclude: given.ExcludeOption = None,
    tensor: given.TensorOption = None,
    tensors: given.TensorsOption = None,
    max_drop: MaxDrop = None,
    eval_data: EvalData = None,
    metric: MetricName = None,
    metric_output: MetricOutput = None,
    max_evaluations: MaxEvaluations = None,
    jobs: Jobs = None,
    cache: CacheFile = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    require_cosine: RequireCosine = None,
    report: ReportPage = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize an ONNX file to INT8, calibrated on samples.

    Every runtime that reads Q/DQ can run the result.

    Example: twofour quantize resnet20.onnx -o resnet20_int8.onnx --data samples.npz
    Example: twofour quantize r20.onnx -o r20_int8.onnx --data samples.npz --max-drop 0.5
    Example: twofour quantize minilm.onnx -o minilm_int8.onnx --dynamic
    Example: twofour quantize r20.onnx -o r20_int8.onnx --data D --calibration-cache r20.calib
    """
    from twofour.onnx_tools.options import QuantizeOptions

    out = Output(as_json, quiet)
    given.require_sense(context)
    options = QuantizeOptions(
        method.value,
        given.activation_of(activation, tensorrt_table),
        add_inputs.value,
        attention,
        softmax,
        tuple(include or ()),
        tuple(exclude or ()),
        first_last.value,
        given.tensors_of(tensor, tensors),
        weights.value,
        recipe=recipe.value,
        steps=given.steps_of(recipe, step, no_step),
    )
    files = Files(model, output, calibration_cache, tensorrt_table, cache, report)
    files.require(options)
    if dynamic:
        given.require_dynamic(context)
        _dynamic(files, options, out)
        return
    require_data(data, calibration_cache, "give --data; transformers can do without: --dynamic")
    require_samples(require_cosine, data)
    judges = (jobs, cache, ray or None, ray_address)
    wanted = Wanted(max_drop, eval_data, metric, metric_output, max_evaluations, *judges)
    _calibrated(files, _Request(options, data, wanted, require_cosine), out)


@dataclass(frozen=True)
class _Request:
    """What is to be done with samples."""

    options: QuantizeOptions
    data: str | None
    wanted: Wanted
    require_cosine: float | None


def _calibrated(files: Files, request: _Request, out: Output) -> None:
    """With ranges from samples, from a cache or from a table."""
    from twofour.onnx_tools.quantize import quantize_with_report

    data = request.data
    with request.wanted.budget(files.model, data, out) as budget:
        source, source_bytes = _source(files.model)
        with out.stage("calibrating") as progress:
            result = quantize_with_report(
                source, data, request.options, progress, files.calibration_cache
            )
        mixed = None if budget is None else budget.choose(result, out.stage)
    options = result.options
    require_held(mixed)
    quantized = result.model if mixed is None else mixed.model
    patterns = _patterns(source, quantized)
    check = _checked(source, result, quantized, request, out)
    quality = measured(result, quantized, data, files.report, out)
    files.write(quantized, options, out)
    left = (*result.float_layers, *left_layers(mixed))
    document = _document(files.output, quantized, patterns, left) | {
        "method": options.method,
        "activation": options.ranges.activation,
        "calibration": result.calibration,
        "recipe": options.recipe,
        "steps": [asdict(each) for each in result.steps],
        "agreement": check.document,
        "mixed": document_of(mixed),
        "quality": quality_document(quality, files.report),
    }
    write_page(document, files.report)
    out.show(_summary(document, source_bytes))
    out.show(*filter(None, [result.calibration]))
    out.show(*(f"{each.name}: {each.changed} changed" for each in result.steps))
    out.show(*parts(mixed))
    out.show(*quality_parts(quality, files.report))
    out.show(*_left(left))
    out.data("quantize/1", document)


def _dynamic(files: Files, options: QuantizeOptions, out: Output) -> None:
    """With activations quantized at run time."""
    from twofour.onnx_tools.dynamic import quantize_dynamic_with_report

    source, source_bytes = _source(files.model)
    result = quantize_dynamic_with_report(source, options)
    patterns = _patterns(source, result.model)
    files.write(result.model, options, out)
    document = _document(files.output, result.model, patterns, result.float_layers)
    out.show(_summary(document, source_bytes))
    out.show(*_left(result.float_layers))
    out.data("quantize/1", document)


def _source(model: Path) -> tuple[Network, int]:
    """The float network, and the size of its file, which the output may replace."""
    from twofour.compiler.importer import standardized
    from twofour.onnx_tools.load import load_model

    return standardized(load_model(model)), model.stat().st_size


def _patterns(source: Network, quantized: Network) -> dict[str, str]:
    """The sparsity patterns of the source, which the quantized network has, too."""
    from twofour.onnx_tools.inspect import patterns_of, require_patterns

    patterns = patterns_of(source)
    require_patterns(quantized, patterns)
    return patterns


def _checked(
    source: Network, result: Quantized, quantized: Network, request: _Request, out: Output
) -> Check:
    """The outputs beside those of the float model, told."""
    from twofour.onnx_tools.agreement import agreement
    from twofour.onnx_tools.quality import tensor_quality

    with out.stage("checking outputs"):
        found = None if request.data is None else agreement(source, quantized, request.data)
    worst = partial(tensor_quality, quantized, result.floats, result.histograms)
    check = Check(found, result.options, request.require_cosine, worst)
    check.tell(out)
    return check


def _document(
    output: Path, model: Network, patterns: dict[str, str], left: Sequence[FloatLayer]
) -> dict[str, Any]:
    """Of a network whose activations are quantized at run time; others say more."""
    from twofour.onnx_tools.eligible import count_integer

    return {
        "model": str(output),
        "size_bytes": output.stat().st_size,
        "patterns": patterns,
        "method": "dynamic",
        "activation": "int8",
        "calibration": "",
        "recipe": "fast",
        "steps": [],
        "int8_layers": count_integer(model),
        "float_layers": [asdict(layer) for layer in left],
        "agreement": None,
        "mixed": None,
        "quality": None,
    }


def _left(layers: Sequence[FloatLayer]) -> list[str]:
    return by_reason("float", ((each.reason, f"{each.node} ({each.op})") for each in layers))


def _summary(document: dict[str, Any], source_bytes: int) -> str:
    size_bytes, layers = document["size_bytes"], document["int8_layers"]
    patterns = len(document["patterns"])
    return (
        f"{document['model']}: {size_bytes / 1e3:.0f} kB instead of {source_bytes / 1e3:.0f}, "
        f"{layers} of {layers + len(document['float_layers'])} layers with weights in int8"
        + (f", the patterns of {patterns} kept" if patterns else "")
    )

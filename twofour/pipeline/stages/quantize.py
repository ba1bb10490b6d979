"""quantize: an INT8 network of a float one, or a network of which each layer has a choice.

What calibration saw is kept in the run's cache, so that another method of choosing ranges needs no
pass over the data; the stage keeps a copy: it is what the network's ranges came from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from twofour.compiler.importer import standardized
from twofour.compiler.prunable import Network as Model
from twofour.core.errors import GateError
from twofour.core.machine import usable_cores
from twofour.core.records import to_plain
from twofour.core.scan import key_of
from twofour.evaluate.budget import Budget, BudgetOptions, Mixed
from twofour.evaluate.quality import Quality
from twofour.onnx_tools.agreement import agreement
from twofour.onnx_tools.eligible import count_integer
from twofour.onnx_tools.inspect import patterns_of, require_patterns
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.quality import tensor_quality
from twofour.onnx_tools.quantize import Quantized, quantize_with_report
from twofour.pipeline.networks import float_models, networks_of, quantize_of
from twofour.pipeline.recipe import Quantize
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import Input, Made, Output, Source, Stage, Task
from twofour.pipeline.stages.means import Means, parts_of
from twofour.pipeline.stages.metric import metric_inputs, metric_settings
from twofour.pipeline.stages.options import options_of

MODEL, CALIBRATION = "int8.onnx", "calibration.json"


def quantize_stages(file: RecipeFile, means: Means) -> list[Stage]:
    """One for each float network that is quantized after training."""
    settings, calibrate = quantize_of(file.recipe), file.recipe.data.calibrate
    if settings is None or calibrate is None:
        return []
    wanted = {cell.model.stage: cell for cell in networks_of(file.recipe) if cell.model}
    stages = []
    for weights, model in float_models(file.recipe).items():
        name = f"quantize {weights}"
        if name not in wanted:
            continue
        is_result = wanted[name].role == "candidate"
        how = settings if is_result else settings.model_copy(update={"max_drop": None})
        inputs: dict[str, Input] = {
            "model": model,
            "data": Source(file.place(calibrate), "data"),
        }
        plain = how.model_dump(mode="json", exclude={"jobs"})
        if how.max_drop is not None:
            inputs |= metric_inputs(file)
            plain |= metric_settings(file)
        work = partial(_quantize, file, how, means)
        stages.append(Stage(name, "quantize", plain, inputs, work))
    return stages


def _quantize(file: RecipeFile, settings: Quantize, means: Means, task: Task) -> Made:
    source = standardized(load_model(Path(task.inputs["model"])))
    data = task.inputs["data"]
    budget = _budget(file, settings, means, task)
    options = options_of(settings)
    cache = task.cache / f"calibration-{_seen(settings, task)[:16]}.json"
    result = quantize_with_report(source, data, options, task.report, cache)
    mixed = None if budget is None else budget.choose(result, parts_of(task.report))
    _require_held(mixed)
    model = result.model if mixed is None else mixed.model
    require_patterns(model, patterns_of(source))
    save_model(model, task.folder / MODEL)
    outputs = {"model": Output(MODEL, "onnx")}
    if cache.is_file():
        shutil.copyfile(cache, task.folder / CALIBRATION)
        outputs["calibration"] = Output(CALIBRATION, "calibration", ("model", "data"))
    document = _document(task, source, result, mixed)
    layers = document["int8_layers"]
    of = layers + len(document["float_layers"])
    text = f"{layers} of {of} layers int8, recipe {result.options.recipe}"
    return Made(outputs, text, {"document": document}, mixed.notes if mixed else ())


def _seen(settings: Quantize, task: Task) -> str:
    """The key of what calibration sees: another method of choosing ranges sees the same."""
    given = (task.hashes["model"], task.hashes["data"], settings.recipe, settings.samples)
    return key_of(*given, *settings.include, "but", *settings.exclude)


def _budget(file: RecipeFile, settings: Quantize, means: Means, task: Task) -> Budget | None:
    """What finds the layers that stay float; what does not fit it is found here at once."""
    if settings.max_drop is None:
        return None
    recipe = file.recipe
    options = BudgetOptions(
        settings.max_drop,
        recipe.metric,
        recipe.metric_output,
        settings.evaluations,
        recipe.evaluate.samples,
        min(settings.jobs, usable_cores()),
        task.cache / "budget.jsonl",
        **means.spreading,
    )
    return Budget(task.inputs["model"], task.inputs["evaluate"], options)


def _require_held(mixed: Mixed | None) -> None:
    """Refuses a network beyond the budget. Raises GateError."""
    if mixed is None or mixed.holds:
        return
    figures = mixed.figures
    raise GateError(
        f"no choice of float layers holds quantize.max_drop {mixed.max_drop:g}",
        [
            f"{figures.metric}: float {figures.dense:.4g}, all layers int8 {figures.int8:.4g}",
            f"all {mixed.switches} layers float: a drop of {figures.drop:.4g}",
        ],
        "allow a larger drop, or leave out steps that change float weights",
    )


def _document(task: Task, source: Model, result: Quantized, mixed: Mixed | None) -> dict[str, Any]:
    """As `twofour quantize --json --report` has it."""
    model = result.model if mixed is None else mixed.model
    quality = Quality(tensor_quality(model, result.floats, result.histograms))
    found = agreement(source, model, task.inputs["data"])
    left = {each.layer for each in mixed.left} if mixed else set()
    floats = [
        {"node": name, "op": op, "reason": "left float by the budget"}
        for name, op in ((e.layer, e.op) for e in (mixed.left if mixed else ()))
    ]
    return {
        "model": MODEL,
        "size_bytes": (task.folder / MODEL).stat().st_size,
        "patterns": patterns_of(source),
        "method": result.options.method,
        "activation": result.options.ranges.activation,
        "calibration": result.calibration,
        "recipe": result.options.recipe,
        "steps": [asdict(each) for each in result.steps],
        "int8_layers": count_integer(model),
        "float_layers": [
            *(asdict(each) for each in result.float_layers if each.node not in left),
            *floats,
        ],
        "agreement": to_plain(found),
        "mixed": _mixed(mixed),
        "quality": asdict(quality),
    }


def _mixed(found: Mixed | None) -> Mapping[str, Any] | None:
    if found is None:
        return None
    return {
        **asdict(found.figures),
        "max_drop": found.max_drop,
        "evaluations": found.evaluations,
        "switches": found.switches,
        "layers": [asdict(each) for each in found.layers],
        "notes": list(found.notes),
    }

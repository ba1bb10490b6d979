"""load: the ONNX file that the user gave, as one file of this run, and what is in it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from twofour.core.data import as_data
from twofour.core.feeds import runs
from twofour.core.records import to_plain
from twofour.evaluate.judging import Bench, Setup
from twofour.onnx_tools.inspect import inspect, patterns_of
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.reference import input_form
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import Input, Made, Output, Source, Stage, Task

MODEL = "model.onnx"


def load_stage(file: RecipeFile) -> Stage:
    """The stage of a recipe with an ONNX file."""
    place = file.place(str(file.recipe.model.onnx))
    inputs: dict[str, Input] = {"model": Source(place, "onnx")}
    beside = {f"weights {p.name}": Source(str(p), "onnx") for p in _weights_of(Path(place))}
    return Stage("load", "load", {}, inputs | beside, partial(_load, file))


def _weights_of(model: Path) -> list[Path]:
    """Files beside a model that hold its weights, by the names that exporters give them."""
    names = (f"{model.name}.data", f"{model.name}_data", f"{model.stem}.onnx_data")
    return [path for name in dict.fromkeys(names) if (path := model.parent / name).is_file()]


def _load(file: RecipeFile, task: Task) -> Made:
    given = Path(task.inputs["model"])
    task.report(0, 2, given.name)
    model = load_model(given)
    path = task.folder / MODEL
    if len(task.inputs) > 1:
        save_model(model, path)
    else:
        shutil.copyfile(given, path)
    task.report(1, 2, "the first sample")
    _try_data(file, path)
    found = inspect(model)
    facts = {
        "inputs": [to_plain(each) for each in found.inputs],
        "parameters": found.parameters,
        "parameter_bytes": found.parameter_bytes,
        "patterns": patterns_of(model),
        "quantized_layers": found.quantized_layers,
    }
    layers = f"{len(found.weights)} layers with weights"
    text = f"{given.name}: {found.parameters:,} parameters, {layers}"
    return Made({"model": Output(MODEL, "onnx")}, text, facts)


def _try_data(file: RecipeFile, model: Path) -> None:
    """Finds before the long stages that data, metric and model do not fit each other.

    Raises:
        InputError: they do not.
    """
    recipe, data = file.recipe, file.recipe.data
    if data.evaluate is not None:
        place, output = file.place(data.evaluate), recipe.metric_output
        Bench.of(Setup(model, place, recipe.metric, output, 1, recipe.threads)).try_first()
    if data.calibrate is not None:
        graph = load_model(model).graph
        forms = [input_form(v) for v in graph.inputs if v.name not in graph.initializers]
        source = as_data(file.place(data.calibrate), [form.name for form in forms])
        next(runs(source, forms, 1, 1))

"""quantize mixed: a network of which each layer is pruned and computes as the recipe chose.

`twofour search` writes such recipes.
"""

from __future__ import annotations

from functools import partial

from twofour.compiler.prunable import read_network
from twofour.onnx_tools.eligible import count_integer
from twofour.onnx_tools.inspect import patterns_of
from twofour.onnx_tools.load import save_model
from twofour.pipeline.networks import DENSE, MIXED, float_models, quantize_of
from twofour.pipeline.quantities import bytes_of
from twofour.pipeline.recipe import Quantize, Sparsify
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import Input, Made, Output, Source, Stage, Task
from twofour.pipeline.stages.options import options_of
from twofour.search.apply import ApplyOptions, apply

MODEL = "mixed.onnx"


def choose_stage(file: RecipeFile) -> Stage:
    """The stage of a recipe with choices for layers."""
    recipe = file.recipe
    inputs: dict[str, Input] = {"model": float_models(recipe)[DENSE]}
    if recipe.data.calibrate is not None:
        inputs["data"] = Source(file.place(recipe.data.calibrate), "data")
    by_data = Sparsify(method="sparsegpt") if recipe.data.calibrate else Sparsify()
    pruning = recipe.sparsify or by_data
    quantizing = quantize_of(recipe) or Quantize()
    settings = {
        "layers": dict(recipe.layers),
        "sparsify": pruning.model_dump(mode="json", include={"method", "samples", "memory"}),
        "quantize": quantizing.model_dump(mode="json", exclude={"jobs", "max_drop", "evaluations"}),
    }
    options = ApplyOptions(
        pruning.method,
        pruning.samples,
        bytes_of(pruning.memory) or 0,
        quantize=options_of(quantizing),
    )
    work = partial(_choose, dict(recipe.layers), options)
    return Stage(f"quantize {MIXED}", "quantize", settings, inputs, work)


def _choose(choices: dict[str, str], options: ApplyOptions, task: Task) -> Made:
    source = read_network(task.inputs["model"])
    model = apply(source, choices, task.inputs.get("data", ""), options, task.report)
    save_model(model, task.folder / MODEL)
    pruned = len(patterns_of(model))
    text = f"{len(choices)} layers chosen: {pruned} sparse, {count_integer(model)} int8"
    return Made({"model": Output(MODEL, "onnx")}, text)

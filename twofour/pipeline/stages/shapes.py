"""shapes: what engines are built for, where the model leaves sizes open.

Those of the recipe; else those of a sample, with the batch that the recipe asks for. They are a
file of their own, so that other samples of the same shapes build no engine anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from twofour.compiler.requests import Requested, shapes_of_data
from twofour.core.writing import write_whole
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.reference import input_form
from twofour.pipeline.networks import BASELINE, networks_of
from twofour.pipeline.recipe import Recipe
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import Input, Made, Output, Source, Stage, Task

SHAPES = "shapes"
_FILE = "shapes.json"


def shapes_stage(file: RecipeFile) -> Stage:
    """The stage, which follows the one that makes the first ONNX file."""
    recipe = file.recipe
    first = next(cell.model for cell in networks_of(recipe) if cell.role == BASELINE)
    assert first is not None
    inputs: dict[str, Input] = {"model": first}
    data = recipe.data.calibrate or recipe.data.evaluate
    if data is not None and not recipe.shapes:
        inputs["data"] = Source(file.place(data), "data")
    plain = recipe.model_dump(mode="json")
    settings = {"shapes": plain["shapes"], "batch": recipe.build.batch}
    kind = "load" if recipe.model.onnx else "export"
    return Stage(SHAPES, kind, settings, inputs, partial(_shapes, recipe))


def read_shapes(path: Path) -> Requested | None:
    """What the stage left, as a build takes it."""
    plain = json.loads(path.read_bytes())
    return {name: _tuples(shape) for name, shape in plain.items()} or None


def _tuples(shape: Any) -> Any:
    return tuple(_tuples(each) if isinstance(each, list) else each for each in shape)


def _shapes(recipe: Recipe, task: Task) -> Made:
    found: Mapping[str, Any] = recipe.shapes
    if not found:
        found = _of_sample(recipe.build.batch, Path(task.inputs["model"]), task.inputs.get("data"))
    write_whole(task.folder / _FILE, json.dumps(found, sort_keys=True).encode())
    words = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found.items())
    return Made({"shapes": Output(_FILE, "shapes")}, words or "as the model has them")


def _of_sample(batch: int | None, model: Path, data: str | None) -> dict[str, Any]:
    """Of the inputs with open sizes."""
    graph = load_model(model).graph
    found: dict[str, Any] = dict(shapes_of_data(graph, data)) if data is not None else {}
    if batch is None:
        return found
    for value in graph.inputs:
        form = input_form(value)
        if value.name not in graph.initializers and form.dims and isinstance(form.dims[0], str):
            sizes = tuple(size if isinstance(size, int) else 1 for size in form.dims)
            found[form.name] = (batch, *found.get(form.name, sizes)[1:])
    return found

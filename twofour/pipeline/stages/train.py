"""The stages of a torch model, each a process of its own: see `jobs.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from twofour.pipeline.jobs import ON_CPU, Job
from twofour.pipeline.networks import is_trained
from twofour.pipeline.recipe import Recipe, Training
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import From, Input, Made, Output, Source, Stage, Task
from twofour.pipeline.torchrun import run_job

_JOB_INPUTS = ("start", "teacher", "masks", "dense", "sparse", "qat", "dense_qat")
_SPARSE = ("sparse", "qat")


def train_stages(file: RecipeFile) -> list[Stage]:
    """All up to the ONNX files; none for a recipe with an ONNX file."""
    recipe = file.recipe
    if recipe.model.torch is None:
        return []
    stages = [_load(file)]
    last = From("load")
    if recipe.sparsify is not None and not recipe.layers:
        stages.append(_sparsify(file))
        last = From("sparsify")
    if recipe.finetune is not None:
        stages.append(_trained(file, "finetune", "finetune", last))
        last = From("finetune")
    exported: dict[str, From] = {"dense": From("load")}
    if is_trained(recipe):
        exported["sparse"] = last
    if recipe.qat is not None:
        stages.append(_trained(file, "qat", "qat", last))
        exported["qat"] = From("qat")
        if recipe.qat.dense:
            stages.append(_trained(file, "qat dense", "qat", From("load")))
            exported["dense_qat"] = From("qat dense")
    return [*stages, _export(file, exported)]


def _load(file: RecipeFile) -> Stage:
    inputs = _code(file)
    if file.recipe.model.checkpoint is not None:
        inputs["checkpoint"] = Source(file.place(file.recipe.model.checkpoint), "checkpoint")
    return _stage(file, "load", "load", inputs, {})


def _sparsify(file: RecipeFile) -> Stage:
    recipe = file.recipe
    assert recipe.sparsify is not None
    inputs = {"start": From("load"), **_code(file)}
    if recipe.sparsify.method != "magnitude" and recipe.data.calibrate is not None:
        inputs["calibrate"] = Source(file.place(recipe.data.calibrate), "data")
    return _stage(file, "sparsify", "sparsify", inputs, recipe.sparsify.model_dump(mode="json"))


def _trained(file: RecipeFile, name: str, kind: str, start: From) -> Stage:
    recipe = file.recipe
    section: Training | None = recipe.finetune if kind == "finetune" else recipe.qat
    assert section is not None
    inputs: dict[str, Input] = {"start": start, **_code(file)}
    if start.stage != "load":
        inputs |= _masks(recipe)
    if section.distil:
        inputs["teacher"] = From("load")
    if recipe.data.train is not None:
        inputs["train"] = Source(recipe.data.train, "code")
    if section.loss is not None:
        inputs["loss"] = Source(section.loss, "code")
    if kind == "qat" and recipe.data.calibrate is not None:
        inputs["calibrate"] = Source(file.place(recipe.data.calibrate), "data")
    return _stage(file, name, kind, inputs, section.model_dump(mode="json"))


def _export(file: RecipeFile, exported: Mapping[str, From]) -> Stage:
    inputs = {**exported, **_code(file)}
    if set(_SPARSE) & set(exported):
        inputs |= _masks(file.recipe)
    if file.recipe.data.calibrate is not None:  # files are run on some of it, beside their models
        inputs["calibrate"] = Source(file.place(file.recipe.data.calibrate), "data")
    return _stage(file, "export", "export", inputs, {})


def _masks(recipe: Recipe) -> dict[str, Input]:
    """What the weights of a pruned network have to keep to; nothing where none is pruned."""
    pruned = recipe.sparsify is not None and not recipe.layers
    return {"masks": From("sparsify", "masks")} if pruned else {}


def _code(file: RecipeFile) -> dict[str, Input]:
    """The functions that every stage needs to make the model again."""
    model = file.recipe.model
    named = {"model": model.torch, "example": model.example}
    return {name: Source(place, "code") for name, place in named.items() if place is not None}


def _stage(
    file: RecipeFile, name: str, kind: str, inputs: dict[str, Input], settings: dict[str, Any]
) -> Stage:
    recipe = file.recipe
    names = recipe.model.model_dump(mode="json", include={"inputs", "outputs", "dynamic"})
    every: dict[str, Any] = {"settings": settings, "seed": recipe.seed, "names": names}
    if kind not in ON_CPU:
        every["device"] = recipe.device
    return Stage(name, kind, every, inputs, partial(_run, file, kind, settings))


def _run(file: RecipeFile, kind: str, settings: dict[str, Any], task: Task) -> Made:
    job = job_of(file.recipe, kind, settings, task)
    found = run_job(job, file.home, task.report)
    outputs = {
        name: Output(each.file, each.kind, _made_from(kind, name, task.inputs))
        for name, each in found.outputs.items()
    }
    return Made(outputs, found.text, {"documents": found.documents}, found.notes)


def _made_from(kind: str, name: str, inputs: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Each ONNX file has a model of its own; other files are made from all that a stage reads."""
    if kind != "export":
        return None
    own = {name, "model", "example", *(("masks",) if name in _SPARSE else ())}
    return tuple(each for each in inputs if each in own)


def job_of(recipe: Recipe, kind: str, settings: dict[str, Any], task: Task) -> Job:
    """What the process is told."""
    names = recipe.model.model_dump(mode="json", include={"inputs", "outputs", "dynamic"})
    return Job(
        kind,
        recipe.seed,
        recipe.threads,
        recipe.device,
        {
            "torch": recipe.model.torch,
            "example": recipe.model.example,
            "checkpoint": task.inputs.get("checkpoint"),
            **names,
        },
        {name: task.inputs.get(name) for name in ("train", "calibrate", "evaluate")},
        settings,
        {name: task.inputs[name] for name in _JOB_INPUTS if name in task.inputs},
        str(task.folder),
        str(task.scratch),
    )

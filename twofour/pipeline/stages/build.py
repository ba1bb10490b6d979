"""build: an engine of each network for each target, all with one file of measured times."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from twofour.compiler.build import BuildOptions, compile_model
from twofour.core.progress import Report
from twofour.core.scan import Item, arrivals
from twofour.core.target import Target, detect_host, host_target, parse_target
from twofour.core.tensorrt import installed, is_tensorrt
from twofour.core.writing import write_whole
from twofour.engine import Engine
from twofour.pipeline.networks import BASELINE, CANDIDATE, Network, networks_of
from twofour.pipeline.quantities import bytes_of, size_text
from twofour.pipeline.recipe import Recipe
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import From, Input, Made, Output, Stage, Task
from twofour.pipeline.stages.means import Means
from twofour.pipeline.stages.shapes import SHAPES, read_shapes
from twofour.search.apply import with_choices

TIMES = "times.json"


@dataclass(frozen=True)
class BuildItem:
    """One engine.

    Attributes:
        network: that it is of.
        target: of the recipe: "cpu", "cpu:avx2", ...
    """

    network: Network
    target: str

    @property
    def stage(self) -> str:
        """The name of the stage that builds it."""
        return f"build {self.name}"

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.network.name} {self.target}"

    @property
    def file(self) -> str:
        """Its file in the stage's folder: ISA.engine, "cpu.engine" for this machine's own."""
        return f"{self.target.partition(':')[2] or self.target}.engine"


def build_items(recipe: Recipe) -> list[BuildItem]:
    """All engines: of the candidate for each target, of the others for the first."""
    first, *others = recipe.build.targets
    found = [BuildItem(cell, first) for cell in networks_of(recipe) if cell.model is not None]
    candidate = found[-1].network
    return [*found, *(BuildItem(candidate, target) for target in others)]


def build_stages(file: RecipeFile, means: Means) -> list[Stage]:
    """One for each engine."""
    return [_stage(file, item, means) for item in build_items(file.recipe)]


def _stage(file: RecipeFile, item: BuildItem, means: Means) -> Stage:
    assert item.network.model is not None
    inputs: dict[str, Input] = {"model": item.network.model, "shapes": From(SHAPES, "shapes")}
    settings = _settings(file, item)
    work = partial(_build, file, item, settings, means)
    return Stage(item.stage, "build", settings, inputs, work)


def _settings(file: RecipeFile, item: BuildItem) -> dict[str, Any]:
    """All that an engine depends on beside its model and shapes."""
    recipe, network = file.recipe, item.network
    section = recipe.build.model_dump(mode="json", exclude={"targets", "cells", "batch"})
    is_dense = network.role == BASELINE
    return section | {
        "target": item.target,
        "cpu": detect_host().model,
        **({"tensorrt": [str(each) for each in installed()]} if is_tensorrt(item.target) else {}),
        "threads": recipe.threads,
        "sparsity": "disable" if is_dense else section["sparsity"],
        "bf16": section["bf16"] and not is_dense,
        "layers": dict(recipe.layers) if network.role == CANDIDATE else {},
    }


def target_of(text: str) -> Target:
    """The target that the recipe names.

    Raises:
        UnsupportedError: this machine cannot run it.
    """
    return parse_target(text)


def _build(
    file: RecipeFile, item: BuildItem, settings: Mapping[str, Any], means: Means, task: Task
) -> Made:
    options = _options(file, item, settings, Path(task.inputs["shapes"]))
    if item.stage not in means.built:
        options = replace(options, timing_cache=task.cache / TIMES, target=target_of(item.target))
    engine = _compiled(Path(task.inputs["model"]), options, item, means, task)
    engine.save(task.folder / item.file)
    return made_of(engine, item)


def _options(
    file: RecipeFile, item: BuildItem, settings: Mapping[str, Any], shapes: Path
) -> BuildOptions:
    """How to build; for a target that this machine may not be able to run."""
    options = BuildOptions(
        sparsity=settings["sparsity"],
        bf16=settings["bf16"],
        shapes=read_shapes(shapes),
        threads=file.recipe.threads,
        tuning_effort=settings["tuning_effort"],
        workspace_bytes=bytes_of(settings["workspace"]),
        target=_planned(item.target),
        race=settings["race"],
    )
    return with_choices(settings["layers"], options) if settings["layers"] else options


def _planned(text: str) -> Target:
    """The target that the recipe names, whether or not this machine can run it."""
    isa, host = text.partition(":")[2], detect_host()
    if is_tensorrt(text):
        return parse_target(text)
    return Target(isa, host.arch, host.model) if isa else host_target()


def _compiled(
    model: Path, options: BuildOptions, item: BuildItem, means: Means, task: Task
) -> Engine:
    """Here, or what a machine of the cluster has built."""
    content = means.built.pop(item.stage, None)
    if content is None:
        return compile_model(model, options, task.report)
    write_whole(task.scratch / item.file, content)
    return Engine.load(task.scratch / item.file)


def build_away(
    file: RecipeFile, means: Means, places: Mapping[str, Mapping[str, str]], report: Report
) -> None:
    """Builds engines at once, each on a machine of the cluster that can run its target.

    Args:
        file: the recipe.
        means: with the cluster; gets the engines.
        places: of the inputs, by the name of each stage that is to run.
        report: told the engines done.
    """
    items = {item.stage: item for item in build_items(file.recipe)}
    work = []
    for name, inputs in places.items():
        item, settings = items[name], _settings(file, items[name])
        options = _options(file, item, settings, Path(inputs["shapes"]))
        if is_tensorrt(item.target):
            continue  # nobody knows which machine has it: it is built here
        work.append(Item(name, name, (options, Path(inputs["model"])), options.target))
    for done, content in arrivals(work, _start, means.spread, report):
        means.built[done.name] = content


def _start() -> Callable[[tuple[BuildOptions, Path]], bytes]:
    return _bytes


def _bytes(argument: tuple[BuildOptions, Path]) -> bytes:
    """The file of an engine."""
    options, model = argument
    with tempfile.TemporaryDirectory() as folder:
        return compile_model(model, options).save(Path(folder) / "engine").read_bytes()


def made_of(engine: Engine, item: BuildItem) -> Made:
    """What the stage left, once the engine is written."""
    plan = engine.plan
    packed = sum(layer.weight_bytes for layer in plan.layers)
    facts = {
        "target": str(plan.target),
        "engine_bytes": engine.size_bytes,
        "weight_bytes": packed,
        "layers": len(plan.layers),
    }
    size = f"{size_text(engine.size_bytes)}, weights {size_text(packed)}"
    text = f"{len(plan.layers)} layers for {plan.target}, {size}"
    return Made({"engine": Output(item.file, "engine", ("model",))}, text, facts, plan.notes)

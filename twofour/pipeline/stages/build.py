"""build: an engine of each network for each target, all with one file of measured times."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from twofour.compiler.build import BuildOptions, compile_model
from twofour.core.scan import Item, arrivals
from twofour.core.target import Target, detect_host, host_target
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
    recipe, network = file.recipe, item.network
    assert network.model is not None
    inputs: dict[str, Input] = {"model": network.model, "shapes": From(SHAPES, "shapes")}
    section = recipe.build.model_dump(mode="json", exclude={"targets", "cells", "batch"})
    is_dense = network.role == BASELINE
    host = detect_host()
    settings = section | {
        "target": item.target,
        "cpu": host.model,
        "threads": recipe.threads,
        "sparsity": "disable" if is_dense else section["sparsity"],
        "bf16": section["bf16"] and not is_dense,
        "layers": dict(recipe.layers) if network.role == CANDIDATE else {},
    }
    work = partial(_build, file, item, settings, means)
    return Stage(item.stage, "build", settings, inputs, work)


def target_of(text: str) -> Target:
    """The target that the recipe names.

    Raises:
        UnsupportedError: this machine cannot run it.
    """
    return host_target(text.partition(":")[2] or None)


def _build(
    file: RecipeFile, item: BuildItem, settings: Mapping[str, Any], means: Means, task: Task
) -> Made:
    model = Path(task.inputs["model"])
    options = BuildOptions(
        sparsity=settings["sparsity"],
        bf16=settings["bf16"],
        shapes=read_shapes(Path(task.inputs["shapes"])),
        threads=file.recipe.threads,
        timing_cache=task.cache / TIMES,
        tuning_effort=settings["tuning_effort"],
        workspace_bytes=bytes_of(settings["workspace"]),
        target=target_of(item.target),
        race=settings["race"],
    )
    if settings["layers"]:
        options = with_choices(settings["layers"], options)
    engine = _compiled(model, options, item, means, task)
    engine.save(task.folder / item.file)
    return made_of(engine, item)


def _compiled(
    model: Path, options: BuildOptions, item: BuildItem, means: Means, task: Task
) -> Engine:
    """Here, or on a machine of the cluster that can run the target."""
    if means.spread is None:
        return compile_model(model, options, task.report)
    away = replace(options, timing_cache=None)
    work = Item(item.name, item.name, model, options.target)
    for _, content in arrivals([work], partial(_start, away), means.spread, task.report):
        path = task.scratch / item.file
        write_whole(path, content)
        return Engine.load(path)
    raise AssertionError("a scan of one item has one result")


def _start(options: BuildOptions) -> Callable[[Path], bytes]:
    """The function of a scan: the bytes of an engine."""
    return partial(_bytes, options)


def _bytes(options: BuildOptions, model: Path) -> bytes:
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

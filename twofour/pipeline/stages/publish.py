"""publish: the result's engines as a version of a repository, once the gate has let it go on.

Files that were published before are not published again: that version is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from twofour.core.writing import write_whole
from twofour.pipeline.networks import CANDIDATE, networks_of
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import From, Input, Made, Output, Stage, Task
from twofour.pipeline.stages import benchmark, decide
from twofour.pipeline.stages.build import BuildItem, build_items
from twofour.pipeline.stages.means import Means
from twofour.registry.lineage import metrics_of_run, of_run
from twofour.registry.promote import PromoteOptions, promote
from twofour.registry.publish import PublishOptions, publish

NAME = "publish"
_FILE, _MODEL = "published.json", "model.onnx"


def publish_stage(file: RecipeFile, means: Means) -> list[Stage]:
    """The stage; none for a recipe that publishes nothing."""
    section, recipe = file.recipe.publish, file.recipe
    if section is None:
        return []
    model = networks_of(recipe)[-1].model
    assert model is not None
    inputs: dict[str, Input] = {
        "model": model,
        "checks": From(decide.NAME, "checks"),
        "times": From(benchmark.NAME, "rounds"),
    }
    inputs |= {item.name: From(item.stage, "engine") for item in _items(file)}
    settings = section.model_dump(mode="json") | {"name": section.name or recipe.name}
    work = partial(_publish, file, means)
    return [Stage(NAME, "publish", settings, inputs, work, _is_there)]


def _items(file: RecipeFile) -> list[BuildItem]:
    return [item for item in build_items(file.recipe) if item.network.role == CANDIDATE]


def _is_there(facts: Mapping[str, Any]) -> bool:
    """Whether the version still is; what is behind a URL is believed."""
    place = str(facts.get("place", ""))
    return "://" in place or Path(place).is_dir()


def _publish(file: RecipeFile, means: Means, task: Task) -> Made:
    section = file.recipe.publish
    assert section is not None
    repository, name = file.place(section.repository), section.name or file.recipe.name
    document = means.document()
    engines = _engines(file, task)
    contestants = task.facts["times"]["contestants"]
    options = PublishOptions(
        key=None if section.key is None else Path(file.place(section.key)),
        metrics=metrics_of_run(document),
        engine_metrics={
            engine: {"latency_us": contestants[item.name]["latency_us"]}
            for engine, item in engines.items()
            if item.name in contestants
        },
        lineage=of_run(document),
        message=f"pipeline {file.recipe.name}",
        report=task.report,
    )
    files = {engine: Path(task.inputs[item.name]) for engine, item in engines.items()}
    found = publish(repository, name, {**files, _MODEL: Path(task.inputs["model"])}, options)
    if section.promote:
        promote(repository, name, found.version, PromoteOptions(message=options.message))
    facts = {"version": found.version, "place": found.place, "signed_by": found.signed_by}
    write_whole(task.folder / _FILE, json.dumps(facts).encode())
    words = ["found" if found.existed else "published"]
    words += [f"signed by {found.signed_by}"] if found.signed_by else []
    words += ["served from now on"] if section.promote else []
    text = f"version {found.version} of {name}, {', '.join(words)}"
    return Made({"published": Output(_FILE, "published")}, text, facts)


def _engines(file: RecipeFile, task: Task) -> dict[str, BuildItem]:
    """Name in the repository -> engine; of two for one instruction set the first."""
    found: dict[str, BuildItem] = {}
    for item in _items(file):
        target = str(task.facts[item.name]["target"])
        found.setdefault(f"{target.partition(':')[2].replace('+', '-')}.engine", item)
    return found

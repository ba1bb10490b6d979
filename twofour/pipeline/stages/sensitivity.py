"""sensitivity: each layer of the dense network pruned alone, judged: the heat map of the report."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from twofour.core.machine import usable_cores
from twofour.core.sensitivity import Sensitivity, document
from twofour.evaluate.sensitivity import Scanner, SensitivityOptions
from twofour.pipeline.networks import DENSE, float_models
from twofour.pipeline.recipe import Scan
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import Input, Made, Stage, Task
from twofour.pipeline.stages.means import Means, parts_of
from twofour.pipeline.stages.metric import metric_inputs, metric_settings

NAME = "sensitivity"
_CACHE = "sensitivity.jsonl"


def sensitivity_stage(file: RecipeFile, means: Means) -> list[Stage]:
    """The stage; none where the recipe does not ask for it."""
    scan = file.recipe.sensitivity
    if scan is None:
        return []
    inputs: dict[str, Input] = {
        "model": float_models(file.recipe)[DENSE],
        **metric_inputs(file),
    }
    settings = metric_settings(file) | {
        "patterns": _patterns(file, scan),
        "evaluate.samples": _samples(file, scan),
    }
    return [Stage(NAME, NAME, settings, inputs, partial(_scan, file, scan, means))]


def _patterns(file: RecipeFile, scan: Scan) -> tuple[str, ...]:
    """Those asked for; else that of the result."""
    sparsify = file.recipe.sparsify
    return scan.patterns or ("2:4" if sparsify is None else sparsify.pattern,)


def _samples(file: RecipeFile, scan: Scan) -> int | None:
    """The fewer of what the scan may use and what engines are judged on."""
    counts = [each for each in (scan.samples, file.recipe.evaluate.samples) if each is not None]
    return min(counts, default=None)


def _scan(file: RecipeFile, scan: Scan, means: Means, task: Task) -> Made:
    recipe = file.recipe
    options = SensitivityOptions(
        recipe.metric,
        recipe.metric_output,
        _patterns(file, scan),
        samples=_samples(file, scan),
        jobs=min(scan.jobs, usable_cores()),
        cache=task.cache / _CACHE,
        **means.spreading,
    )
    scanner = Scanner(task.inputs["model"], task.inputs["evaluate"], options)
    found = replace(scanner.alone(parts_of(task.report)), model=DENSE)
    return Made({}, _text(found), {"document": document(found, (), None)}, found.notes)


def _text(found: Sensitivity) -> str:
    """How many were tried, and the worst."""
    tried = f"{len(found.cases)} layers pruned alone"
    worst = found.worst
    if worst is None:
        return tried
    return f"{tried}; {worst.layer} to {worst.pattern} costs most, {worst.drop:.3g} {found.unit}"

"""layers: the layers of the result's engine, each beside what others would take, and the roofline.

Times are those that the build measured; the rates of this machine are measured here, in a second.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from twofour.compiler.outline import outline
from twofour.compiler.rates import measure_rates
from twofour.core.errors import Error
from twofour.core.records import to_plain
from twofour.core.target import detect_host
from twofour.core.writing import write_whole
from twofour.engine import read_plan
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import From, Made, Output, Stage, Task
from twofour.pipeline.stages.decide import judged

NAME = "layers"
_FILE = "layers.json"


def layers_stage(file: RecipeFile) -> Stage:
    """The stage."""
    before, after = judged(file)
    inputs = {"engine": From(after.stage, "engine"), "floats": From(before.stage, "engine")}
    settings = {"cpu": detect_host().model}
    return Stage(NAME, "benchmark", settings, inputs, partial(_layers))


def _layers(task: Task) -> Made:
    plan = read_plan(Path(task.inputs["engine"]))
    floats = read_plan(Path(task.inputs["floats"]))
    notes: tuple[str, ...] = ()
    try:
        rates = measure_rates(plan, task.report)
    except Error as e:
        rates, notes = None, (f"no share of the roofline: {e.what}",)
    found = outline(plan, rates=rates, floats=floats)
    facts: dict[str, Any] = {
        "layers": [to_plain(row) for row in found.layers],
        "edges": [to_plain(edge) for edge in found.edges],
    }
    write_whole(task.folder / _FILE, json.dumps(facts).encode())
    timed = [row for row in found.layers if row.time_us is not None]
    most = max(timed, key=lambda row: row.time_us or 0.0, default=None)
    text = f"{len(found.layers)} layers"
    if most is not None:
        text += f"; {most.name} takes most, {most.time_us:.4g} us"
    return Made({"layers": Output(_FILE, "layers")}, text, facts, notes)

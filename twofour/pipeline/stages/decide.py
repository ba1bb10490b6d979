"""gate: whether the result may go on, with more races where the first ones cannot tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from twofour.bench.regression import Duel
from twofour.core.outcome import Figure
from twofour.core.outcome import Task as Judged
from twofour.core.records import to_plain
from twofour.core.target import detect_host
from twofour.core.version import __version__
from twofour.core.writing import write_whole
from twofour.evaluate.metrics import find_metric
from twofour.pipeline.gate import (
    SPEED,
    Limits,
    Looks,
    Measured,
    Paired,
    decide,
    is_open,
    judge_gate,
    verdict_of,
)
from twofour.pipeline.gate_files import MARKDOWN, XML, Heading, write_gate
from twofour.pipeline.gate_recorded import Now, against, read_recorded
from twofour.pipeline.networks import BASELINE, CANDIDATE
from twofour.pipeline.quantities import bytes_of
from twofour.pipeline.recipe_file import DENSE_BASELINE, RecipeFile
from twofour.pipeline.stage import From, Input, Made, Output, Source, Stage, Task
from twofour.pipeline.stages import benchmark
from twofour.pipeline.stages.benchmark import Entrants, Rounds, read_rounds
from twofour.pipeline.stages.build import BuildItem, build_items
from twofour.pipeline.stages.evaluate import load_kept, stage_of
from twofour.pipeline.surroundings import surroundings_of

NAME = "gate"
_CHECKS = "checks.json"
_LOOKS = 3


def judged(file: RecipeFile) -> tuple[BuildItem, BuildItem]:
    """The baseline and the candidate, both for the first target."""
    items = build_items(file.recipe)
    first = file.recipe.build.targets[0]
    by_role = {item.network.role: item for item in items if item.target == first}
    return by_role[BASELINE], by_role[CANDIDATE]


def gate_stage(file: RecipeFile) -> list[Stage]:
    """The stage; none without a gate."""
    gate, recipe = file.recipe.gate, file.recipe
    if gate is None:
        return []
    before, after = judged(file)
    inputs: dict[str, Input] = {
        "times": From(benchmark.NAME, "rounds"),
        before.name: From(before.stage, "engine"),
        after.name: From(after.stage, "engine"),
    }
    if gate.baseline != DENSE_BASELINE:
        inputs["baseline"] = Source(file.place(gate.baseline), "baseline")
    if recipe.data.evaluate is not None:
        inputs["after"] = From(stage_of(after), "rows")
        if gate.baseline == DENSE_BASELINE:
            inputs["before"] = From(stage_of(before), "rows")
    data = recipe.data.evaluate or recipe.data.calibrate
    if data is not None:
        inputs["data"] = Source(file.place(data), "data")
    settings = gate.model_dump(mode="json") | {
        "max_drop": file.max_drop,
        "metric": recipe.metric,
        "duration": recipe.benchmark.duration,
    }
    return [Stage(NAME, "gate", settings, inputs, partial(_decide, file))]


def limits_of(file: RecipeFile) -> Limits:
    """What the recipe asks for."""
    gate = file.recipe.gate
    assert gate is not None
    return Limits(
        file.max_drop,
        gate.min_speedup,
        bytes_of(gate.max_memory),
        gate.max_memory_share,
        gate.confidence,
    )


def _decide(file: RecipeFile, task: Task) -> Made:
    began = datetime.now(UTC)
    gate = file.recipe.gate
    assert gate is not None
    limits = limits_of(file)
    if "baseline" in task.inputs:
        recorded = read_recorded(Path(task.inputs["baseline"]))
        checks = judge_gate(against(recorded, _now(file, task), limits), limits)
    else:
        checks = decide(_Evidence(file, task).measure, limits, Looks(speed=_LOOKS))
    seconds = (datetime.now(UTC) - began).total_seconds()
    properties = {
        "cpu": detect_host().model,
        "threads": str(file.recipe.threads),
        "seed": str(file.recipe.seed),
        "version": __version__,
    }
    passes = gate.undecided == "pass"
    heading = Heading(file.recipe.name, began.isoformat(), seconds, properties, passes)
    write_gate(task.folder, checks, heading)
    plain = [to_plain(check) for check in checks]
    write_whole(task.folder / _CHECKS, json.dumps(plain, indent=1).encode())
    verdict = verdict_of(checks)
    facts = {"checks": plain, "verdict": verdict, "open": is_open(checks, passes)}
    outputs = {
        "checks": Output(_CHECKS, "checks"),
        "xml": Output(XML, "gate"),
        "markdown": Output(MARKDOWN, "gate"),
    }
    return Made(outputs, verdict or "nothing was asked for", facts)


def _now(file: RecipeFile, task: Task) -> Now:
    """The candidate, to be compared with the one of another run."""
    name = judged(file)[1].name
    judgement, measured = task.facts.get("after"), task.facts["times"]
    times = measured["contestants"][name]
    judged_by, figure = None, None
    if judgement is not None:
        metric, unit = judgement["metric"], judgement["unit"]
        judged_by = Judged(metric, unit, judgement["higher_is_better"], judgement["samples"])
        figure = Figure(**judgement["figure"])
    return Now(
        judged_by,
        figure,
        Figure(times["latency_us"], times["low_us"], times["high_us"]),
        measured["memory"].get(name),
        surroundings_of(file, ""),
    )


class _Evidence:
    """What has been measured, and how more is."""

    def __init__(self, file: RecipeFile, task: Task) -> None:
        self.file, self.task = file, task
        before, after = judged(file)
        self.names = before.name, after.name
        self.duels = duels_of(read_rounds(Path(task.inputs["times"])), *self.names)
        self.memory = task.facts["times"].get("memory", {})

    def measure(self, look: int, names: tuple[str, ...]) -> Measured:
        """All so far; from the second look on with more races."""
        if look and SPEED in names:
            entrants = Entrants.of(self.file, self.task.inputs, self.names)
            duration = self.file.recipe.benchmark.duration
            more = entrants.race(benchmark.MORE_DUELS, duration, self.task.report)
            self.duels = [*self.duels, *duels_of(more, *self.names)]
        used = {name: self.memory.get(name) for name in self.names}
        return Measured(self._accuracy(), self.duels, used[self.names[1]], used[self.names[0]])

    def _accuracy(self) -> Paired | None:
        if self.file.max_drop is None:
            return None
        before, after = (load_kept(Path(self.task.inputs[each])) for each in ("before", "after"))
        return Paired(find_metric(self.file.recipe.metric), before, after)


def duels_of(rounds: Sequence[Rounds], baseline: str, candidate: str) -> list[Duel]:
    """The races in which both took part."""
    named = {each.name: each.duels for each in rounds}
    if baseline not in named or candidate not in named:
        return []
    return [Duel(*pair) for pair in zip(named[baseline], named[candidate], strict=True)]

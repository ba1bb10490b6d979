"""A run as an `Outcome`: put together from what its stages left, however far it has come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twofour.core.outcome import (
    SCHEMA,
    Artifact,
    Cell,
    Check,
    Edge,
    Figure,
    LayerRow,
    Outcome,
    Point,
    StageRecord,
    Surroundings,
)
from twofour.core.outcome import Task as Judged
from twofour.core.records import to_plain
from twofour.pipeline.folder import RECIPE
from twofour.pipeline.identity import Identity
from twofour.pipeline.networks import Network, in_table, networks_of
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.runner import Ran
from twofour.pipeline.stage import Given, Result
from twofour.pipeline.stages import benchmark, decide, layers, sensitivity
from twofour.pipeline.stages.build import BuildItem, build_items
from twofour.pipeline.stages.evaluate import peer_stage, stage_of

Facts = Mapping[str, Any]


def outcome_of(
    file: RecipeFile, ran: Sequence[Ran], surroundings: Surroundings, recipe: Identity
) -> Outcome:
    """What a run has found so far.

    Args:
        file: the recipe.
        ran: all stages, in order.
        surroundings: of the run.
        recipe: its file.
    """
    results = {each.stage.name: each.result for each in ran if each.result is not None}
    facts = {name: result.facts for name, result in results.items()}
    gate, shown = facts.get(decide.NAME, {}), facts.get(layers.NAME, {})
    return Outcome(
        file.recipe.name,
        datetime.now(UTC).isoformat(timespec="seconds"),
        str(gate.get("verdict", "")),
        tuple(Check(**each) for each in gate.get("checks", ())),
        _task(file, facts),
        tuple(_cell(file, network, facts) for network in in_table(networks_of(file.recipe))),
        tuple(_points(file, facts)),
        tuple(LayerRow(**each) for each in shown.get("layers", ())),
        tuple(Edge(**each) for each in shown.get("edges", ())),
        tuple(_record(each) for each in ran),
        (
            Artifact(RECIPE, "recipe", recipe.sha256, recipe.size_bytes, ""),
            *_artifacts(list(results.values())),
        ),
        surroundings,
        tuple(f"{name}: {note}" for name, each in results.items() for note in each.notes),
        dict(_documents(file, facts)),
    )


def plain_outcome(outcome: Outcome) -> dict[str, Any]:
    """The content of run.json; numbers that JSON has not become null."""
    plain = {"schema": f"twofour.{SCHEMA}", **to_plain(outcome)}
    found: dict[str, Any] = _finite(plain)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _task(file: RecipeFile, facts: Mapping[str, Facts]) -> Judged | None:
    for item in build_items(file.recipe):
        found = facts.get(stage_of(item))
        if found is not None:
            better = found["higher_is_better"]
            return Judged(found["metric"], found["unit"], better, found["samples"])
    return None


def _item(file: RecipeFile, network: Network) -> BuildItem:
    """Its engine for the first target."""
    return BuildItem(network, file.recipe.build.targets[0])


def _cell(file: RecipeFile, network: Network, facts: Mapping[str, Facts]) -> Cell:
    if network.model is None:
        return Cell(network.weights, network.precision, note=network.why_not)
    item = _item(file, network)
    built, measured = facts.get(item.stage), facts.get(benchmark.NAME, {})
    if built is None:
        return Cell(network.weights, network.precision, note="not made yet")
    times = measured.get("contestants", {}).get(item.name, {})
    return Cell(
        network.weights,
        network.precision,
        _figure(facts.get(stage_of(item))),
        times.get("latency_us"),
        times.get("low_us"),
        times.get("high_us"),
        built["engine_bytes"],
        built["weight_bytes"],
        measured.get("memory", {}).get(item.name),
        measured.get("joules", {}).get(item.name),
    )


def _figure(facts: Facts | None) -> Figure | None:
    return None if facts is None or facts["figure"] is None else Figure(**facts["figure"])


def _points(file: RecipeFile, facts: Mapping[str, Facts]) -> Iterator[Point]:
    """All that have both a figure and a time."""
    contestants = facts.get(benchmark.NAME, {}).get("contestants", {})
    first = file.recipe.build.targets[0]
    for item in build_items(file.recipe):
        figure, times = _figure(facts.get(stage_of(item))), contestants.get(item.name)
        if figure is not None and times is not None:
            own = item.target == first
            name = item.network.name if own else item.name
            kind = item.network.role if own else "variant"
            yield Point(name, kind, figure, times["latency_us"])
    for peer, item in benchmark.peers_of(file):
        name = benchmark.peer_name(peer, item)
        figure, times = _figure(facts.get(peer_stage(item))), contestants.get(name)
        if figure is not None and times is not None:
            yield Point(name.removeprefix("peer "), "peer", figure, times["latency_us"])


def _record(ran: Ran) -> StageRecord:
    result = ran.result
    settings = {name: _words(value) for name, value in _flat(ran.stage.settings)}
    return StageRecord(
        ran.stage.name,
        ran.status,
        result.key if result else "",
        result.seconds if result else 0.0,
        ran.text,
        settings,
    )


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, value


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _artifacts(results: Sequence[Result]) -> Iterator[Artifact]:
    """What the user gave, each once, then what each stage wrote."""
    given: dict[tuple[str, str], Artifact] = {}
    for result in results:
        for each in result.inputs.values():
            if each.kind:
                path = _shown(each)
                artifact = Artifact(path, each.kind, each.sha256, each.size_bytes, "")
                given.setdefault((path, each.sha256), artifact)
    yield from given.values()
    for result in results:
        for kept in result.outputs.values():
            sources = [result.inputs[name] for name in kept.made_from if name in result.inputs]
            yield Artifact(
                f"stages/{result.folder}/{kept.file}",
                kept.kind,
                kept.sha256,
                kept.size_bytes,
                result.name,
                tuple(dict.fromkeys(_shown(each) for each in sources)),
            )


def _shown(given: Given) -> str:
    """A file of the user's by its name alone; a function, and a file of the run, as it is."""
    if not given.kind or given.kind == "code" or ":" in Path(given.place).name:
        return given.place
    return Path(given.place).name


def _documents(file: RecipeFile, facts: Mapping[str, Facts]) -> Iterator[tuple[str, Any]]:
    """Of other commands, as their --json has them."""
    scan = facts.get(sensitivity.NAME)
    if scan is not None:
        yield "sensitivity", scan["document"]
    candidate = networks_of(file.recipe)[-1]
    for network in (candidate, *networks_of(file.recipe)):
        name = network.model.stage if network.model is not None else ""
        document = facts.get(name, {}).get("document")
        if document is not None:
            yield "quantize", document
            return

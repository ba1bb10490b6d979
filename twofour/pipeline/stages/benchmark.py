"""benchmark: all engines and their peers in one race, in turns, on one input.

The race is held `DUELS` times, each in sessions of its own, since sessions opened anew lie
elsewhere in memory, which a race cannot see from within. All rounds are kept: the gate judges them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twofour.bench import peers
from twofour.bench.declared import random_feeds
from twofour.bench.energy import Unavailable, measure
from twofour.bench.memory import peak_memory
from twofour.bench.regression import median_time
from twofour.bench.timing import Contestant, Feeds, Schedule, race
from twofour.bench.versus import ours
from twofour.core.data import as_data
from twofour.core.feeds import runs
from twofour.core.outcome import Figure
from twofour.core.progress import Report
from twofour.core.target import detect_host, missing_features
from twofour.core.writing import write_whole
from twofour.engine import Engine, Plan
from twofour.evaluate.feeding import engine_forms
from twofour.pipeline.networks import BASELINE, CANDIDATE
from twofour.pipeline.recipe import Benchmark
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import From, Input, Made, Output, Source, Stage, Task
from twofour.pipeline.stages.build import BuildItem, build_items
from twofour.runtime.session import Session

NAME = "benchmark"
DUELS = 3
"""Races, each in sessions of its own."""
MORE_DUELS = 3
"""That are held where the gate cannot tell, each time."""
_ROUNDS = "rounds.json"
_LEAST_S = 0.2
_ENERGY_S = 1.0
_PEER = "peer "


@dataclass(frozen=True)
class Rounds:
    """What one contestant took.

    Attributes:
        name: of an engine, as its stage has it, or of a peer: "peer onnxruntime 2:4 PTQ".
        version: of what ran it.
        setting: in words.
        duels: of each race the medians of its rounds, microseconds.
    """

    name: str
    version: str
    setting: str
    duels: tuple[tuple[float, ...], ...]

    @property
    def median_us(self) -> float:
        """Over all rounds."""
        return float(np.median(np.concatenate(self.duels)))

    def interval(self, confidence: float) -> Figure:
        """The median, and within which ends those of other races would be."""
        found = median_time(self.duels, confidence)
        return Figure(found.value, found.low, found.high)


def benchmark_stage(file: RecipeFile) -> Stage:
    """The one race of a recipe."""
    recipe = file.recipe
    items = build_items(recipe)
    inputs: dict[str, Input] = {item.name: From(item.stage, "engine") for item in items}
    for peer, item in peers_of(file):
        assert item.network.model is not None
        inputs[peer_name(peer, item)] = item.network.model
    data = recipe.data.evaluate or recipe.data.calibrate
    if data is not None:
        inputs["data"] = Source(file.place(data), "data")
    settings = recipe.benchmark.model_dump(mode="json") | {
        "threads": recipe.threads,
        "seed": recipe.seed,
        "cpu": detect_host().model,
    }
    return Stage(NAME, "benchmark", settings, inputs, partial(_benchmark, file))


def peers_of(file: RecipeFile) -> Iterator[tuple[str, BuildItem]]:
    """Each peer runs the file of the result, and the float one that it is compared with."""
    items = build_items(file.recipe)
    chosen = {i.network.name: i for i in items if i.network.role in (BASELINE, CANDIDATE)}
    for peer in file.recipe.benchmark.vs:
        for item in chosen.values():
            yield peer, item


def _benchmark(file: RecipeFile, task: Task) -> Made:
    recipe = file.recipe
    entrants = Entrants.of(file, task.inputs)
    found = entrants.race(DUELS, recipe.benchmark.duration, task.report)
    write_whole(task.folder / _ROUNDS, json.dumps([vars(each) for each in found]).encode())
    used = consumed(entrants, recipe.benchmark, task.report)
    facts = {
        "contestants": {each.name: _facts(file, each) for each in found},
        "memory": used.memory_bytes,
        "joules": used.joules,
    }
    fastest = min(found, key=lambda each: each.median_us)
    text = f"{len(found)} contestants; fastest {fastest.name} {fastest.median_us:.4g} us"
    outputs = {"rounds": Output(_ROUNDS, "times")}
    return Made(outputs, text, facts, (*entrants.notes, *used.notes))


def _facts(file: RecipeFile, rounds: Rounds) -> dict[str, Any]:
    gate = file.recipe.gate
    found = rounds.interval(0.95 if gate is None else gate.confidence)
    words = {"version": rounds.version, "setting": rounds.setting}
    return words | {"latency_us": found.value, "low_us": found.low, "high_us": found.high}


def read_rounds(path: Path) -> tuple[Rounds, ...]:
    """What the stage left."""
    return tuple(
        Rounds(**(each | {"duels": tuple(tuple(duel) for duel in each["duels"])}))
        for each in json.loads(path.read_bytes())
    )


def peer_name(peer: str, item: BuildItem) -> str:
    """What a peer is called that runs the file of an engine."""
    return f"{_PEER}{peer} {item.network.name}"


@dataclass(frozen=True)
class Entrants:
    """Who takes part.

    Attributes:
        engines: name -> file.
        models: name of a peer's entry -> peer, file.
        feeds: the one input.
        threads: for everybody.
        notes: who cannot take part, and why.
    """

    engines: Mapping[str, Path]
    models: Mapping[str, tuple[str, Path]]
    feeds: Feeds
    threads: int
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(file: RecipeFile, inputs: Mapping[str, str], names: Sequence[str] = ()) -> Entrants:
        """Those of the recipe; or some of them, by name."""
        items = {item.name for item in build_items(file.recipe)}
        engines = {n: Path(p) for n, p in inputs.items() if n in items and n in (names or items)}
        plans = {name: Engine.load(path).plan for name, path in engines.items()}
        notes = []
        for name, plan in list(plans.items()):
            if lacking := missing_features(plan.target):
                notes.append(f"{name} was not timed: here is no {', '.join(lacking)}")
                del engines[name]
        models = {}
        for name, path in inputs.items():
            if name.startswith(_PEER) and not names:
                models[name] = name.removeprefix(_PEER).split(" ")[0], Path(path)
        feeds = _feeds(plans[next(iter(engines))], inputs.get("data"), file.recipe.seed)
        return Entrants(engines, models, feeds, file.recipe.threads, tuple(notes))

    def race(self, duels: int, duration_s: float, report: Report) -> tuple[Rounds, ...]:
        """Holds races, each in sessions of its own."""
        schedule = Schedule(max(_LEAST_S, duration_s / duels))
        found: dict[str, list[tuple[float, ...]]] = {}
        who: dict[str, Contestant] = {}
        for number in range(duels):

            def told(done: int, total: int, number: int = number) -> None:
                report(number * total + done, duels * total, f"race {number + 1} of {duels}")

            with ExitStack() as stack:
                contestants = list(self._contestants(stack))
                timings = race(contestants, schedule, told)
                for contestant, timing in zip(contestants, timings, strict=True):
                    who[contestant.name] = contestant
                    found.setdefault(contestant.name, []).append(timing.round_medians_us)
        return tuple(
            Rounds(name, who[name].version, who[name].setting, tuple(each))
            for name, each in found.items()
        )

    def _contestants(self, stack: ExitStack) -> Iterator[Contestant]:
        for name, path in self.engines.items():
            session = stack.enter_context(Session(Engine.load(path), self.threads))
            yield ours(session, self.feeds, name)
        for name, (peer, path) in self.models.items():
            made = peers.prepare(peer, path, self.feeds, self.threads)
            yield Contestant(name, made.version, made.setting, made.call, made.outputs)


@dataclass(frozen=True)
class Consumed:
    """What engines take beside time.

    Attributes:
        memory_bytes: name -> peak resident memory of a process that runs it.
        joules: name -> of one run.
        notes: what could not be measured, and why.
    """

    memory_bytes: dict[str, int]
    joules: dict[str, float]
    notes: tuple[str, ...] = ()


def consumed(entrants: Entrants, settings: Benchmark, report: Report) -> Consumed:
    """Measures each engine by itself."""
    memory_bytes: dict[str, int] = {}
    joules: dict[str, float] = {}
    notes: list[str] = []
    for number, (name, path) in enumerate(entrants.engines.items()):
        if settings.memory:
            report(number, len(entrants.engines), f"memory of {name}")
            found = peak_memory(path, entrants.feeds, entrants.threads)
            memory_bytes[name] = found.peak_bytes
        if settings.energy and not notes:
            with Session(Engine.load(path), entrants.threads) as session:
                used = measure(partial(session.run, dict(entrants.feeds)), _ENERGY_S)
            if isinstance(used, Unavailable):
                notes.append(f"energy is {used}")
            else:
                joules[name] = used.joules
    return Consumed(memory_bytes, joules, tuple(notes))


def _feeds(plan: Plan, data: str | None, seed: int) -> Feeds:
    """The first samples, as many as a run of the engine usually has; without data random values."""
    if data is None:
        return random_feeds(plan.inputs, seed)
    forms, most = engine_forms(plan)
    usual = [info.usual_shape[0] for info in plan.inputs if info.shape]
    most = min(most, max(usual, default=1))
    return next(runs(as_data(data, [form.name for form in forms]), forms, most, most)).feeds

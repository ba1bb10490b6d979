"""Points: choices that were made into an engine, run and judged.

A point's latency is how many times as fast its engine ran beside the float32 engine, which is the
same in all races, and the float32 engine's own time: so points of different hours can be compared.
Compared are the fastest calls of each: whatever else computes only makes calls slower, and long
ones more so, which would make every engine that is faster than float32 look better than it is.
Each point is a line of the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from twofour.bench.declared import random_feeds
from twofour.bench.timing import Contestant, Schedule, Timing, race, ratio
from twofour.bench.versus import ours
from twofour.compiler.build import BuildOptions, compile_model
from twofour.core.data import DataLike
from twofour.core.plan import Plan
from twofour.core.progress import Report, Stage
from twofour.core.scan import Cache, Item, Result, key_of, scan
from twofour.engine import Engine
from twofour.evaluate.feeding import engine_forms, engine_predictor
from twofour.evaluate.judge import Task
from twofour.evaluate.judging import Bench
from twofour.runtime.session import Session
from twofour.search.apply import ApplyOptions, Catalogue, applied, building
from twofour.search.choices import BASELINE, Choice
from twofour.search.harms import FORMAT, figures_of, line
from twofour.search.judging import Expected, judge
from twofour.search.units import Unit
from twofour.search.units import building as told

SCHEDULE = Schedule(duration_s=1.2, min_rounds=15)
Assignment = tuple[Choice, ...]
"""A choice for each unit."""


@dataclass(frozen=True)
class Point:
    """An engine that was built, run and judged.

    Attributes:
        name: why it was built.
        choices: of each unit.
        latency_us: of one run.
        speed: times as fast as the float32 engine, by the fastest calls of both; and the first and
            third quartile of the rounds of their race.
        figure: of the metric; None where that gives no number.
        drop: by how much that is worse than the float model's.
        drop_error: its standard error; None for a metric of the user's own.
        error: of the outputs; None where they are no numbers.
    """

    name: str
    choices: Assignment
    latency_us: float
    speed: tuple[float, float, float]
    figure: float | None
    drop: float | None
    drop_error: float | None
    error: float | None

    def is_ahead_of(self, other: Point) -> bool:
        """Whether it is at least as fast and loses no more of the metric, and is not the same."""
        if self.drop is None or other.drop is None:
            return False
        mine, others = (self.latency_us, self.drop), (other.latency_us, other.drop)
        return mine != others and all(a <= b for a, b in zip(mine, others, strict=True))


@dataclass
class Workshop:
    """Builds, runs and judges.

    Attributes:
        bench: the task, the float model judged.
        expected: outputs of the float model.
        units: of the model.
        catalogue: of pruned weights.
        data: to calibrate with.
        apply: how to prune and to quantize.
        build: how to build.
        identity: of all that results depend on.
        cache: of results.
        evaluations: points that were asked for.
    """

    bench: Bench
    expected: Expected
    units: tuple[Unit, ...]
    catalogue: Catalogue
    data: DataLike
    apply: ApplyOptions
    build: BuildOptions
    identity: tuple[str, ...]
    cache: Cache = field(repr=False)
    evaluations: int = 0
    points: dict[Assignment, Point] = field(default_factory=dict)
    _held: ExitStack = field(default_factory=ExitStack, repr=False)
    _reference: Contestant | None = None

    def __enter__(self) -> Workshop:
        """Nothing is built yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the float32 engine's session."""
        self._held.close()

    @property
    def baseline(self) -> Assignment:
        """Everything dense and float32."""
        return (BASELINE,) * len(self.units)

    def point(self, name: str, choices: Assignment, stage: Stage) -> Point:
        """Builds, runs and judges, unless that is known.

        Raises:
            UnsupportedError: it cannot be built.
        """
        if choices not in self.points:
            reference_us = self.reference_us(stage)
            found = self._line(name, choices, stage)
            self.points[choices] = _point(name, choices, found, reference_us)
            self.evaluations += 1
        return self.points[choices]

    def reference_us(self, stage: Stage) -> float:
        """What the float32 engine takes by itself."""
        found = self._line("the float32 engine", self.baseline, stage)["time_us"]
        assert found is not None
        return found

    def words(self, choices: Assignment) -> list[str]:
        """The choice of each layer, for a key."""
        return [f"{layer}={choice}" for layer, choice in self.named(choices).items()]

    def named(self, choices: Assignment) -> dict[str, Choice]:
        """By the names of layers."""
        pairs = zip(self.units, choices, strict=True)
        return {layer: choice for unit, choice in pairs for layer in unit.layers}

    def _line(self, name: str, choices: Assignment, stage: Stage) -> Result:
        key = key_of(FORMAT, *self.identity, "point", *self.words(choices))
        item = Item(name, key, choices)
        if item.key in self.cache.results:
            return self.cache.results[item.key]
        with stage(name) as report:
            return scan([item], lambda: partial(self._work, report), self.cache)[0]

    def _work(self, report: Report, choices: Assignment) -> Result:
        began = time.monotonic()
        engine = self.engine(choices, report)
        with ExitStack() as passing:
            alone = choices == self.baseline
            held = self._held if alone and self._reference is None else passing
            session = held.enter_context(Session(engine, self.build.threads))
            mine = ours(session, random_feeds(engine.plan.inputs))
            if alone and self._reference is None:
                self._reference = mine
            raced = self._raced(mine, alone, report)
            task = engine_task(self.bench.task, engine.plan)
            judged = judge(task, engine_predictor(session), self.expected, report, "judging")
        return line(time.monotonic() - began, **figures_of(self.bench, judged), **raced)

    def _raced(self, mine: Contestant, alone: bool, report: Report) -> dict[str, float]:
        every = [mine] if alone else [mine, self.base(report)]
        times = race(every, SCHEDULE, lambda done, total: report(done, total, "running"))
        if alone:
            return {"time_us": times[0].min_us, "speed": 1, "speed_low": 1, "speed_high": 1}
        return speeds(times[0], times[1])

    def base(self, report: Report) -> Contestant:
        """The float32 engine, built anew where a former run judged it."""
        if self._reference is None:
            engine = self.engine(self.baseline, report)
            session = self._held.enter_context(Session(engine, self.build.threads))
            self._reference = ours(session, random_feeds(engine.plan.inputs))
        return self._reference

    def engine(self, choices: Assignment, report: Report) -> Engine:
        """Prunes, quantizes and compiles."""
        named = self.named(choices)
        model = applied(self.catalogue, named, self.data, self.apply, report)
        options = replace(building(named, self.build), race=False, sparsity="enable")
        return compile_model(model, options, partial(told, report))


def speeds(own: Timing, base: Timing) -> dict[str, float]:
    """How an engine did beside another one, as a line of the cache has it."""
    rounds = ratio(own, base)
    return {
        "time_us": own.min_us,
        "speed": base.min_us / own.min_us,
        "speed_low": rounds.low,
        "speed_high": rounds.high,
    }


def engine_task(task: Task, plan: Plan) -> Task:
    """The same samples in runs as an engine takes them."""
    forms, most = engine_forms(plan)
    return replace(task, forms=forms, most=most)


def _point(name: str, choices: Assignment, found: Result, reference_us: float) -> Point:
    speed, low, high = (found[n] or 1.0 for n in ("speed", "speed_low", "speed_high"))
    return Point(
        name,
        choices,
        reference_us / speed,
        (speed, low, high),
        found["figure"],
        found["drop"],
        found["drop_error"],
        found["error"],
    )


def front(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that no other is both as fast and as good as by the metric, the fastest first."""
    return _front([(point, point.drop) for point in points])


def error_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The same by the error of the outputs, which knows less of chance."""
    return _front([(point, point.error) for point in points])


def _front(points: Sequence[tuple[Point, float | None]]) -> tuple[Point, ...]:
    found: list[Point] = []
    least = math.inf
    known = [(point, loss) for point, loss in points if loss is not None]
    for point, loss in sorted(known, key=lambda pair: (pair[0].latency_us, pair[1])):
        if loss < least:
            found.append(point)
            least = loss
    return tuple(found)

"""Per layer what to prune to and what to compute in, by measured latency and measured accuracy.

    found = search("model.onnx", "test.npz", SearchOptions(max_drop=1.0))
    print(found.best.latency_us, found.best.figure, found.layers(found.best))

    units -> times (units.py) -> harms (harms.py) -> solve (solve.py) -> build, run, judge
    (points.py) -> learn (fit.py) -> solve again, within so many evaluations (explore.py)

Every step is kept in the cache, so a search that was ended goes on where it stood.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from twofour.compiler.build import EFFORTS, BuildOptions
from twofour.compiler.forms import BF16, F32, PRECISIONS, Form, Forms
from twofour.compiler.prunable import named, read_network
from twofour.core.data import DataLike, as_data
from twofour.core.errors import InputError
from twofour.core.machine import usable_cores
from twofour.core.patterns import Pattern
from twofour.core.progress import Stage, unseen
from twofour.core.scan import Cache, Item, Result, key_of, scan
from twofour.core.target import host_target
from twofour.core.version import __version__
from twofour.evaluate.feeding import engine_predictor, model_predictor
from twofour.evaluate.judging import Bench, Setup, lasting
from twofour.evaluate.metrics import Kept
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session
from twofour.search.apply import ApplyOptions, Catalogue
from twofour.search.explore import Explorer, Goal
from twofour.search.harms import (
    FIGURES,
    FORMAT,
    Harms,
    Scanner,
    bf16_harms,
    figures_of,
    line,
)
from twofour.search.judging import Expected, judge
from twofour.search.network import layers_of
from twofour.search.points import Point, Workshop, engine_task
from twofour.search.results import Found
from twofour.search.units import Network, measured_network

PATTERNS = ("2:4", "2:4/pair", "4:8")
LEAST_EVALUATIONS = 6


@dataclass(frozen=True)
class SearchOptions:
    """What is asked for, and how it is looked for. One of the two bounds has to be given.

    Attributes:
        max_drop: most that the metric may be worse than the float model's, in its own unit; the
            least latency within it is looked for.
        max_latency_us: most that a run may take; the best metric within it is looked for.
        metric: one of `metrics.METRICS`, or module:function.
        output: that the metric reads; by default the first.
        samples: that engines are judged on: the first so many; None for all.
        scan_samples: that single changes are judged on, of these; their error needs few.
        calibrate: data for pruning and calibrating, by default the same; better another.
        apply: how layers are pruned and quantized.
        precisions: to choose from; "f32" always is.
        patterns: to choose from, beside dense.
        shapes: of a run; by default those of the first sample.
        threads: of engines.
        tuning_effort: 1 to 3, as of a build.
        evaluations: engines that are built, run and judged.
        jobs: processes that judge single changes.
        cache: file that keeps what was found.
        timing_cache: file that keeps the times of kernels; by default beside the cache.
    """

    max_drop: float | None = None
    max_latency_us: float | None = None
    metric: str = "top1"
    output: str | None = None
    samples: int | None = None
    scan_samples: int = 256
    calibrate: DataLike | None = None
    apply: ApplyOptions = field(default_factory=ApplyOptions)
    precisions: Sequence[str] = PRECISIONS
    patterns: Sequence[str] = PATTERNS
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    threads: int = 1
    tuning_effort: int = 2
    evaluations: int = 24
    jobs: int = 1
    cache: str | os.PathLike[str] | None = None
    timing_cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Refuses what means nothing. Raises InputError."""
        bounds = [b for b in (self.max_drop, self.max_latency_us) if b is not None]
        if len(bounds) != 1:
            raise InputError(
                "a search needs one bound",
                [f"expected a drop or a latency, got {len(bounds)} of them"],
                "give --max-drop 1.0, or --max-latency 250us",
            )
        if not math.isfinite(bounds[0]) or bounds[0] < 0 or self.max_latency_us == 0:
            raise InputError(f"bad bound {bounds[0]}", ["expected a number above 0"])
        if self.evaluations < LEAST_EVALUATIONS or self.jobs < 1 or self.scan_samples < 1:
            found = f"{self.evaluations} evaluations, {self.jobs} jobs, {self.scan_samples} samples"
            expected = f"expected at least {LEAST_EVALUATIONS}, 1 and 1, got {found}"
            raise InputError("bad bounds of the search", [expected], "allow more")
        if self.tuning_effort not in EFFORTS[1:]:
            expected = f"expected {EFFORTS[1]} to {EFFORTS[-1]}: a search is made of times"
            raise InputError(f"cannot search with tuning effort {self.tuning_effort!r}", [expected])
        for what, given, known in (
            ("precision", self.precisions, PRECISIONS),
            ("pattern", [str(Pattern.parse(p)) for p in self.patterns], PATTERNS),
        ):
            if unknown := [each for each in given if each not in known]:
                expected = f"expected some of {', '.join(known)}"
                raise InputError(f"no kernels for {what} {unknown[0]!r}", [expected])

    @property
    def goal(self) -> Goal:
        """The bound."""
        return Goal(self.max_drop, self.max_latency_us)


def search(
    model: str | os.PathLike[str],
    data: DataLike,
    options: SearchOptions,
    stage: Stage = unseen,
) -> Found:
    """Chooses for each layer.

    Args:
        model: a float ONNX file.
        data: samples named like the model's inputs, and `labels`; gone through many times.
        options: what is asked for.
        stage: shows the progress.

    Raises:
        InputError: model, data, metric and options do not fit each other; the cache cannot be
            written.
        UnsupportedError: the model cannot be compiled, or ONNX Runtime cannot run it.
    """
    return Search(model, data, options).run(stage)


class Search:
    """The same; what does not fit is found at once.

    Args:
        model: a float ONNX file.
        data: samples and labels.
        options: what is asked for.

    Raises:
        InputError, UnsupportedError: as `search`.
    """

    def __init__(
        self, model: str | os.PathLike[str], data: DataLike, options: SearchOptions
    ) -> None:
        """Reads the model, and judges the first sample."""
        self._name, self._options, self._target = os.fspath(model), options, host_target()
        self._cache = Cache.open(options.cache, FIGURES)
        self._data = lasting(data)
        self._calibrate = self._data if options.calibrate is None else lasting(options.calibrate)
        threads = max(1, usable_cores() // options.jobs)
        self._setup = Setup(
            Path(model), self._data, options.metric, options.output, options.samples, threads
        )
        first = Bench.of(self._setup)
        self._shapes = dict(options.shapes) or first.try_first()
        as_data(self._calibrate, first.task.data.names)
        self._model = named(read_network(model))
        self._layers = layers_of(self._model)

    def run(self, stage: Stage = unseen) -> Found:
        """Searches.

        Args:
            stage: shows the progress.

        Raises:
            InputError, UnsupportedError: as `search`.
        """
        options = self._options
        with ExitStack() as held:
            build = self._building(held)
            with stage("the float model"):
                task = _Judged.of(self._setup)
                identity = self._identity(task)
            forms = self._forms()
            network = measured_network(forms, self._layers, options.patterns, build, stage)
            catalogue = Catalogue(self._model, self._calibrate, options.apply, stage)
            network = self._prunable(network, catalogue, identity)
            harms = self._harms(network, catalogue, forms, build, identity, stage)
            workshop = Workshop(
                task.bench,
                task.expected,
                network.units,
                catalogue,
                self._calibrate,
                options.apply,
                build,
                identity,
                self._cache,
            )
            held.enter_context(workshop)
            explorer = Explorer(network, harms, workshop, options.goal, options.evaluations, stage)
            return self._found(explorer, explorer.run(), task, forms.notes)

    def _building(self, held: ExitStack) -> BuildOptions:
        """How engines are built. What they take is known again as long as the file of times is."""
        options, times = self._options, self._options.timing_cache
        if times is None and options.cache is not None:
            times = f"{os.fspath(options.cache)}.times"
        if times is None:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="twofour-"))
            times = Path(folder) / "times.json"
        return BuildOptions(
            shapes=self._shapes,
            threads=options.threads,
            timing_cache=times,
            tuning_effort=options.tuning_effort,
            target=self._target,
            race=False,
        )

    def _identity(self, task: _Judged) -> tuple[str, ...]:
        """What every line of the cache depends on, beside what it is of."""
        options = self._options
        seen = task.seen if options.calibrate is None else self._digest_of_calibration()
        shapes = sorted(self._shapes.items())
        machine = (str(self._target), self._target.model, __version__)
        how = (repr(options.apply), str(options.threads), str(options.tuning_effort), str(shapes))
        return (*task.bench.identity(task.seen), seen, *machine, *how)

    def _digest_of_calibration(self) -> str:
        samples = self._options.apply.samples
        data = as_data(self._calibrate, [each.name for each in Bench.of(self._setup).task.forms])
        seen = hashlib.sha256()
        for batch in data.batches(64, samples):
            for name, array in sorted(batch.inputs.items()):
                seen.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return seen.hexdigest()

    def _forms(self) -> Forms:
        precisions = [p for p in PRECISIONS if p == F32 or p in self._options.precisions]
        return Forms.of(self._model, self._shapes, precisions, self._target)

    def _prunable(
        self, network: Network, catalogue: Catalogue, identity: tuple[str, ...]
    ) -> Network:
        """Without the patterns that layers cannot be pruned to with this data."""
        items = [
            Item(
                f"{unit.name} {pattern}",
                key_of(FORMAT, *identity, "prunable", pattern, *unit.layers),
                (pattern, unit.layers),
            )
            for unit in network.units
            for pattern in dict.fromkeys(c.pattern for c in sorted(unit.times) if c.pattern)
        ]

        def work(argument: tuple[str, tuple[str, ...]]) -> Result:
            pattern, layers = argument
            refused = catalogue.refused(pattern)
            return line(0.0, figure=float(not any(name in refused for name in layers)))

        results = scan(items, lambda: work, self._cache)
        cannot = {
            (item.argument[1][0], item.argument[0])
            for item, result in zip(items, results, strict=True)
            if not result["figure"]
        }
        units = []
        for unit in network.units:
            times = {c: us for c, us in unit.times.items() if (unit.name, c.pattern) not in cannot}
            units.append(replace(unit, times=times))
        return replace(network, units=tuple(units))

    def _harms(
        self,
        network: Network,
        catalogue: Catalogue,
        forms: Forms,
        build: BuildOptions,
        identity: tuple[str, ...],
        stage: Stage,
    ) -> Harms:
        """Each change alone, on the first samples."""
        options = self._options
        samples = min(options.scan_samples, options.samples or options.scan_samples)
        task = _Judged.of(replace(self._setup, samples=samples))
        scanner = Scanner(
            task.bench.setup,
            (*identity, str(samples)),
            network.units,
            catalogue,
            self._calibrate,
            options.apply,
            options.jobs,
            self._cache,
        )
        found = scanner.scan(stage)
        if any(choice.precision == BF16 for choice in network.choices):
            engine = partial(_engine_line, task, forms, build)
            item = Item("everything bfloat16", key_of(FORMAT, *identity, samples, BF16), stage)
            result = scan([item], lambda: engine, self._cache)[0]
            error = math.inf if result["error"] is None else result["error"]
            found |= bf16_harms(network.units, error, result["drop"])
        return Harms(found)

    def _found(
        self,
        explorer: Explorer,
        points: tuple[Point, ...],
        task: _Judged,
        notes: tuple[str, ...],
    ) -> Found:
        options, metric = self._options, task.bench.metric
        best = options.goal.best(points)
        source = self._data if isinstance(self._data, (str, os.PathLike)) else "arrays"
        return Found(
            self._name,
            os.fspath(source),
            metric.name,
            metric.unit,
            metric.higher_is_better,
            len(task.kept.labels),
            task.kept.figure,
            options.max_drop,
            options.max_latency_us,
            options.threads,
            self._target.model,
            str(self._target),
            explorer.network.units,
            tuple(explorer.harms.by_part.values()),
            tuple(map(explorer.harms.worth, explorer.network.units)),
            points,
            None if best is None else points.index(best),
            explorer.predicted(),
            (*notes, *self._cache.notes(), *self._notes(best)),
        )

    def _notes(self, best: Point | None) -> Iterator[str]:
        if best is None:
            yield "no engine that was built holds the bound"
        if self._options.calibrate is None:
            yield (
                "engines were calibrated, pruned and judged on the same samples: "
                "give others to --calibration-data"
            )


@dataclass(frozen=True)
class _Judged:
    """The task, and the float model's outputs on it."""

    bench: Bench
    expected: Expected
    kept: Kept
    seen: str

    @staticmethod
    def of(setup: Setup) -> _Judged:
        """One pass of the float model.

        Raises:
            InputError: the metric gives no number.
        """
        bench = Bench.of(setup)
        predict = model_predictor(Reference(bench.model, threads=setup.threads, optimized=True))
        seen = hashlib.sha256()
        expected, kept = Expected.of(bench.task, predict, seen.update)
        if not math.isfinite(kept.figure):
            raise InputError(
                f"metric {bench.metric.name} gives no number of the float model",
                [f"got {kept.figure} on {len(kept.labels)} samples"],
                "choose another metric, or more samples",
            )
        setup = replace(setup, dense=kept if bench.metric.resampled else None, figure=kept.figure)
        return _Judged(replace(bench, setup=setup), expected, kept, seen.hexdigest())


def _engine_line(task: _Judged, forms: Forms, build: BuildOptions, stage: Stage) -> Result:
    """The dense network in bfloat16."""
    began = time.monotonic()
    with stage("everything bfloat16"):
        engine = forms.build(Form(BF16), build)
        with Session(engine, build.threads) as session:
            judged = judge(
                engine_task(task.bench.task, engine.plan),
                engine_predictor(session),
                task.expected,
            )
    return line(time.monotonic() - began, **figures_of(task.bench, judged))

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
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from twofour.bench.noise import Watch
from twofour.compiler.build import BuildOptions
from twofour.compiler.forms import BF16, F32, PRECISIONS, Form, Forms
from twofour.compiler.prunable import named, read_network
from twofour.core.data import DataLike, as_data
from twofour.core.errors import InputError
from twofour.core.progress import Stage, unseen
from twofour.core.scan import Cache, Item, Result, key_of, scan
from twofour.core.target import host_target
from twofour.core.version import __version__
from twofour.evaluate.feeding import engine_predictor, model_predictor
from twofour.evaluate.judging import Bench, Setup, lasting
from twofour.evaluate.metric import Kept
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session
from twofour.search.apply import Catalogue
from twofour.search.explore import Explorer
from twofour.search.final import Unseen, heat, on_unseen
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
from twofour.search.options import SearchOptions
from twofour.search.points import Point, Workshop, engine_task
from twofour.search.results import Found
from twofour.search.units import Network, measured_network


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
        self._setup = Setup(
            Path(model),
            self._data,
            options.metric,
            options.output,
            options.samples,
            options.workers.threads,
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
            watch, known = Watch.begin(), len(self._cache.results)
            points = self._settled(explorer.run(), workshop, stage)
            best = options.goal.best(points)
            last = None if best is None else on_unseen(workshop, best, stage)
            seen = watch.end() if len(self._cache.results) > known else ()
            notes = (*forms.notes, *(f"times are unsteady: {why}" for why in seen))
            return self._found(explorer, points, last, task, notes)

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
        how = self._options.apply
        samples = None
        if how.samples is not None and how.quantize.samples is not None:
            samples = max(how.samples, how.quantize.samples)
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
            options.workers,
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

    def _settled(
        self, points: tuple[Point, ...], workshop: Workshop, stage: Stage
    ) -> tuple[Point, ...]:
        """The points, those that could be the fastest within the drop raced once more."""
        if self._options.max_drop is None:
            return points
        again = heat(workshop, [p for p in points if self._options.goal.holds(p)], stage)
        return tuple(again.get(point.choices, point) for point in points)

    def _found(
        self,
        explorer: Explorer,
        points: tuple[Point, ...],
        last: Unseen | None,
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
            last,
            explorer.predicted(),
            (*notes, *self._cache.notes(), *self._notes(best, last)),
        )

    def _notes(self, best: Point | None, last: Unseen | None) -> Iterator[str]:
        most = self._options.max_drop
        if most is not None and last is not None and (last.drop is None or last.drop > most):
            yield (
                f"on the {last.samples} samples that the search did not use the answer loses more "
                "than the bound: search with more samples, or with a smaller drop"
            )
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

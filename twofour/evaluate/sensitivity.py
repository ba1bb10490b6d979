"""The layers of an ONNX file, each pruned alone, judged by the task's metric.

    found = sensitivity("model.onnx", "test.npz", SensitivityOptions(metric="top1", samples=1000))
    for case in found.at("2:4"):
        print(case.layer, case.drop, case.energy_kept)

A scan costs one pass over the samples for each layer and pattern, on ONNX Runtime with all its
optimisations. Several layers are judged at once (`jobs`); with `cache` a scan that was ended goes
on where it stood. The dense network is judged first, each time: what is wrong with data or metric
is found there, and a note says how long the rest will take.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from twofour.compiler.importer import standardized
from twofour.core.data import Data, DataLike, as_data, import_function
from twofour.core.errors import InputError
from twofour.core.patterns import Pattern
from twofour.core.progress import Report, Stage, silent, unseen
from twofour.core.scan import Cache, Item, Result, Work, in_words, key_of, scan
from twofour.core.sensitivity import JUDGED, Sensitivity, case_of, judged
from twofour.evaluate.alone import (
    Layer,
    Plan,
    find_layers,
    left_out,
    prune_alone,
    tried,
    tries,
)
from twofour.evaluate.feeding import MOST, model_predictor
from twofour.evaluate.judge import Task
from twofour.evaluate.metrics import Kept, Metric, Scorer, find_metric
from twofour.onnx_tools.load import load_model, model_bytes
from twofour.onnx_tools.reference import Reference

_FORMAT = 1  # of what a result means; part of a key


@dataclass(frozen=True)
class SensitivityOptions:
    """What to scan.

    Attributes:
        metric: one of `metrics.METRICS`, or module:function.
        output: that the metric reads; by default the first.
        patterns: such as "2:4" and "2:4/pair".
        skip: shell patterns of names of layers or weights that are not tried.
        samples: the first so many of the data; None for all.
        jobs: processes; each holds a model of its own.
        cache: file that keeps results, and that a later scan goes on from.
    """

    metric: str = "top1"
    output: str | None = None
    patterns: Sequence[str] = ("2:4",)
    skip: Sequence[str] = ()
    samples: int | None = None
    jobs: int = 1
    cache: str | os.PathLike[str] | None = None


def sensitivity(
    model: str | os.PathLike[str],
    data: DataLike,
    options: SensitivityOptions | None = None,
    stage: Stage = unseen,
    note: Callable[[str], None] = lambda text: None,
) -> Sensitivity:
    """Prunes each layer alone, by magnitude, and says what the metric loses.

    Args:
        model: an ONNX file, float or quantized.
        data: samples named like the model's inputs, and `labels`; gone through once for each case.
        options: what to scan.
        stage: shows the progress.
        note: told how long it will take, before it does.

    Raises:
        InputError: model, data and metric do not fit each other; no layer can be pruned; the cache
            cannot be written; an unknown pattern.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    options = options or SensitivityOptions()
    patterns = _patterns(options)
    cache = Cache.open(options.cache, JUDGED)
    setup = _Setup(Path(model), _lasting(data), options, _threads(options.jobs))
    with stage("the dense network") as report:
        bench = _Bench.of(setup)
        layers = tuple(find_layers(bench.model, options.skip))
        plan = {each: tuple(tries(bench.model, each, layers)) for each in patterns}
        left = left_out(str(model), plan)
        began = time.monotonic()
        dense, digest = bench.judge_dense(report)
        seconds = time.monotonic() - began
    setup = replace(setup, dense=dense if bench.metric.resampled else None, figure=dense.figure)
    items = _items(plan, _identity(bench, digest))
    _announce(items, cache, seconds, options, note)
    with stage("layers pruned alone") as report:
        start = functools.partial(_start, setup)
        results = scan(items, start, cache, options.jobs, report)
    cases = [
        case_of((layer.name, layer.skip, layer.parameters), pattern, pruned.energy_kept, result)
        for (layer, pattern, pruned), result in zip(tried(plan), results, strict=True)
    ]
    metric = bench.metric
    names = (str(model), metric.name, metric.unit, metric.higher_is_better)
    notes = tuple(_notes(cache, layers))
    return Sensitivity(*names, dense.figure, len(dense.labels), tuple(cases), left, notes)


@dataclass(frozen=True)
class Outline:
    """What is known of a model before a scan.

    Attributes:
        shapes: of the inputs of a run with one sample, or with as many as the model fixes.
        parameters: of each layer, by name.
    """

    shapes: dict[str, tuple[int, ...]]
    parameters: dict[str, int]


def outline(model: str | os.PathLike[str], data: DataLike, options: SensitivityOptions) -> Outline:
    """Judges the first sample, so that what does not fit is found within a second.

    Raises:
        InputError: model, data and metric do not fit each other; an unknown pattern or name.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    _patterns(options)
    Cache.open(options.cache, JUDGED)
    one = replace(options, samples=1)
    bench = _Bench.of(_Setup(Path(model), _lasting(data), one, 1))
    bench.judge(bench.model)
    shapes = {name: a.shape for run in bench.task.runs() for name, a in run.feeds.items()}
    layers = find_layers(bench.model, options.skip)
    return Outline(shapes, {layer.name: layer.parameters for layer in layers})


def _patterns(options: SensitivityOptions) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(Pattern.parse(each)) for each in options.patterns))


# How it is judged.


@dataclass(frozen=True)
class _Setup:
    """What a process needs.

    Attributes:
        model: the file.
        data: the samples.
        options: of the scan.
        threads: of ONNX Runtime.
        dense: what the metric keeps of the dense network; None if that tells no error.
        figure: its metric.
    """

    model: Path
    data: DataLike
    options: SensitivityOptions
    threads: int
    dense: Kept | None = None
    figure: float = 0.0


@dataclass(frozen=True)
class _Bench:
    """The model and its task, ready to judge variants."""

    setup: _Setup
    model: ir.Model
    metric: Metric
    task: Task = field(repr=False)

    @staticmethod
    def of(setup: _Setup) -> _Bench:
        """Reads the file, and opens the data."""
        options = setup.options
        metric = find_metric(options.metric)
        model = standardized(load_model(setup.model))
        if model.functions:
            model = model.clone()
            common_passes.InlinePass()(model)
        dense = Reference(model, threads=setup.threads, optimized=True)
        output = options.output or dense.outputs[0]
        if output not in dense.outputs:
            raise InputError(f"no output {output!r}", [f"the model has {', '.join(dense.outputs)}"])
        data = as_data(setup.data, [each.name for each in dense.inputs])
        task = Task(data, dense.inputs, MOST, options.samples, metric, output)
        return _Bench(setup, model, metric, task)

    def judge_dense(self, report: Report) -> tuple[Kept, str]:
        """The metric of the model as it is, and the hash of the samples."""
        digest = hashlib.sha256()
        return self.judge(self.model, report, digest.update), digest.hexdigest()

    def judge(
        self,
        model: ir.Model,
        report: Report = silent,
        seen: Callable[[bytes], None] = lambda content: None,
    ) -> Kept:
        """One pass over the samples; `seen` gets their bytes."""
        predict = model_predictor(Reference(model, threads=self.setup.threads, optimized=True))
        scorer = Scorer(self.metric, self.task.output)
        for run in self.task.runs():
            batch = run.batch
            scorer.add(predict(run), batch)
            for name, array in sorted(batch.inputs.items()):
                seen(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
            if batch.labels is not None:
                seen(f"labels {batch.labels.dtype}".encode() + batch.labels.tobytes())
            report(batch.start + len(batch), self.task.total, "")
        return scorer.result()

    def work(self, argument: tuple[str, str]) -> Result:
        """Judges the model with one weight pruned: what a `Case` has beside its layer."""
        began = time.monotonic()
        kept, setup = self.judge(prune_alone(self.model, *argument)), self.setup
        error = self.metric.error(setup.dense, kept) if setup.dense else None
        drop = self.metric.gain(kept.figure, setup.figure)
        return judged(kept.figure, drop, error, time.monotonic() - began)


def _start(setup: _Setup) -> Work:
    return _Bench.of(setup).work


def _threads(jobs: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // max(1, jobs))


def _lasting(data: DataLike) -> DataLike:
    """Data that can be gone through again: batches of a generator are kept."""
    if isinstance(data, (str, os.PathLike, Mapping, Sequence, Data)):
        return data
    return list(data)


# How results are found again.


def _identity(bench: _Bench, digest: str) -> tuple[str, ...]:
    """What every result depends on."""
    return (
        hashlib.sha256(model_bytes(bench.model)).hexdigest(),
        digest,
        bench.metric.name,
        _source(bench.metric.name),
        bench.task.output,
    )


def _source(metric: str) -> str:
    """The hash of the file of a metric of the user's own."""
    if ":" not in metric:
        return ""
    path = inspect.getsourcefile(import_function(metric, "metric", ""))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _items(plan: Plan, identity: tuple[str, ...]) -> list[Item]:
    return [
        Item(
            f"{layer.name} {pattern}",
            key_of(_FORMAT, *identity, layer.weight, pattern, "magnitude"),
            (layer.weight, pattern),
        )
        for layer, pattern, _ in tried(plan)
    ]


def _announce(
    items: Sequence[Item],
    cache: Cache,
    seconds: float,
    options: SensitivityOptions,
    note: Callable[[str], None],
) -> None:
    """The cost, before it is paid."""
    left = sum(item.key not in cache.results for item in items)
    known = f", {len(items) - left} more are known" if left < len(items) else ""
    jobs = max(1, min(options.jobs, left))
    text = f"{left} cases to judge{known}: about {in_words(left * seconds / jobs)}"
    resumable = "" if cache.path or left * seconds < 60 else "; --cache FILE would keep them"
    note(text + resumable)


def _notes(cache: Cache, layers: Sequence[Layer]) -> Iterator[str]:
    if cache.damaged:
        yield f"{cache.damaged} lines of {cache.path} could not be read and were passed over"
    for layer in layers:
        if layer.readers > 1:
            yield f"{layer.name}: {layer.readers} layers read this weight, pruned for all of them"

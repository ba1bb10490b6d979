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
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twofour.compiler.prunable import find_layers, left_out, tried, tries
from twofour.core.data import DataLike
from twofour.core.patterns import Pattern
from twofour.core.progress import Report, Stage, unseen
from twofour.core.scan import Cache, Item, Processes, Result, Spread, in_words, key_of, scan
from twofour.core.sensitivity import JUDGED, Sensitivity, Together, Tradeoff, case_of
from twofour.evaluate.judging import Bench, Setup, lasting, start
from twofour.evaluate.metric import Kept, Metric

_FORMAT = 1  # of what a result means; part of a key
_LONG_S = 60
Note = Callable[[str], None]


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
        spread: workers, instead of `jobs` processes: those of a cluster (`cluster.tasks`).
    """

    metric: str = "top1"
    output: str | None = None
    patterns: Sequence[str] = ("2:4",)
    skip: Sequence[str] = ()
    samples: int | None = None
    jobs: int = 1
    cache: str | os.PathLike[str] | None = None
    spread: Spread | None = None


def sensitivity(
    model: str | os.PathLike[str],
    data: DataLike,
    options: SensitivityOptions | None = None,
    stage: Stage = unseen,
) -> Sensitivity:
    """Prunes each layer alone, by magnitude, and says what the metric loses.

    Args:
        model: an ONNX file, float or quantized.
        data: samples named like the model's inputs, and `labels`; gone through once for each case.
        options: what to scan.
        stage: shows the progress.

    Raises:
        InputError: model, data and metric do not fit each other; no layer can be pruned; the cache
            cannot be written; an unknown pattern.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    return Scanner(model, data, options).alone(stage)


class Scanner:
    """Judges a model with one layer pruned, or some. What does not fit is found at once.

    Args:
        model: an ONNX file.
        data: samples and labels.
        options: what to scan.

    Attributes:
        shapes: of the inputs of a run with one sample, or with as many as the model fixes.
        parameters: of each layer, by name.
        excluded: what `twofour prune --skip` calls the layers that `options.skip` names.

    Raises:
        InputError, UnsupportedError: as `sensitivity`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        data: DataLike,
        options: SensitivityOptions | None = None,
    ) -> None:
        """Reads the model, and judges the first sample."""
        options = options or SensitivityOptions()
        patterns = tuple(dict.fromkeys(str(Pattern.parse(each)) for each in options.patterns))
        self._spread = options.spread or Processes(options.jobs)
        self._model, self._options = str(model), options
        self._dense: _Dense | None = None
        self._cache = Cache.open(options.cache, JUDGED)
        self._setup = Setup(
            Path(model),
            lasting(data),
            options.metric,
            options.output,
            options.samples,
            self._spread.threads,
        )
        first = Bench.of(self._setup)
        self.shapes = first.try_first()
        self._layers = tuple(find_layers(first.model, options.skip))
        self.parameters = {layer.name: layer.parameters for layer in self._layers}
        self.excluded = tuple(layer.skip for layer in self._layers if layer.excluded)
        self._plan = {each: tuple(tries(first.model, each, self._layers)) for each in patterns}
        self._left = left_out(self._model, self._plan)

    def alone(self, stage: Stage = unseen, note: Note = lambda text: None) -> Sensitivity:
        """Each layer pruned alone.

        Args:
            stage: shows the progress.
            note: told how long it will take, before it does.
        """
        dense = self._judge_dense(stage)
        chosen = tried(self._plan)
        groups = [((layer.weight,), pattern, layer.name) for layer, pattern, _ in chosen]
        results = self._scan("layers pruned alone", groups, stage, note)
        cases = tuple(
            case_of((layer.name, layer.skip, layer.parameters), pattern, result)
            for (layer, pattern, _), result in zip(chosen, results, strict=True)
        )
        metric = dense.metric
        return Sensitivity(
            self._model,
            metric.name,
            metric.unit,
            metric.higher_is_better,
            dense.figure,
            dense.samples,
            cases,
            self._left,
            tuple(self._notes()),
        )

    def together(
        self, ways: Sequence[Tradeoff], counts: Sequence[Sequence[int]], stage: Stage = unseen
    ) -> tuple[Tradeoff, ...]:
        """Prunes the first layers of each order together, and says what they really cost.

        Args:
            ways: orders to prune layers in.
            counts: for each, how many layers to prune, one network each.
            stage: shows the progress.

        Returns:
            The same with what was measured.
        """
        weights = {layer.name: layer.weight for layer in self._layers}
        groups = [
            (tuple(weights[s.layer] for s in way.steps[:count]), way.pattern, f"{count} layers")
            for way, each in zip(ways, counts, strict=True)
            for count in each
        ]
        results = iter(self._scan("layers pruned together", groups, stage) if groups else ())
        return tuple(
            replace(way, together=tuple(Together.of(count, next(results)) for count in each))
            for way, each in zip(ways, counts, strict=True)
        )

    def _judge_dense(self, stage: Stage) -> _Dense:
        """Once: the figure that drops are taken from, and the time that a pass takes."""
        if self._dense is None:
            with stage("the dense network") as report:
                self._dense = _Dense.judge(self._setup, report)
            kept = self._dense.kept if self._dense.metric.resampled else None
            self._setup = replace(self._setup, dense=kept, figure=self._dense.figure)
        return self._dense

    def _scan(
        self, name: str, groups: Sequence[_Group], stage: Stage, note: Note = lambda text: None
    ) -> tuple[Result, ...]:
        dense = self._judge_dense(stage)
        items = [
            Item(
                f"{words} {pattern}",
                key_of(_FORMAT, *dense.identity, *sorted(weights), pattern, "magnitude"),
                (weights, pattern),
            )
            for weights, pattern, words in groups
        ]
        note(self._cost(items, dense.seconds))
        with stage(name) as report:
            work = functools.partial(start, self._setup)
            return scan(items, work, self._cache, report=report, spread=self._spread)

    def _cost(self, items: Sequence[Item], seconds: float) -> str:
        left = sum(item.key not in self._cache.results for item in items)
        known = f", {len(items) - left} more are known" if left < len(items) else ""
        whole_s = left * seconds / max(1, min(self._spread.jobs, left))
        text = f"{left} networks to judge{known}: about {in_words(whole_s)}"
        lost = whole_s > _LONG_S and self._cache.path is None
        return text + "; --cache FILE would keep what is done" * lost

    def _notes(self) -> Iterator[str]:
        yield from self._cache.notes()
        for layer in self._layers:
            if layer.readers > 1:
                yield f"{layer.name}: {layer.readers} layers read this weight, pruned for all"


_Group = tuple[tuple[str, ...], str, str]  # weights, pattern, and what to call them


@dataclass(frozen=True)
class _Dense:
    """The dense network, judged."""

    metric: Metric
    kept: Kept
    identity: tuple[str, ...]
    seconds: float

    @staticmethod
    def judge(setup: Setup, report: Report) -> _Dense:
        bench = Bench.of(setup)
        began = time.monotonic()
        kept, digest = bench.judge_dense(report)
        seconds = time.monotonic() - began
        return _Dense(bench.metric, kept, bench.identity(digest), seconds)

    @property
    def figure(self) -> float:
        return self.kept.figure

    @property
    def samples(self) -> int:
        return len(self.kept.labels)

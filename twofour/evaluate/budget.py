"""Mixed precision: the fewest layers left float, so that the metric falls by at most so much.

    budget = Budget("model.onnx", "test.npz", BudgetOptions(max_drop=0.5, metric="top1"))
    mixed = budget.choose(quantize_with_report(model, samples))
    print(mixed.figures.drop, [each.layer for each in mixed.left])

Each layer is switched back to floats alone (`onnx_tools/revert.py`) and judged on all samples; the
errors that it adds, guessed on a few samples, say which come first. `core/budget.py` finds the set.
Networks are judged on ONNX Runtime, with Q/DQ pairs around float operators, which is what the file
means. With `cache` a search that was ended goes on where it stood, for what it asks for does not
depend on chance, nor on how many processes judge.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twofour.compiler.prunable import Network, digest
from twofour.core.budget import LEAST_EVALUATIONS, Choice, fewest
from twofour.core.data import DataLike
from twofour.core.errors import InputError
from twofour.core.progress import Report, Stage, unseen
from twofour.core.scan import Cache, Item, Processes, Result, Spread, Work, key_of, scan
from twofour.evaluate.guess import guess_errors
from twofour.evaluate.judging import Bench, Setup, lasting
from twofour.evaluate.metric import Kept
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.promises import carry, require_kept
from twofour.onnx_tools.quantize import Quantized
from twofour.onnx_tools.revert import Switch, float_switches, switched, with_biases_of

_FORMAT = 2  # of what a result means; part of a key
_FIGURES = ("figure", "drop", "drop_error", "seconds")


@dataclass(frozen=True)
class BudgetOptions:
    """What may be lost, and how it is judged.

    Attributes:
        max_drop: most that the metric may be worse than the float model's, in its own unit: points
            where it is percent.
        metric: one of `metrics.METRICS`, or module:function.
        output: that the metric reads; by default the first.
        evaluations: networks judged at most, besides the float one.
        samples: the first so many of the data; None for all.
        jobs: processes; each holds the models.
        cache: file that keeps results, and that a later search goes on from.
        spread: workers, instead of `jobs` processes: those of a cluster (`cluster.tasks`).
    """

    max_drop: float
    metric: str = "top1"
    output: str | None = None
    evaluations: int = 64
    samples: int | None = None
    jobs: int = 1
    cache: str | os.PathLike[str] | None = None
    spread: Spread | None = None

    def __post_init__(self) -> None:
        """Refuses what means nothing. Raises InputError."""
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            got = [f"expected a number of points, 0 or more, got {self.max_drop}"]
            raise InputError("bad drop that may be lost", got, "such as --max-drop 0.5")
        if self.evaluations < LEAST_EVALUATIONS or self.jobs < 1:
            found = f"got {self.evaluations} evaluations, {self.jobs} jobs"
            expected = f"expected at least {LEAST_EVALUATIONS} evaluations and 1 job, {found}"
            raise InputError("bad bounds of the search", [expected], "allow more")

    @property
    def workers(self) -> Spread:
        """Who judges."""
        return self.spread or Processes(self.jobs)


@dataclass(frozen=True)
class Left:
    """A layer that was judged.

    Attributes:
        layer: name of the node.
        op: its operator.
        gain: of the metric, by this layer alone being float; None where there was no evaluation
            for it.
        is_float: whether it is float in the result.
    """

    layer: str
    op: str
    gain: float | None
    is_float: bool


@dataclass(frozen=True)
class Figures:
    """What the metric says.

    Attributes:
        metric: its name.
        unit: "%" or "".
        higher_is_better: whether more is better.
        samples: judged.
        dense: of the float model.
        int8: with all layers quantized.
        mixed: with those left float.
        drop: by how much `mixed` is worse than `dense`.
        drop_error: its standard error; None for a metric of the user's own.
    """

    metric: str
    unit: str
    higher_is_better: bool
    samples: int
    dense: float
    int8: float
    mixed: float
    drop: float
    drop_error: float | None


@dataclass(frozen=True)
class Mixed:
    """A model within the budget, or, where there is none, the one with all layers float.

    Attributes:
        model: with Q/DQ pairs around the layers that are int8.
        holds: whether the drop is within the budget.
        max_drop: the budget.
        figures: what it costs.
        layers: those left float, then the others that were judged; the largest gain first.
        switches: how many there are to leave float, judged or not.
        evaluations: networks judged, besides the float one.
        notes: what the user should know.
    """

    model: Network
    holds: bool
    max_drop: float
    figures: Figures
    layers: tuple[Left, ...]
    switches: int
    evaluations: int
    notes: tuple[str, ...]

    @property
    def left(self) -> tuple[Left, ...]:
        """Those left float, the largest gain first."""
        return tuple(each for each in self.layers if each.is_float)


class Budget:
    """Searches; what does not fit is found at once, before a model is quantized for it.

    Args:
        model: the float file, which says what is lost.
        data: samples and labels to judge on.
        options: what may be lost.

    Raises:
        InputError: model, data and metric do not fit each other; the cache cannot be written.
        UnsupportedError: ONNX Runtime cannot run the model.
    """

    def __init__(
        self, model: str | os.PathLike[str], data: DataLike, options: BudgetOptions
    ) -> None:
        """Reads the model, and judges the first sample."""
        self._options = options
        self._cache = Cache.open(options.cache, _FIGURES)
        self._setup = Setup(
            Path(model),
            lasting(data),
            options.metric,
            options.output,
            options.samples,
            options.workers.threads,
        )
        Bench.of(self._setup).try_first()

    def choose(self, quantized: Quantized, stage: Stage = unseen) -> Mixed:
        """Leaves the fewest layers float.

        Args:
            quantized: of the float file.
            stage: shows the progress.

        Raises:
            InputError, UnsupportedError: as above.
            GateError: a weight lost the pattern that the float file promises.
        """
        bench = Bench.of(self._setup)
        with stage("the float network") as report:
            dense, samples = bench.judge_dense(report)
        _require_number(dense, bench.metric.name)
        variants = _Variants.of(quantized.model, quantized.floats)
        switches = variants.switches
        with stage("guessing") as report:
            guesses = guess_errors(quantized.model, tuple(switches.values()), bench.task, report)
        items = sorted(switches, key=lambda name: -guesses[switches[name]])
        kept = dense if bench.metric.resampled else None
        setup = replace(self._setup, dense=kept, figure=dense.figure)
        with tempfile.TemporaryDirectory(prefix="twofour-") as folder:
            start = functools.partial(_start, _Files.write(Path(folder), setup, quantized))
            identity = (*bench.identity(samples), digest(quantized.model))
            with stage("leaving layers float") as report:
                judge = _Judge(start, identity, self._cache, self._options, report)
                choice = fewest(items, judge, self._options.max_drop, self._options.evaluations)
        model = variants.model(choice.left)
        carry(bench.model, model)
        require_kept(model, "mixed precision")
        figures = _figures(bench, dense, judge.result(()), judge.result(choice.left))
        return Mixed(
            model,
            choice.holds,
            self._options.max_drop,
            figures,
            _layers(choice, switches),
            len(switches),
            choice.evaluations,
            (*self._cache.notes(), *variants.notes(choice.left)),
        )


@dataclass(frozen=True)
class _Variants:
    """A quantized model, and how to leave layers of it float.

    With layers left float all biases are those of the float model (see `with_biases_of`).
    """

    whole: Network
    uncorrected: Network
    corrected: int
    switches: Mapping[str, Switch]

    @classmethod
    def of(cls, model: Network, floats: Network) -> _Variants:
        uncorrected, corrected = with_biases_of(model, floats)
        switches = {each.layer: each for each in float_switches(model, floats)}
        return cls(model, uncorrected, corrected, switches)

    def model(self, names: Sequence[str]) -> Network:
        """With these layers float."""
        model = self.uncorrected if names else self.whole
        return switched(model, [self.switches[name] for name in names])

    def notes(self, names: Sequence[str]) -> Iterator[str]:
        """What the user should know where these layers are left float."""
        if names and self.corrected:
            yield (
                f"{self.corrected} biases are those of the float model again: their correction was "
                "made for all layers in int8"
            )


class _Judge:
    """Drops of sets of layers left float; remembers what was found."""

    def __init__(
        self,
        start: functools.partial[Work],
        identity: Sequence[str],
        cache: Cache,
        options: BudgetOptions,
        report: Report,
    ) -> None:
        self._start, self._identity, self._cache = start, identity, cache
        self._options, self._report = options, report
        self._done = 0

    def __call__(self, sets: Sequence[frozenset[str]]) -> list[float]:
        items = [self._item(each) for each in sets]

        def report(done: int, total: int | None, what: str) -> None:
            self._report(self._done + done, self._options.evaluations, what)

        workers = self._options.workers
        results = scan(items, self._start, self._cache, report=report, spread=workers)
        self._done += len(sets)
        return [math.inf if each["drop"] is None else each["drop"] for each in results]

    def result(self, names: Sequence[str]) -> Result:
        """Of a set that was judged."""
        return self._cache.results[self._item(frozenset(names)).key]

    def _item(self, names: frozenset[str]) -> Item:
        ordered = sorted(names)
        words = f"{len(names)} layers float" if len(names) != 1 else f"{ordered[0]} float"
        return Item(words, key_of(_FORMAT, *self._identity, *ordered), ordered)


@dataclass(frozen=True)
class _Files:
    """What a process reads."""

    setup: Setup
    model: Path
    floats: Path

    @classmethod
    def write(cls, folder: Path, setup: Setup, quantized: Quantized) -> _Files:
        model = save_model(quantized.model, folder / "quantized.onnx")
        return cls(setup, model, save_model(quantized.floats, folder / "floats.onnx"))


def _start(files: _Files) -> Work:
    """The function of a scan: names of layers to leave float -> what the network is worth."""
    variants = _Variants.of(load_model(files.model), load_model(files.floats))
    return functools.partial(_work, Bench.of(files.setup), variants)


def _work(bench: Bench, variants: _Variants, names: Sequence[str]) -> Result:
    began, setup, metric = time.monotonic(), bench.setup, bench.metric
    kept = bench.judge(variants.model(names))
    error = metric.error(setup.dense, kept) if setup.dense else None
    drop = 0.0 - metric.gain(setup.figure, kept.figure)  # 0, not -0
    figures = (kept.figure, drop, error, time.monotonic() - began)
    known = (None if each is None or not math.isfinite(each) else each for each in figures)
    return dict(zip(_FIGURES, known, strict=True))


def _require_number(dense: Kept, metric: str) -> None:
    if not math.isfinite(dense.figure):
        raise InputError(
            f"metric {metric} gives no number of the float model",
            [f"got {dense.figure} on {len(dense.labels)} samples"],
            "choose another metric, or more samples",
        )


def _figures(bench: Bench, dense: Kept, int8: Result, mixed: Result) -> Figures:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    metric = bench.metric
    return Figures(
        metric.name,
        metric.unit,
        metric.higher_is_better,
        len(dense.labels),
        dense.figure,
        number(int8["figure"]),
        number(mixed["figure"]),
        number(mixed["drop"]),
        mixed["drop_error"],
    )


def _layers(choice: Choice, switches: Mapping[str, Switch]) -> tuple[Left, ...]:
    """Those left float first."""
    judged = sorted(choice.gains, key=lambda name: -choice.gains[name])
    names = dict.fromkeys((*choice.left, *judged))
    return tuple(
        Left(name, switches[name].op, choice.gains.get(name), name in choice.left) for name in names
    )

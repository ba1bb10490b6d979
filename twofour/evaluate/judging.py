"""A model with some of its weights pruned, judged by a metric: in this process or another."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from twofour.compiler.prunable import Network, digest, prune_only, read_network
from twofour.core.data import Data, DataLike, as_data, import_function
from twofour.core.errors import InputError
from twofour.core.progress import Report, silent
from twofour.core.scan import Result, Work
from twofour.core.sensitivity import judged
from twofour.evaluate.feeding import MOST, model_predictor
from twofour.evaluate.judge import Task
from twofour.evaluate.metric import Kept, Metric, Scorer
from twofour.evaluate.metrics import find_metric
from twofour.onnx_tools.reference import Reference


@dataclass(frozen=True)
class Setup:
    """What a process needs.

    Attributes:
        model: the file.
        data: the samples.
        metric: its name, or module:function.
        output: that the metric reads; by default the first.
        samples: the first so many; None for all.
        threads: of ONNX Runtime.
        dense: what the metric keeps of the dense network; None if that tells no error.
        figure: the metric of the dense network.
    """

    model: Path
    data: DataLike
    metric: str
    output: str | None
    samples: int | None
    threads: int
    dense: Kept | None = None
    figure: float = 0.0


@dataclass(frozen=True)
class Bench:
    """The model and its task, ready to judge variants.

    Attributes:
        setup: what it was made of.
        model: without functions.
        metric: that judges.
        task: the samples.
    """

    setup: Setup
    model: Network
    metric: Metric
    task: Task = field(repr=False)

    @staticmethod
    def of(setup: Setup) -> Bench:
        """Reads the file, and opens the data.

        Raises:
            InputError: the model or the data cannot be read, or an unknown metric or output.
            UnsupportedError: ONNX Runtime cannot run the model.
        """
        metric = find_metric(setup.metric)
        model = read_network(setup.model)
        dense = Reference(model, threads=setup.threads, optimized=True)
        output = setup.output or dense.outputs[0]
        if output not in dense.outputs:
            raise InputError(f"no output {output!r}", [f"the model has {', '.join(dense.outputs)}"])
        data = as_data(setup.data, [each.name for each in dense.inputs])
        task = Task(data, dense.inputs, MOST, setup.samples, metric, output)
        return Bench(setup, model, metric, task)

    def try_first(self) -> dict[str, tuple[int, ...]]:
        """Runs the first sample, without a figure: of one sample many metrics have none.

        Returns:
            The shapes of the run's inputs.

        Raises:
            InputError: the data does not fit the model or the metric, or has no labels.
        """
        predict = model_predictor(Reference(self.model, threads=1, optimized=True))
        run = next(self.task.runs(1))
        Scorer(self.metric, self.task.output).add(predict(run), run.batch)
        return {name: array.shape for name, array in run.feeds.items()}

    def judge_dense(self, report: Report) -> tuple[Kept, str]:
        """The metric of the model as it is, and the hash of the samples."""
        seen = hashlib.sha256()
        return self.judge(self.model, report, seen.update), seen.hexdigest()

    def judge(
        self,
        model: Network,
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

    def identity(self, samples: str) -> tuple[str, ...]:
        """What every result depends on, beside the weights; `samples` is their hash."""
        metric = self.metric.name
        return digest(self.model), samples, metric, _source(metric), self.task.output

    def work(self, argument: tuple[Sequence[str], str]) -> Result:
        """Judges the model with these weights pruned to a pattern, and no others."""
        began = time.monotonic()
        pruned, energy_kept = prune_only(self.model, *argument)
        kept, setup = self.judge(pruned), self.setup
        error = self.metric.error(setup.dense, kept) if setup.dense else None
        drop = self.metric.gain(kept.figure, setup.figure)
        return judged(energy_kept, kept.figure, drop, error, time.monotonic() - began)


def start(setup: Setup) -> Work:
    """The function of a scan: see `core/scan.py`."""
    return Bench.of(setup).work


def lasting(data: DataLike) -> DataLike:
    """Data that can be gone through again: batches of a generator are kept.

    What names a file becomes a path: workers on other machines are sent what a path names.
    """
    if isinstance(data, str) and Path(data).exists():
        return Path(data)
    if isinstance(data, (str, PathLike, Mapping, Sequence, Data)):
        return data
    return list(data)


def _source(metric: str) -> str:
    """The hash of the file of a metric of the user's own."""
    if ":" not in metric:
        return ""
    path = inspect.getsourcefile(import_function(metric, "metric", ""))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""

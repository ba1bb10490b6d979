"""One pass over the data: how far a network's outputs lie from another's, and how well both do.

Memory holds one batch of outputs, and what the metric keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from twofour.core.data import Data
from twofour.core.errors import InputError
from twofour.core.feeds import Form, Run, runs
from twofour.core.progress import Report, silent
from twofour.evaluate.differences import Array, Difference, Sums
from twofour.evaluate.feeding import Predictor
from twofour.evaluate.metric import Kept, Metric, Scorer


@dataclass(frozen=True)
class Task:
    """What networks are judged by.

    Attributes:
        data: the samples, and labels if there is a metric.
        forms: of the engine's inputs.
        most: samples in a run.
        samples: the first so many; None for all.
        metric: how well a network does; None to compare outputs only.
        output: that the metric reads.
        chosen: outputs with as many rows as were chosen while running: they have no difference.
    """

    data: Data
    forms: tuple[Form, ...]
    most: int
    samples: int | None = None
    metric: Metric | None = None
    output: str = ""
    chosen: frozenset[str] = frozenset()

    @property
    def total(self) -> int | None:
        """How many samples there will be; None where only reading them would tell."""
        if self.data.count is None or self.samples is None:
            return self.data.count
        return min(self.data.count, self.samples)

    def runs(self, limit: int | None = None) -> Iterator[Run]:
        """Goes through the samples, or the first `limit` of them.

        Raises:
            InputError: the data does not fit.
        """
        limits = [each for each in (self.samples, limit) if each is not None]
        return runs(self.data, self.forms, self.most, min(limits, default=None))


@dataclass(frozen=True)
class Judgement:
    """What one pass found.

    Attributes:
        samples: how many were judged.
        outputs: the difference of each output.
        reference: what the metric says of the reference; None without a metric.
        engine: of the other.
    """

    samples: int
    outputs: tuple[Difference, ...]
    reference: Kept | None
    engine: Kept | None


def judge(
    task: Task, expected: Predictor, got: Predictor, report: Report = silent, what: str = ""
) -> Judgement:
    """Runs both networks on the same batches.

    Args:
        task: the data and the metric.
        expected: the reference.
        got: what is judged.
        report: told the samples done.
        what: is being done, for the progress.

    Raises:
        InputError: the data does not fit a network, or outputs and labels do not fit the metric.
    """
    sums: dict[str, Sums] = {}
    scorers = [Scorer(task.metric, task.output) for _ in range(2)] if task.metric else []
    samples = 0
    for run in task.runs():
        pair, batch = (expected(run), got(run)), run.batch
        for name, array in pair[0].items():
            if name in task.chosen:
                continue
            _require_numbers(name, array)
            sums.setdefault(name, Sums(name)).add(array, pair[1][name], batch.start)
        for scorer, outputs in zip(scorers, pair, strict=False):
            scorer.add(outputs, batch)
        samples = batch.start + len(batch)
        report(samples, task.total, what)
    figures = tuple(each.result() for each in sums.values())
    reference, engine = [scorer.result() for scorer in scorers] if scorers else (None, None)
    return Judgement(samples, figures, reference, engine)


def _require_numbers(name: str, array: Array) -> None:
    if getattr(array, "dtype", None) is None or array.dtype.kind not in "biuf":
        found = getattr(array, "dtype", type(array).__name__)
        raise InputError(f"output {name!r} cannot be compared", [f"expected numbers, got {found}"])

"""How far a network's outputs lie from the float model's, beside what the metric says of it.

A metric of some hundred samples says little of one layer: one sample more or less is all that
changes. So every network is also given an error, which is smooth, and near the float model the sum
of the errors of its layers:

    classifiers    mean over the samples of KL(softmax of the float model || softmax)
    others         sum of squared differences over the sum of squares of the float model's outputs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from twofour.core.errors import InputError
from twofour.core.progress import Report, silent
from twofour.evaluate.feeding import Array, Predictor
from twofour.evaluate.judge import Task
from twofour.evaluate.metric import Kept, Scorer
from twofour.evaluate.metrics import METRICS

_CLASSIFIERS = ("top1", "top5", "f1", "loss")
_MOST_BYTES = 1 << 28
_LEAST = 1e-12  # of a probability


@dataclass(frozen=True)
class Judged:
    """What one pass found.

    Attributes:
        kept: what the metric needs.
        error: as the module says; not finite where an output is not.
    """

    kept: Kept
    error: float


@dataclass
class Expected:
    """The float model's outputs of the first samples, as far as they fit the memory.

    Attributes:
        names: of the outputs that are compared.
        classes: whether the first of them has scores of classes along axis 1.
    """

    names: tuple[str, ...]
    classes: bool
    _parts: dict[int, dict[str, Array]] = field(default_factory=dict)
    _bytes: int = 0
    _end: int = 0

    @staticmethod
    def of(
        task: Task, predict: Predictor, seen: Callable[[bytes], None] = lambda content: None
    ) -> tuple[Expected, Kept]:
        """One pass of the float model, and what the metric needs of it; `seen` gets the samples.

        Raises:
            InputError: data, outputs and metric do not fit each other.
        """
        metric = task.metric
        assert metric is not None
        known, scorer = metric.name in METRICS, Scorer(metric, task.output)
        classes = metric.name in _CLASSIFIERS
        expected: Expected | None = None
        for run in task.runs():
            outputs = predict(run)
            if expected is None:
                floats = tuple(n for n, array in outputs.items() if array.dtype.kind == "f")
                names = (task.output,) if known else floats
                if not set(names) & set(floats):
                    raise InputError("no output is of floats", [f"outputs: {', '.join(outputs)}"])
                expected = Expected(names, classes)
            expected._keep(outputs, run.batch.start)
            scorer.add(outputs, run.batch)
            for name, array in sorted(run.batch.inputs.items()):
                seen(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
            if run.batch.labels is not None:
                seen(f"labels {run.batch.labels.dtype}".encode() + run.batch.labels.tobytes())
        assert expected is not None
        return expected, scorer.result()

    def _keep(self, outputs: Mapping[str, Array], start: int) -> None:
        part = {name: np.asarray(outputs[name], np.float32) for name in self.names}
        self._bytes += sum(array.nbytes for array in part.values())
        if start == self._end and (self._bytes <= _MOST_BYTES or not self._parts):
            self._parts[start] = part
            self._end = start + len(part[self.names[0]])

    def against(self, outputs: Mapping[str, Array], start: int) -> tuple[float, float]:
        """The sum of errors of some samples, and what it is to be divided by."""
        name = self.names[0]
        stop = min(start + len(outputs[name]), self._end)
        if stop <= start:
            return 0.0, 0.0
        expected = self._rows(start, stop)
        got = {name: outputs[name][: stop - start].astype(np.float64) for name in self.names}
        if self.classes:
            return _divergence(expected[name], got[name]), float(stop - start)
        pairs = [(expected[name].astype(np.float64), got[name]) for name in self.names]
        energy = sum(float(np.vdot(e, e)) for e, _ in pairs)
        return sum(float(np.vdot(e - g, e - g)) for e, g in pairs), energy

    def _rows(self, start: int, stop: int) -> dict[str, Array]:
        """Of a network that may be run with other batches."""
        parts = [
            {name: array[max(start - at, 0) : stop - at] for name, array in part.items()}
            for at, part in self._parts.items()
            if at < stop and at + len(part[self.names[0]]) > start
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.names}


def judge(
    task: Task, predict: Predictor, expected: Expected, report: Report = silent, what: str = ""
) -> Judged:
    """One pass of a network over the samples."""
    assert task.metric is not None
    scorer, error, whole = Scorer(task.metric, task.output), 0.0, 0.0
    for run in task.runs():
        outputs = predict(run)
        scorer.add(outputs, run.batch)
        part = expected.against(outputs, run.batch.start)
        error, whole = error + part[0], whole + part[1]
        report(run.batch.start + len(run.batch), task.total, what)
    return Judged(scorer.result(), _not_negative(error / whole if whole else error))


def _not_negative(error: float) -> float:
    """What rounding makes of 0 may lie below it; what is no number stays so."""
    return 0.0 if error < 0 else error


def _divergence(expected: Array, got: Array) -> float:
    """The sum over samples of KL(p || q), the mean over what is beside the classes."""
    p, q = _probabilities(expected.astype(np.float64)), _probabilities(got)
    each = (p * (np.log(np.maximum(p, _LEAST)) - np.log(np.maximum(q, _LEAST)))).sum(1)
    return float(each.reshape(len(each), -1).mean(1).sum())


def _probabilities(scores: Array) -> Array:
    """Softmax along axis 1, unless that is what the network gives."""
    if scores.min() >= 0 and np.abs(scores.sum(1) - 1).max() < 1e-3:
        return scores
    powers = np.exp(scores - scores.max(1, keepdims=True))
    found: Array = powers / powers.sum(1, keepdims=True)
    return found

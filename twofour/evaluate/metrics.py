"""How well a network does its task: a small list of metrics, and any other as `module:function`.

    top1, top5      percent of samples (or pixels) whose label has the largest, one of the five
                    largest, scores
    f1              percent; of class 1 where there are two classes (as GLUE has it), else the mean
                    over the classes that occur (macro)
    loss            mean cross entropy of the labels under the softmax of the scores; less is better
    spearman        rank correlation of one score a sample with the labels, -1 to 1
    pearson         correlation of the same, -1 to 1
    mse, mae        mean squared, mean absolute difference from the labels; less is better

A function of one's own gets the outputs of all samples and the labels, and returns a number of
which more is better (or, where it says so, less):

    def sts(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
        a, b = outputs["embedding"][0::2], outputs["embedding"][1::2]    # sentences come in pairs
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return float(scipy.stats.spearmanr(cosine, labels[0::2])[0])

    sts.group = 2

`group` is how many neighbouring samples belong together, 1 where each stands for itself: it says
that groups may be drawn anew to tell what is chance. Without it the figure has no interval. With a
third parameter the function gets the inputs, too. `sts.lower_is_better = True` turns it around.
The metrics of the list keep a few numbers a sample; a function's outputs (and inputs) are all kept
in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from twofour.core.correlation import pearson, spearman
from twofour.core.data import Batch, import_function
from twofour.core.errors import InputError
from twofour.evaluate.metric import Array, Metric, Rows

_FIX = "name a function (outputs: dict, labels: array) -> float"
_FIX_GROUP = "set it to 1 where each sample stands for itself, or leave it out"


def find_metric(name: str) -> Metric:
    """A metric by its name, or the user's own.

    Raises:
        InputError: there is none of this name.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise InputError(
            f"no metric {name!r}",
            [f"expected one of {', '.join(METRICS)}, or module:function"],
            "choose one, or write a function (outputs, labels) -> float",
        )
    return _own(name, import_function(name, "metric", _FIX))


def _scores(outputs: Rows, output: str, batch: Batch) -> tuple[Array, Array]:
    """Scores [n, classes, ...] and whole labels [n, ...] of a classifier."""
    scores, labels = outputs[output], np.asarray(batch.labels)
    if scores.ndim < 2 or scores.shape[1] < 2 or labels.dtype.kind not in "iub":
        raise _mismatch(output, "scores [n, classes], whole numbers as labels", scores, labels)
    if labels.ndim == scores.ndim and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(scores), *scores.shape[2:]):
        raise _mismatch(output, "one label for each row of scores", scores, labels)
    return scores, labels


def _values(outputs: Rows, output: str, batch: Batch) -> tuple[Array, Array]:
    """Values and labels of the same shape [n, ...], as float64."""
    values, labels = outputs[output].astype(np.float64), np.asarray(batch.labels)
    if labels.dtype.kind not in "iufb" or labels.size != values.size:
        raise _mismatch(output, "a label for each value", values, labels)
    return values, labels.reshape(values.shape).astype(np.float64)


def _top(k: int) -> Callable[[Rows, str, Batch], dict[str, Array]]:
    """Which samples are right: fewer than k others score higher; a tie goes to the lower class."""

    def rows(outputs: Rows, output: str, batch: Batch) -> dict[str, Array]:
        scores, labels = _scores(outputs, output, batch)
        _require_classes(output, scores, labels)
        own = np.take_along_axis(scores, labels[:, None].astype(np.int64), 1)
        before = np.arange(scores.shape[1]).reshape(1, -1, *[1] * (scores.ndim - 2))
        ahead = (scores > own) | ((scores == own) & (before < labels[:, None]))
        right = (ahead.sum(1) < k) & ~np.isnan(scores).any(1)
        return {"right": right}

    return rows


def _losses(outputs: Rows, output: str, batch: Batch) -> dict[str, Array]:
    scores, labels = _scores(outputs, output, batch)
    _require_classes(output, scores, labels)
    scores = scores.astype(np.float64)
    scores = scores - scores.max(1, keepdims=True)
    own = np.take_along_axis(scores, labels[:, None].astype(np.int64), 1)[:, 0]
    error = np.log(np.exp(scores).sum(1)) - own
    return {"error": error.reshape(len(error), -1).mean(axis=1)}


def _require_classes(output: str, scores: Array, labels: Array) -> None:
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        found = [f"labels {labels.min()} to {labels.max()}, {scores.shape[1]} classes"]
        raise InputError(f"labels are no classes of output {output!r}", found)


def _predictions(outputs: Rows, output: str, batch: Batch) -> dict[str, Array]:
    scores, _ = _scores(outputs, output, batch)
    found = np.where(np.isnan(scores).any(1), -1, scores.argmax(1))
    return {"class": found, "classes": np.full(len(scores), scores.shape[1])}


def _f1(rows: Rows, labels: Array) -> float:
    found = rows["class"].reshape(-1)
    labels = labels.reshape(-1)
    classes = np.unique(np.concatenate([labels, found[found >= 0]]))
    if rows["classes"].max() == 2:
        classes = np.array([1])
    figures = []
    for each in classes:
        hits = int(((found == each) & (labels == each)).sum())
        both = int((found == each).sum() + (labels == each).sum())
        figures.append(2 * hits / both if both else 0.0)
    return 100 * float(np.mean(figures))


def _pairs(outputs: Rows, output: str, batch: Batch) -> dict[str, Array]:
    values, labels = _values(outputs, output, batch)
    if values.size != len(values):
        raise _mismatch(output, "one score a sample", values, labels)
    return {"score": values.reshape(-1)}


def _pearson(rows: Rows, labels: Array) -> float:
    return pearson(rows["score"], labels.reshape(-1).astype(np.float64))


def _spearman(rows: Rows, labels: Array) -> float:
    return spearman(rows["score"], labels.reshape(-1))


def _errors(power: int) -> Callable[[Rows, str, Batch], dict[str, Array]]:
    def rows(outputs: Rows, output: str, batch: Batch) -> dict[str, Array]:
        values, labels = _values(outputs, output, batch)
        error = np.abs(values - labels) ** power
        return {"error": error.reshape(len(error), -1).mean(axis=1)}

    return rows


def _flipped(rows: Rows, labels: Array) -> tuple[Rows, Rows, Array] | None:
    """Of samples that are right or wrong."""
    if rows["right"].ndim > 1:
        return None
    right = np.array([True, False])
    return {"right": right}, {"right": ~right}, labels[[0, 0]]


def _swapped(rows: Rows, labels: Array) -> tuple[Rows, Rows, Array] | None:
    """Of samples that have a class: one of the class whose F1 a single sample moves most."""
    if rows["class"].ndim > 1:
        return None
    flat, several = labels.reshape(-1), rows["classes"][[0, 0]]
    classes, counts = np.unique(flat, return_counts=True)
    rarest = 1 if several[0] == 2 and 1 in classes else classes[counts.argmin()]
    own, other = int(rarest), int((rarest + 1) % several[0])
    index = int(np.flatnonzero(flat == rarest)[0])
    one, another = np.array([own, other]), np.array([other, own])
    return (
        {"class": one, "classes": several},
        {"class": another, "classes": several},
        labels[[index, index]],
    )


def _share(rows: Rows, labels: Array) -> float:
    return 100 * float(rows["right"].mean())


def _mean(rows: Rows, labels: Array) -> float:
    return float(rows["error"].mean())


def _own(name: str, function: Callable[..., Any]) -> Metric:
    """A metric of the user's own; its inputs are told from its outputs by a prefix."""
    with_inputs = len(inspect.signature(function).parameters) > 2

    def rows(outputs: Rows, output: str, batch: Batch) -> dict[str, Array]:
        kept = {f"output {key}": array for key, array in outputs.items()}
        inputs = batch.inputs if with_inputs else {}
        return kept | {f"input {key}": array for key, array in inputs.items()}

    def score(rows: Rows, labels: Array) -> float:
        outputs = {k.removeprefix("output "): v for k, v in rows.items() if k[0] == "o"}
        inputs = {k.removeprefix("input "): v for k, v in rows.items() if k[0] == "i"}
        found = function(outputs, labels, inputs) if with_inputs else function(outputs, labels)
        if not isinstance(found, (int, float, np.number)):
            got = [f"expected a number, got {type(found).__name__}"]
            raise InputError(f"metric {name} returned no number", got, _FIX)
        return float(found)

    less, group = getattr(function, "lower_is_better", False), getattr(function, "group", 0)
    if type(group) is not int or group < 0:
        got = [f"expected a whole number of samples that belong together, got {group!r}"]
        raise InputError(f"metric {name} has an attribute 'group' that is none", got, _FIX_GROUP)
    return Metric(name, rows, score, not less, group=group, slow=True)


def _mismatch(output: str, expected: str, values: Array, labels: Array) -> InputError:
    got = f"got {values.dtype} {list(values.shape)} and labels {labels.dtype} {list(labels.shape)}"
    return InputError(
        f"output {output!r} and the labels do not match the metric",
        [f"expected {expected}", got],
        "choose another output or metric, or write one: --metric module:function",
    )


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", _top(1), _share, unit="%", unseen=_flipped),
        Metric("top5", _top(5), _share, unit="%", unseen=_flipped),
        Metric("f1", _predictions, _f1, unit="%", unseen=_swapped),
        Metric("loss", _losses, _mean, higher_is_better=False),
        Metric("spearman", _pairs, _spearman),
        Metric("pearson", _pairs, _pearson),
        Metric("mse", _errors(2), _mean, higher_is_better=False),
        Metric("mae", _errors(1), _mean, higher_is_better=False),
    )
}

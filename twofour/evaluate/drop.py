"""How much worse a network is than another on the same samples, and how sure that is.

    drop = drop_of(METRICS["top1"], baseline, candidate, 0.95)
    drop.value, drop.low, drop.high        # points; with 95 % confidence not less, not more

A paired bootstrap: samples are drawn anew, the same for both networks, so that what is hard for
both cancels (Efron and Tibshirani, "An introduction to the bootstrap", 1993). Two things that a
bare bootstrap gets wrong where samples are few are put right:

    its spread is too small by sqrt((n - 1) / n), and its ends are those of the normal
    distribution where Student's are due: both widen the interval

    networks that are right on the same samples seem never to differ, however few the samples are.
    So one sample that only the first gets right and one that only the second gets right are added
    before drawing (Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data"): on n samples without a difference the drop may be
    about 2.3 / n, not 0. It is 0 if the outputs were the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from twofour.core.errors import GateError, InputError
from twofour.core.interval import Interval, student_quantile
from twofour.evaluate.metric import Array, Kept, Metric

LEAST_SAMPLES = 30
"""Of fewer, or of fewer groups of them, a bootstrap says nothing."""
_DRAWS, _LEAST_BEYOND = 1000, 10
_MOST_LOST = 0.01  # share of draws on which the metric may have no value


def drop_of(metric: Metric, before: Kept, after: Kept, confidence: float) -> Interval:
    """By how much `after` is worse than `before`.

    Args:
        metric: that both were judged by.
        before: of the baseline.
        after: of the candidate, on the same samples in the same order.
        confidence: of each end, 0.5 to below 1.

    Returns:
        In the metric's own unit, below 0 for a gain. Without ends where the metric cannot be
        resampled; with infinite ones where the samples are too few to tell.

    Raises:
        InputError: the samples are not the same, or the baseline's figure is no number.
        GateError: the candidate's figure is no number.
    """
    _require_same_samples(before, after)
    _require_numbers(metric, before.figure, after.figure)
    value = -metric.gain(before.figure, after.figure)
    if before.outputs_sha256 and before.outputs_sha256 == after.outputs_sha256:
        return Interval(value, value, value)
    if not metric.resampled:
        return Interval(value)
    if metric.groups(before) < LEAST_SAMPLES:
        return Interval(value, -math.inf, math.inf)
    low, high = _ends(metric, *_with_unseen(metric, before, after), confidence)
    return Interval(value, min(low, value), max(high, value))


def _ends(metric: Metric, before: Kept, after: Kept, confidence: float) -> tuple[float, float]:
    """Of the drop; infinite where too many draws have none."""
    count = metric.groups(before)
    center = -metric.gain(before.figure, after.figure)
    drops = -metric.drawn_gains(before, after, metric.draws(before, _DRAWS))
    known = drops[np.isfinite(drops)]
    if len(known) < (1 - _MOST_LOST) * len(drops) or not math.isfinite(center):
        return -math.inf, math.inf
    student, normal = student_quantile(confidence, count - 1), NormalDist().inv_cdf(confidence)
    wider = math.sqrt(count / (count - 1))
    if (1 - confidence) * len(known) < _LEAST_BEYOND:  # too few draws lie beyond the ends
        reach = student * wider * float(np.std(known))
        return center - reach, center + reach
    wider *= student / normal if normal > 0 else 1.0
    low, high = (float(q) for q in np.quantile(known, [1 - confidence, confidence]))
    return center + wider * (low - center), center + wider * (high - center)


def _with_unseen(metric: Metric, before: Kept, after: Kept) -> tuple[Kept, Kept]:
    """Two samples more, on which the networks differ, if their rows are right and wrong alone."""
    found = metric.unseen(before.rows, before.labels)
    if found is None:
        return before, after
    one, other, labels = found
    return _longer(metric, before, one, labels), _longer(metric, after, other, labels)


def _longer(metric: Metric, kept: Kept, rows: Mapping[str, Array], labels: Array) -> Kept:
    joined = {name: np.concatenate([array, rows[name]]) for name, array in kept.rows.items()}
    every = np.concatenate([kept.labels, labels])
    return replace(kept, rows=joined, labels=every, figure=float(metric.score(joined, every)))


def _require_same_samples(before: Kept, after: Kept) -> None:
    shapes = [list(each.labels.shape) for each in (before, after)]
    if shapes[0] == shapes[1] and np.array_equal(before.labels, after.labels):
        return
    found = f"labels {shapes[0]} and {shapes[1]}" if shapes[0] != shapes[1] else "other labels"
    raise InputError(
        "baseline and candidate were judged on different samples",
        ["expected the same samples in the same order", f"got {found}"],
        "evaluate both on the same data",
    )


def _require_numbers(metric: Metric, before: float, after: float) -> None:
    if not math.isfinite(before):
        raise InputError(
            f"the baseline's {metric.name} is no number",
            [f"expected a finite figure to compare with, got {before}"],
            "choose another metric, or a baseline that works: twofour compare finds what is wrong",
        )
    if not math.isfinite(after):
        raise GateError(
            f"the candidate's {metric.name} is no number",
            [f"the baseline has {before:.6g}, the candidate {after}"],
            "its outputs overflow or are undefined: twofour compare --layers finds where",
        )

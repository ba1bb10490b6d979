"""The end of a search: the best engines side by side, and the answer on samples it never saw.

Of many engines that were each run once, the fastest is also the luckiest. So those that could be
the answer run once more, all in turns. Likewise the metric: where there are more samples than the
search used, the answer is judged on the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from twofour.bench.declared import random_feeds
from twofour.bench.timing import Schedule, race
from twofour.bench.versus import ours
from twofour.core.progress import Report, Stage
from twofour.core.scan import Item, Result, key_of, scan
from twofour.evaluate.feeding import Predictor, engine_predictor, model_predictor
from twofour.evaluate.judge import Task
from twofour.evaluate.metric import Kept, Scorer
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session
from twofour.search.harms import FORMAT, line
from twofour.search.points import Assignment, Point, Workshop, engine_task, speeds

SCHEDULE = Schedule(duration_s=3.0, min_rounds=25)
_CLOSE = 1.03  # times as long as the best: what one race may have got wrong
_MOST = 4


@dataclass(frozen=True)
class Unseen:
    """The answer on samples that the search did not use.

    Attributes:
        samples: how many.
        dense: the metric of the float model.
        figure: of the answer.
        drop: by how much that is worse; None where it is no number.
        drop_error: its standard error; None for a metric of the user's own.
    """

    samples: int
    dense: float | None
    figure: float | None
    drop: float | None
    drop_error: float | None


def heat(workshop: Workshop, points: Sequence[Point], stage: Stage) -> dict[Assignment, Point]:
    """Runs the fastest of these points in turns once more, with the float32 engine.

    Args:
        workshop: that built them.
        points: that could be the answer.
        stage: shows the progress.

    Returns:
        Those that ran, with the latency of this race.
    """
    fast = sorted(points, key=lambda point: point.latency_us)
    close = [p for p in fast[:_MOST] if p.latency_us <= _CLOSE * fast[0].latency_us]
    if len(close) < 2:
        return {}
    words = [workshop.words(point.choices) for point in close]
    everything = [word for each in words for word in each]
    items = [
        Item(
            f"side by side: {point.name}",
            key_of(FORMAT, *workshop.identity, "side by side", *own, "of", *everything),
            index,
        )
        for index, (point, own) in enumerate(zip(close, words, strict=True))
    ]
    if any(item.key not in workshop.cache.results for item in items):
        with stage("the best side by side") as report:
            raced = _raced(workshop, close, report)
        scan(items, lambda: lambda index: raced[index], workshop.cache)
    reference_us = workshop.reference_us(stage)
    found = {}
    for point, item in zip(close, items, strict=True):
        result = workshop.cache.results[item.key]
        speed, low, high = (result[n] or 1.0 for n in ("speed", "speed_low", "speed_high"))
        found[point.choices] = replace(
            point, latency_us=reference_us / speed, speed=(speed, low, high)
        )
    return found


def _raced(workshop: Workshop, points: Sequence[Point], report: Report) -> list[Result]:
    began = time.monotonic()
    with ExitStack() as held:
        contestants = []
        for point in points:
            engine = workshop.engine(point.choices, report)
            session = held.enter_context(Session(engine, workshop.build.threads))
            contestants.append(ours(session, random_feeds(engine.plan.inputs)))
        every = [*contestants, workshop.base(report)]
        times = race(every, SCHEDULE, lambda done, total: report(done, total, "running"))
    seconds = time.monotonic() - began
    return [line(seconds, **speeds(own, times[-1])) for own in times[:-1]]


def on_unseen(workshop: Workshop, answer: Point, stage: Stage) -> Unseen | None:
    """Judges the answer on the samples behind those of the search; None where there are none.

    Args:
        workshop: that built it.
        answer: of the search.
        stage: shows the progress.
    """
    used, data = workshop.bench.task.samples, workshop.bench.task.data
    if used is None or (data.count is not None and data.count <= used):
        return None
    words = workshop.words(answer.choices)
    item = Item("unseen samples", key_of(FORMAT, *workshop.identity, "unseen", *words), None)
    if item.key not in workshop.cache.results:
        with stage("samples that the search did not use") as report:
            result = _judged(workshop, answer, used, report)
        scan([item], lambda: lambda _: result, workshop.cache)
    found = workshop.cache.results[item.key]
    if not found["samples"]:
        return None
    figures = (found[n] for n in ("dense", "figure", "drop", "drop_error"))
    return Unseen(int(found["samples"]), *figures)


def _judged(workshop: Workshop, answer: Point, used: int, report: Report) -> Result:
    began, bench = time.monotonic(), workshop.bench
    whole = replace(bench.task, samples=None)
    reference = Reference(bench.model, threads=bench.setup.threads, optimized=True)
    engine = workshop.engine(answer.choices, report)
    with Session(engine, workshop.build.threads) as session:
        rest = _rest(engine_task(whole, engine.plan), engine_predictor(session), used, report)
    dense = _rest(whole, model_predictor(reference), used, report)
    if rest is None or dense is None:
        return line(time.monotonic() - began, samples=0)
    metric = bench.metric
    return line(
        time.monotonic() - began,
        samples=len(rest.labels),
        dense=dense.figure,
        figure=rest.figure,
        drop=0.0 - metric.gain(dense.figure, rest.figure),
        drop_error=metric.error(dense, rest),
    )


def _rest(task: Task, predict: Predictor, used: int, report: Report) -> Kept | None:
    """What the metric needs of the samples behind the first `used`."""
    assert task.metric is not None
    scorer = Scorer(task.metric, task.output)
    for run in task.runs():
        scorer.add(predict(run), run.batch)
        report(run.batch.start + len(run.batch), task.total, "judging")
    kept = scorer.result()
    if len(kept.labels) <= used:
        return None
    rows, labels = {k: v[used:] for k, v in kept.rows.items()}, kept.labels[used:]
    return Kept(rows, labels, float(task.metric.score(rows, labels)))

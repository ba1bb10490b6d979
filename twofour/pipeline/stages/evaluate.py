"""evaluate: an engine judged on all samples, and what the metric keeps of each of them.

The rows are what the gate draws from anew; they are an .npz without pickle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twofour.core.data import as_data
from twofour.core.errors import InputError
from twofour.core.outcome import Figure
from twofour.core.records import to_plain
from twofour.core.target import missing_features
from twofour.engine import Engine
from twofour.evaluate.drop import LEAST_SAMPLES
from twofour.evaluate.feeding import engine_forms, engine_predictor
from twofour.evaluate.judge import Task as Judging
from twofour.evaluate.judging import Bench, Setup
from twofour.evaluate.metric import Kept, Metric, Scorer
from twofour.evaluate.metrics import find_metric
from twofour.pipeline.arrays import Array, load_arrays, save_arrays
from twofour.pipeline.networks import BASELINE, CANDIDATE
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import From, Input, Made, Output, Stage, Task
from twofour.pipeline.stages.build import BuildItem, build_items
from twofour.pipeline.stages.metric import metric_inputs, metric_settings
from twofour.runtime.session import Session

ROWS = "rows.npz"
USUAL_CONFIDENCE = 0.95
_DRAWS = 400
_ROW, _LABELS, _FIGURE, _SHA = "row ", "labels", "figure", "outputs_sha256"


def stage_of(item: BuildItem) -> str:
    """The name of the stage that judges an engine."""
    return f"evaluate {item.name}"


def evaluate_stages(file: RecipeFile) -> list[Stage]:
    """One for each engine; none without data to judge on."""
    if file.recipe.data.evaluate is None:
        return []
    items = build_items(file.recipe)
    peers = [_peer(file, item) for item in items if _has_peer(file, item)]
    return [*(_stage(file, item) for item in items), *peers]


def peer_stage(item: BuildItem) -> str:
    """The name of the stage that judges ONNX Runtime on the file of an engine."""
    return f"evaluate onnxruntime {item.network.name}"


def _has_peer(file: RecipeFile, item: BuildItem) -> bool:
    """Whether ONNX Runtime takes part with its file; then its outputs are judged, too."""
    ours = item.network.role in (BASELINE, CANDIDATE)
    first = item.target == file.recipe.build.targets[0]
    return ours and first and "onnxruntime" in file.recipe.benchmark.vs


def _peer(file: RecipeFile, item: BuildItem) -> Stage:
    assert item.network.model is not None
    inputs: dict[str, Input] = {"model": item.network.model, **metric_inputs(file)}
    confidence = _confidence(file)
    settings = metric_settings(file) | {"confidence": confidence}
    work = partial(_evaluate_peer, file, confidence)
    return Stage(peer_stage(item), "evaluate", settings, inputs, work)


def _evaluate_peer(file: RecipeFile, confidence: float, task: Task) -> Made:
    recipe = file.recipe
    setup = Setup(
        Path(task.inputs["model"]),
        task.inputs["evaluate"],
        recipe.metric,
        recipe.metric_output,
        recipe.evaluate.samples,
        recipe.threads,
    )
    bench = Bench.of(setup)
    kept = bench.judge(bench.model, task.report)
    save_kept(task.folder / ROWS, kept)
    facts = _facts(bench.metric, kept, confidence)
    return Made({"rows": Output(ROWS, "rows")}, _text(bench.metric, kept), facts)


def _confidence(file: RecipeFile) -> float:
    return USUAL_CONFIDENCE if file.recipe.gate is None else file.recipe.gate.confidence


def _stage(file: RecipeFile, item: BuildItem) -> Stage:
    inputs: dict[str, Input] = {"engine": From(item.stage, "engine"), **metric_inputs(file)}
    confidence = _confidence(file)
    settings = metric_settings(file) | {"confidence": confidence}
    work = partial(_evaluate, file, confidence)
    return Stage(stage_of(item), "evaluate", settings, inputs, work)


def _evaluate(file: RecipeFile, confidence: float, task: Task) -> Made:
    recipe = file.recipe
    metric = find_metric(recipe.metric)
    engine = Engine.load(Path(task.inputs["engine"]))
    forms, most = engine_forms(engine.plan)
    output = recipe.metric_output or engine.plan.outputs[0].name
    if output not in [each.name for each in engine.plan.outputs]:
        names = ", ".join(each.name for each in engine.plan.outputs)
        raise InputError(f"no output {output!r} for the metric", [f"the model has {names}"])
    data = as_data(task.inputs["evaluate"], [form.name for form in forms])
    judging = Judging(data, forms, most, recipe.evaluate.samples, metric, output)
    scorer = Scorer(metric, output)
    if lacking := missing_features(engine.plan.target):
        return _not_judged(metric, lacking)
    with Session(engine) as session:
        predict = engine_predictor(session)
        for run in judging.runs():
            scorer.add(predict(run), run.batch)
            task.report(run.batch.start + len(run.batch), judging.total, "")
    kept = scorer.result()
    save_kept(task.folder / ROWS, kept)
    return Made(
        {"rows": Output(ROWS, "rows")}, _text(metric, kept), _facts(metric, kept, confidence)
    )


def _not_judged(metric: Metric, lacking: Sequence[str]) -> Made:
    """Of an engine that was built elsewhere, for another machine."""
    words = {"unit": metric.unit, "higher_is_better": metric.higher_is_better}
    facts = {"metric": metric.name, "samples": 0, "figure": None, **words}
    return Made({}, f"not judged: this machine lacks {', '.join(lacking)}", facts)


def figure_of(metric: Metric, kept: Kept, confidence: float) -> Figure:
    """The metric, and within which ends it would be on other samples of the same kind.

    Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993.
    """
    if not metric.resampled or metric.groups(kept) < LEAST_SAMPLES:
        return Figure(kept.figure)
    draw = np.random.default_rng(0)
    figures = []
    for _ in range(metric.draws(kept, _DRAWS)):
        index = metric.drawn(kept, draw)
        rows = {name: array[index] for name, array in kept.rows.items()}
        figures.append(metric.score(rows, kept.labels[index]))
    known = [each for each in figures if math.isfinite(each)]
    if len(known) < len(figures):
        return Figure(kept.figure)
    low, high = (float(q) for q in np.quantile(known, [1 - confidence, confidence]))
    return Figure(kept.figure, min(low, kept.figure), max(high, kept.figure))


def save_kept(path: Path, kept: Kept) -> None:
    """Writes what a metric keeps of a network."""
    arrays: dict[str, Array] = {f"{_ROW}{name}": array for name, array in kept.rows.items()}
    arrays |= {
        _LABELS: kept.labels,
        _FIGURE: np.array(kept.figure),
        _SHA: np.array(kept.outputs_sha256),
    }
    save_arrays(path, arrays)


def load_kept(path: Path) -> Kept:
    """The inverse of `save_kept`.

    Raises:
        InputError: it is no such file.
    """
    arrays = load_arrays(path)
    try:
        labels, figure = arrays[_LABELS], float(arrays[_FIGURE])
        rows = {n.removeprefix(_ROW): a for n, a in arrays.items() if n.startswith(_ROW)}
        return Kept(rows, labels, figure, str(arrays[_SHA]))
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path} holds no rows of a metric", [str(e)]) from e


def _facts(metric: Metric, kept: Kept, confidence: float) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "samples": len(kept.labels),
        "figure": to_plain(figure_of(metric, kept, confidence)),
    }


def _text(metric: Metric, kept: Kept) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{metric.name} {kept.figure:.4g}{unit} on {len(kept.labels)} samples"

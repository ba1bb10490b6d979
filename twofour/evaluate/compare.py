"""A model and an engine side by side: outputs, metric, layers, and who is to blame.

    from twofour.evaluate import CompareOptions, compare

    found = compare("model.onnx", "model.engine", "test.npz", CompareOptions(metric="top1"))
    found.outputs[0].sqnr_db, found.metric.engine

The reference is the model as it is written (`onnx_tools/reference.py`); the engine runs as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from twofour.core.data import DataLike, as_data
from twofour.core.errors import GateError, InputError
from twofour.core.progress import Stage, unseen
from twofour.engine import Engine, Plan
from twofour.evaluate.blame import LEAST_RUNS, Blame, blame
from twofour.evaluate.differences import Difference
from twofour.evaluate.feeding import engine_forms, engine_predictor, model_predictor
from twofour.evaluate.judge import Judgement, Task, judge
from twofour.evaluate.layers import Layers, compare_layers, tensors_of
from twofour.evaluate.metric import Metric
from twofour.evaluate.metrics import find_metric
from twofour.evaluate.variants import Origin
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session


@dataclass(frozen=True)
class CompareOptions:
    """What to compare.

    Attributes:
        metric: one of `metrics.METRICS`, or module:function; None to compare outputs only.
        output: that the metric reads, and the SQNR of `blame`; by default the first.
        samples: the first so many of the data; None for all.
        layers: compare every tensor that the engine writes, too.
        blame: find the layers that cost most; see `BlameOptions`.
    """

    metric: str | None = None
    output: str | None = None
    samples: int | None = None
    layers: bool = False
    blame: BlameOptions | None = None


@dataclass(frozen=True)
class BlameOptions:
    """What blaming needs beside the engine.

    Attributes:
        source: the file that the engine was built from; None for the model itself.
        dense: a model with dense weights; not needed if the model has them.
        calibration: samples that the engine was quantized with while it was built (`int8=True`).
        runs: engines built and judged at most.
    """

    source: str | os.PathLike[str] | None = None
    dense: str | os.PathLike[str] | None = None
    calibration: DataLike | None = None
    runs: int = 48

    def __post_init__(self) -> None:
        """Refuses too few runs. Raises InputError."""
        if self.runs < LEAST_RUNS:
            raise InputError(
                f"cannot blame within {self.runs} runs",
                [f"expected at least {LEAST_RUNS}"],
                "allow more runs; judge fewer samples if they take long",
            )


@dataclass(frozen=True)
class Scores:
    """The task's metric of both.

    Attributes:
        name: of the metric.
        unit: "%" or "".
        higher_is_better: whether more of it is better.
        reference: of the model.
        engine: of the engine.
        drop: by how much the engine is worse; negative where it is better.
        drop_error: standard error of the drop; None for a metric of the user's own.
    """

    name: str
    unit: str
    higher_is_better: bool
    reference: float
    engine: float
    drop: float
    drop_error: float | None


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        samples: that were compared.
        outputs: the difference of each output, in the model's order.
        scores: None without a metric.
        layers: every tensor of the engine; None where it was not asked for.
        blame: None where it was not asked for.
    """

    samples: int
    outputs: tuple[Difference, ...]
    scores: Scores | None
    layers: Layers | None = None
    blame: Blame | None = None

    def holds(self, max_drop: float) -> bool:
        """Whether there is a metric, and the engine's is worse by at most `max_drop`."""
        # 1e-9: a drop of exactly the limit passes, whatever binary fractions make of it.
        return self.scores is not None and self.scores.drop <= max_drop + 1e-9

    def require(self, max_drop: float) -> None:
        """Does nothing if the engine's metric is worse by at most `max_drop`.

        Raises:
            GateError: it is worse by more.
            InputError: there is no metric.
        """
        if self.scores is None:
            raise InputError(
                "a limit needs a metric",
                [f"expected a metric to hold against {max_drop:g}, got none"],
                "choose one: --metric top1",
            )
        s = self.scores
        if not self.holds(max_drop):
            raise GateError(
                f"{s.name} drops by {s.drop:.4g}, more than {max_drop:g}",
                [f"expected at most {max_drop:g}", f"got {s.reference:.6g} -> {s.engine:.6g}"],
                "find the layers that cost it: twofour compare ... --blame",
            )


def compare(
    model: str | os.PathLike[str],
    engine: str | os.PathLike[str] | Engine,
    data: DataLike,
    options: CompareOptions | None = None,
    stage: Stage = unseen,
) -> Comparison:
    """Runs both on the data.

    Args:
        model: ONNX file that says what is right.
        engine: what is judged.
        data: samples named like the model's inputs, and `labels` for a metric.
        options: what to compare.
        stage: shows the progress.

    Raises:
        InputError: model, engine and data do not fit each other.
        UnsupportedError: ONNX Runtime cannot run the model, or this machine not the engine.
    """
    options = options or CompareOptions()
    metric = find_metric(options.metric) if options.metric else None
    engine = engine if isinstance(engine, Engine) else Engine.load(Path(engine))
    reference = Reference(load_model(model), tensors_of(engine.plan) if options.layers else ())
    require_same_ends(reference, engine.plan)
    output = _metric_output(reference.outputs, options.output)
    source = as_data(data, [each.name for each in reference.inputs])
    chosen = frozenset(info.name for info in engine.plan.outputs if not info.known)
    forms = engine_forms(engine.plan)
    task = Task(source, *forms, options.samples, metric, output, chosen)
    expected = model_predictor(reference)
    layers, guilty = None, None
    with Session(engine) as session:
        with stage("comparing") as report:
            found = judge(task, expected, engine_predictor(session), report)
        if options.layers:
            with stage("comparing layers") as report:
                layers = compare_layers(session, reference, task, report)
    if wanted := options.blame:
        origin = _origin(Path(model), wanted)
        guilty = blame(engine, origin, task, expected, wanted.runs, stage)
    return Comparison(found.samples, found.outputs, _scores(metric, found), layers, guilty)


def _origin(model: Path, options: BlameOptions) -> Origin:
    source = model if options.source is None else Path(options.source)
    dense = None if options.dense is None else Path(options.dense)
    return Origin(model, source, dense, options.calibration)


def require_same_ends(reference: Reference, plan: Plan) -> None:
    """Refuses an engine that has other inputs or outputs than the model.

    Raises:
        InputError: names or numbers of dimensions differ.
    """
    problems = []
    pairs = [
        ("inputs", [each.name for each in reference.inputs], [t.name for t in plan.inputs]),
        ("outputs", list(reference.outputs), [t.name for t in plan.outputs]),
    ]
    for kind, expected, got in pairs:
        if sorted(expected) != sorted(got):
            problems.append(f"{kind}: expected {', '.join(expected)}; got {', '.join(got)}")
    declared = {each.name: each.dims for each in reference.inputs}
    for info in plan.inputs:
        dims = declared.get(info.name)
        if dims is not None and len(dims) != len(info.shape):
            problems.append(
                f"input {info.name!r}: expected {len(dims)} dimensions, got {len(info.shape)}"
            )
    if problems:
        raise InputError(
            "the engine has other inputs or outputs than the model",
            problems,
            "give the model that the engine was built from, or the float model before it",
        )


def _metric_output(outputs: tuple[str, ...], wanted: str | None) -> str:
    if wanted is None:
        return outputs[0]
    if wanted not in outputs:
        raise InputError(f"no output {wanted!r}", [f"the model has {', '.join(outputs)}"])
    return wanted


def _scores(metric: Metric | None, found: Judgement) -> Scores | None:
    if metric is None or found.reference is None or found.engine is None:
        return None
    before, after = found.reference, found.engine
    return Scores(
        metric.name,
        metric.unit,
        metric.higher_is_better,
        before.figure,
        after.figure,
        metric.gain(after.figure, before.figure),
        metric.error(before, after),
    )

"""twofour inspect: what is in a model or an engine."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from twofour.cli.options import Shapes, is_engine, parse_shapes
from twofour.cli.output import Json, Output, Quiet, printable, short

if TYPE_CHECKING:
    from twofour.compiler.survey import OperatorInfo, Survey
    from twofour.engine import Layer, Plan, Profile
    from twofour.onnx_tools.inspect import Inspection, ScaleInfo, WeightInfo
    from twofour.onnx_tools.inspect import TensorInfo as ModelTensor

_NAME = 48  # of what is read at a glance; --all and --json have whole names
_SHOWN_REASONS = 8


def inspect(
    source: Annotated[Path, typer.Argument(help="An .onnx or .engine file.")],
    every: Annotated[
        bool, typer.Option("--all", help="One line for each weight, with its scales.")
    ] = False,
    shapes: Shapes = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a model or engine holds, and where it would run.

    Operators, sizes, and each weight's 2:4 and Q/DQ state; of an engine its inputs, sizes and
    layers.

    Example: twofour inspect resnet20.onnx
    """
    out = Output(as_json, quiet)
    if is_engine(source):
        _engine(source, out)
        return
    gc.disable()  # a quarter of the time, and what is read lives until the end
    try:
        _model(source, parse_shapes(shapes), every, out)
    finally:
        gc.enable()


def _model(source: Path, shapes: dict[str, tuple[int, ...]], every: bool, out: Output) -> None:
    from twofour.compiler.survey import survey
    from twofour.onnx_tools.inspect import inspect as look
    from twofour.onnx_tools.load import load_model

    model = load_model(source)
    found, runs = look(model), survey(model, shapes)
    out.show(
        f"{source}: opset {found.opset}, IR {found.ir_version}, by {found.producer or 'nobody'}",
        *(f"input  {_tensor(info)}" for info in found.inputs),
        *(f"output {_tensor(info)}" for info in found.outputs),
        *_totals(found),
    )
    if found.weights:
        out.show(_each_weight(found.weights) if every else _alike_weights(found.weights))
    out.show(*_violations(found.weights, every), *_promises(found, every), *_places(found, runs))
    out.data("inspect.model/1", {**found.to_json(), "runs": runs.to_json()})


def _totals(found: Inspection) -> list[str]:
    weights = found.weights
    sparse, nearly = found.sparse_weights, sum(w.reason is not None for w in weights)
    return [
        f"{found.parameters:,} parameters, {_bytes(found.parameter_bytes)}; of {len(weights)} "
        f"weights {sparse} are 2:4{f', {nearly} nearly' if nearly else ''}, "
        f"{found.weight_zeros:.1%} of their values zero; "
        f"{found.quantized_layers} layers quantized",
    ]


def _tensor(info: ModelTensor) -> str:
    dims = "unknown shape" if info.shape is None else "x".join(map(str, info.shape)) or "scalar"
    return f"{info.name}: {info.dtype} {dims}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _table(*headers: str) -> Table:
    """The first column may be broken; the others are short."""
    table = Table(box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    first, *others = headers
    table.add_column(first, overflow="fold", min_width=12)
    for header in others:
        table.add_column(header, no_wrap=True)
    return table


def _alike_weights(weights: Sequence[WeightInfo]) -> Table:
    """One row for all weights that are alike."""
    table = _table("layer", "n", "weight", "stored", "zeros", "pattern", "input")
    alike: dict[tuple[str, ...], list[WeightInfo]] = {}
    for each in weights:
        x = each.input_scale.dtype if each.input_scale else _unscaled(each)
        key = (each.op_type, _dims(each), each.dtype, _pattern(each), x, each.reason or "")
        alike.setdefault(key, []).append(each)
    for (op_type, dims, dtype, pattern, x, _), group in alike.items():
        ends = [group[0].node, group[-1].node][: len(group)]
        names = " ... ".join(short(name, _NAME // len(ends)) for name in ends)
        low, high = (pick(w.zeros for w in group) for pick in (min, max))
        zeros = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%}-{high:.0%}"
        row = (str(len(group)), f"{op_type} {dims}", dtype, zeros, pattern, x)
        table.add_row(printable(names), *row)
    return table


def _unscaled(weight: WeightInfo) -> str:
    """What a layer takes whose input has no scale in the file."""
    return "dynamic" if weight.dynamic else "float"


def _each_weight(weights: Sequence[WeightInfo]) -> Table:
    table = _table("layer", "weight", "stored, scale", "zeros", "pattern", "input")
    for each in weights:
        table.add_row(
            printable(each.node),
            f"{each.op_type} {_dims(each)}",
            _scale(each.scale) if each.scale else each.dtype,
            f"{each.zeros:.0%}",
            _pattern(each),
            _scale(each.input_scale) if each.input_scale else _unscaled(each),
        )
    return table


def _dims(weight: WeightInfo) -> str:
    return "x".join(map(str, weight.shape))


def _pattern(weight: WeightInfo) -> str:
    """What it has; of a weight that is nearly 2:4 the share of groups that are."""
    if weight.patterns:
        return weight.patterns[0]
    return "dense" if weight.groups_held is None else f"2:4 {_share(weight.groups_held)}"


def _share(value: float) -> str:
    """In percent; 100 % only of what is whole."""
    digits = next((d for d in range(1, 4) if round(value * 100, d) < 100), 4)
    return "100%" if value == 1 else f"{value * 100:.{digits}f}%"


def _scale(scale: ScaleInfo) -> str:
    span = f"{scale.low:.2g}" if scale.count == 1 else f"{scale.low:.2g}..{scale.high:.2g}"
    point = "" if not scale.zero_point else f" zp {scale.zero_point}"
    return f"{scale.dtype} {span}{point}"


def _violations(weights: Iterable[WeightInfo], every: bool) -> list[str]:
    """Where weights that are nearly 2:4 break it."""
    lines = [f"- {w.node} is not 2:4: {w.reason}" for w in weights if w.reason]
    hidden = 0 if every else max(len(lines) - _SHOWN_REASONS, 0)
    more = [f"- and {hidden} more: --all"] if hidden else []
    return [*lines[: len(lines) - hidden], *more]


def _promises(found: Inspection, every: bool) -> list[str]:
    """Whether the weights have the patterns that the file's metadata promises."""
    read = [each for each in found.promises.entries if each.layers]
    broken = [f"- {each.weight} is promised {each.pattern}, broken in {each.broken}"
              for each in read if each.broken]  # fmt: skip
    shown = broken if every else broken[:_SHOWN_REASONS]
    more = [f"- and {len(broken) - len(shown)} more: --all"] if shown != broken else []
    kept = f"promised patterns: {len(read) - len(broken)} kept, {len(broken)} broken"
    return [*([kept] if read else []), *shown, *more, *found.promises.notes]


def _places(found: Inspection, runs: Survey) -> list[Table | str]:
    """Where operators run, and what keeps others from running natively."""
    total = sum(found.operators.values())
    counts = Counter(each.op_type for each in runs.operators if each.runs == "native")
    native = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    if runs.refused:
        what, *reasons = runs.refused
        every = ", ".join(f"{count} {name}" for name, count in found.operators.items())
        return [f"{total} operators: {every}", f"build would refuse it: {what}",
                *(f"- {reason}" for reason in reasons)]  # fmt: skip
    lines: list[Table | str] = [
        f"{total} operators, {len(runs.operators)} after folding: {runs.native} native, "
        f"{len(runs.fallbacks)} on ONNX Runtime"
        + (f", {len(runs.python)} in Python" if runs.python else ""),
        *([f"native: {native}"] if native else []),
    ]
    if runs.whole:
        return [*lines, f"the whole model would run on ONNX Runtime: {runs.whole}"]
    others = (*runs.fallbacks, *runs.python)
    return [*lines, _fallbacks(others)] if others else lines


def _fallbacks(operators: Sequence[OperatorInfo]) -> Table:
    """One row for all operators of one type with one reason."""
    table = _table("on ONNX Runtime", "n", "operator")
    table.add_column("because", overflow="fold", ratio=1)
    alike: dict[tuple[str, str], list[str]] = {}
    for each in operators:
        alike.setdefault((each.op_type, each.reason), []).append(each.name)
    for (op_type, reason), names in alike.items():
        shown = short(names[0], _NAME - 10) + (", ..." if len(names) > 1 else "")
        table.add_row(printable(shown), str(len(names)), printable(op_type), printable(reason))
    return table


def _engine(source: Path, out: Output) -> None:
    from twofour.core.target import missing_features
    from twofour.engine import Engine

    engine = Engine.load(source)
    plan = engine.plan
    missing = missing_features(plan.target)
    parts = {
        "weights": engine.weights.nbytes,
        "code": sum(data.nbytes for data in engine.code.values()),
        "subgraphs": sum(data.nbytes for data in engine.subgraphs.values()),
        "arena": plan.arena_bytes,
    }
    out.show(
        f"engine of {plan.source_name or 'a model'} (sha256 {plan.source_sha256[:12]}), "
        f"by twofour {plan.version}",
        _made_for(plan),
        f"cannot run here: lacks {', '.join(missing)}" if missing else "runs here",
        ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items()),
        *(line for i, profile in enumerate(plan.profiles) for line in _profile(plan, i, profile)),
        _alike_layers(plan.layers),
        f"each layer: twofour explain {source}",
    )
    document = {"bytes": parts, "runs_here": not missing, "plan": plan.to_json()}
    out.data("inspect.engine/1", document)


def _made_for(plan: Plan) -> str:
    """The machine, and what runs it there."""
    target = plan.target
    model = ", ".join(filter(None, (target.arch, target.model)))
    by = f"threads {plan.threads}"
    if target.tensorrt is not None:
        by = f"by {target.tensorrt.title}"
    elif target.cuda is not None:
        by = f"with {', '.join(target.cuda.libraries) or 'no library'}"
    return f"for {target} ({model}), {by}"


def _profile(plan: Plan, index: int, profile: Profile) -> list[str]:
    """One way to run the network: what goes in and out, and its steps."""
    from twofour.runtime.shapes import shape_text

    several = len(plan.profiles) > 1
    return [
        *([f"profile {index + 1} of {len(plan.profiles)}"] if several else []),
        *(f"input  {t.name}: {t.dtype} {shape_text(t, profile)}" for t in profile.inputs),
        *(f"output {t.name}: {t.dtype} {shape_text(t, profile)}" for t in profile.outputs),
        *(_step(i, step.kind, step.layers) for i, step in enumerate(profile.steps)),
    ]


_HOW = {
    "native": "generated code",
    "cuda": "a CUDA graph",
    "python": "a plugin in Python",
    "tensorrt": "TensorRT runs them",
}
"""Kind of step -> what runs it."""


def _step(number: int, kind: str, layers: tuple[int, ...]) -> str:
    how = _HOW.get(kind, "ONNX Runtime")
    return f"step {number}: {len(layers)} layers as {how}"


def _alike_layers(layers: Sequence[Layer]) -> Table:
    """One row for all layers of one operator that run as the same."""
    table = _table("operator", "n", "runs as", "weights", "packed")
    alike: dict[tuple[str, str, str], list[Layer]] = {}
    for each in layers:
        runs = " ".join(part for part in (each.tactic, each.precision) if part)
        alike.setdefault((each.op, runs, each.pattern), []).append(each)
    for (op, runs, pattern), group in alike.items():
        packed = sum(layer.weight_bytes for layer in group)
        size = _bytes(packed) if packed else ""
        table.add_row(printable(op), str(len(group)), printable(runs), pattern, size)
    return table

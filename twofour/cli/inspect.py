"""twofour inspect: what is in a model or an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from twofour.cli.options import is_engine
from twofour.cli.output import Json, Output, Quiet, printable

if TYPE_CHECKING:
    from twofour.engine import Plan, Profile
    from twofour.onnx_tools.inspect import TensorInfo as ModelTensor
    from twofour.onnx_tools.inspect import WeightInfo


def inspect(
    source: Annotated[Path, typer.Argument(help="An .onnx or .engine file.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show operators, sizes, and each weight's 2:4 and Q/DQ state, or an engine's plan.

    Example: twofour inspect resnet20.onnx
    """
    out = Output(as_json, quiet)
    if is_engine(source):
        _engine(source, out)
    else:
        _model(source, out)


def _model(source: Path, out: Output) -> None:
    from twofour.onnx_tools.inspect import inspect as look
    from twofour.onnx_tools.load import load_model

    found = look(load_model(source))
    operators = ", ".join(f"{count} {name}" for name, count in found.operators.items())
    out.show(
        f"{source}: opset {found.opset}, IR {found.ir_version}, by {found.producer or 'nobody'}",
        *(f"input  {_tensor(info)}" for info in found.inputs),
        *(f"output {_tensor(info)}" for info in found.outputs),
        f"operators: {operators}",
        f"{found.parameters} parameters, {found.parameter_bytes / 1e3:.0f} kB, "
        f"{found.weight_zeros:.1%} of the weights are zero",
        *([_weights(found.weights)] if found.weights else []),
        *(f"- {w.node}: not 2:4: {w.reason}" for w in found.weights if w.reason),
    )
    out.data("inspect.model/1", found.to_json())


def _tensor(info: ModelTensor) -> str:
    dims = "unknown shape" if info.shape is None else "x".join(map(str, info.shape))
    return f"{info.name}: {info.dtype} {dims}"


def _weights(weights: tuple[WeightInfo, ...]) -> Table:
    table = Table(caption="zeros: share of the weight. x: the layer's input.", title_justify="left")
    for header in ("layer", "operator", "weight"):
        table.add_column(header, overflow="fold")
    for header in ("zeros", "pattern", "stored", "x"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in weights:
        table.add_row(
            printable(each.node),
            each.op_type,
            "x".join(map(str, each.shape)),
            f"{each.zeros:.0%}",
            each.patterns[0] if each.patterns else "dense",
            each.dtype,
            each.input_scale.dtype if each.input_scale else "float",
        )
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
        f"for {plan.target} ({plan.target.arch}, {plan.target.model}), threads {plan.threads}",
        f"cannot run here: lacks {', '.join(missing)}" if missing else "runs here",
        ", ".join(f"{name} {size / 1e3:.0f} kB" for name, size in parts.items()),
        *(line for i, profile in enumerate(plan.profiles) for line in _profile(plan, i, profile)),
        f"each layer: twofour explain {source}",
    )
    document = {"bytes": parts, "runs_here": not missing, "plan": plan.to_json()}
    out.data("inspect.engine/1", document)


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


def _step(number: int, kind: str, layers: tuple[int, ...]) -> str:
    how = "generated code" if kind == "native" else "ONNX Runtime"
    return f"step {number}: {len(layers)} layers as {how}"

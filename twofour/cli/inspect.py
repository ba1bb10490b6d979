"""twofour inspect: what is in a model or an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofour.cli.options import is_engine
from twofour.cli.output import Json, Output, Quiet


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
        *(f"input  {t.name}: {t.dtype} {list(t.shape)}" for t in plan.inputs),
        *(f"output {t.name}: {t.dtype} {list(t.shape)}" for t in plan.outputs),
        ", ".join(f"{name} {size / 1e3:.0f} kB" for name, size in parts.items()),
        *(_step(i, step.kind, step.layers) for i, step in enumerate(plan.steps)),
        f"each layer: twofour explain {source}",
    )
    out.data({"kind": "engine", "bytes": parts, "runs_here": not missing, "plan": plan.to_json()})


def _step(number: int, kind: str, layers: tuple[int, ...]) -> str:
    how = "generated code" if kind == "native" else "ONNX Runtime"
    return f"step {number}: {len(layers)} layers as {how}"

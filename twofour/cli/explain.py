"""twofour explain: what each layer runs as, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.cli import layers as views
from twofour.cli.output import Json, Output, Quiet
from twofour.cli.roofline import Measures, gap_table, measured, rates_data, summary
from twofour.cli.sizes import show_sizes
from twofour.cli.trace import write_trace

if TYPE_CHECKING:
    from twofour.compiler.explain import Explained
    from twofour.engine import Plan


class Sort(StrEnum):
    """The order of layers in the table."""

    ORDER = "order"
    TIME = "time"
    GAP = "gap"


def explain(
    engine: Annotated[Path, typer.Argument(help="An .engine file.")],
    layer: Annotated[str, typer.Option(help="Show one layer: its name, or a part of it.")] = "",
    profile: Annotated[int, typer.Option(min=1, help="Of an engine with several.")] = 1,
    sort: Annotated[Sort, typer.Option(help="As run, by time, or by gap to roofline.")] = (
        Sort.ORDER
    ),
    roofline: Annotated[
        bool,
        typer.Option("--roofline", help="Measure this machine's rates; --sort gap implies it."),
    ] = False,
    conversions: Annotated[
        bool, typer.Option("--conversions", help="What changes layout or type, and who caused it.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Run it, and write a trace for ui.perfetto.dev to FILE.json."),
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="For --trace: NAME=FILE.npy, else random.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="For --trace: how many.")] = 5,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="Bytes of the file and of each layer's weight.")
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="For --sizes: other engines or .onnx files of the same network."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what each layer runs as, its time, and why.

    Example: twofour explain resnet20.engine --layer layer1.0.conv1
    Example: twofour explain resnet20.engine --sort gap
    Example: twofour explain resnet20.engine --trace resnet20.json --input x=x.npy
    Example: twofour explain sparse.engine --beside dense.engine --beside float.onnx
    """
    from twofour.compiler import explain as explaining
    from twofour.compiler import summary as explained
    from twofour.engine import Engine

    out = Output(as_json, quiet)
    if sizes or beside:
        show_sizes([engine, *(beside or [])], out)
        return
    loaded = Engine.load(engine)
    plan = loaded.plan
    if trace is not None:
        write_trace(loaded, profile, trace, (inputs or [], runs), out)
        return
    if layer:
        one = explaining.find_layer(plan, layer, profile)
        out.show(*views.detail(one, _estimated(plan)))
        out.data("explain.layer/1", dataclasses.asdict(one))
        return
    rows = explaining.explain(plan, profile)
    out.show(_heading(plan), *_profile(plan, profile))
    out.show(*views.summary(explained.parts(plan, profile), explained.advice(plan, profile)))
    if conversions:
        out.show(*views.conversion_table(explained.conversions(plan, profile)))
        out.data("explain/1", _document(plan, profile, list(range(len(rows))), None))
        return
    measures = measured(plan, profile, out) if roofline or sort is Sort.GAP else None
    order = _order(rows, measures, sort)
    if measures is None:
        out.show(
            views.layer_table([rows[i] for i in order], out.width, _estimated(plan)),
            *views.reasons(rows),
        )
        totals = explaining.totals(plan, profile)
        out.show(views.total_table(totals, _estimated(plan)), *views.fallbacks(rows))
    else:
        named = [(measures.gaps[i], rows[i].runs_as) for i in order]
        out.show(*gap_table(named, out.width), *summary(measures, plan.threads))
    out.data("explain/1", _document(plan, profile, order, measures))


def _document(
    plan: Plan, profile: int, order: list[int], measures: Measures | None
) -> dict[str, Any]:
    """All that is known of the layers, as plain data in the order of the table."""
    from twofour.compiler import explain as explaining
    from twofour.compiler import summary as explained

    rows, found = explaining.explain(plan, profile), explaining.layers_of(plan, profile)
    layers = [
        {**dataclasses.asdict(found[i]), "explained": dataclasses.asdict(rows[i])} for i in order
    ]
    totals = [dataclasses.asdict(total) for total in explaining.totals(plan, profile)]
    document = {
        "engine": _identity(plan),
        "summary": {
            "parts": [dataclasses.asdict(part) for part in explained.parts(plan, profile)],
            "advice": list(explained.advice(plan, profile)),
            "free": list(plan.free),
        },
        "layers": layers,
        "totals": totals,
        "conversions": [dataclasses.asdict(c) for c in explained.conversions(plan, profile)],
    }
    if measures is not None:
        document["rates"] = rates_data(measures.rates)
        for index, shown in zip(order, layers, strict=True):
            shown["roofline"] = dataclasses.asdict(measures.gaps[index])
    return document


def _order(rows: Sequence[Explained], measures: Measures | None, sort: Sort) -> list[int]:
    """Indices of the layers as they are to be shown."""
    order = list(range(len(rows)))
    if sort is Sort.TIME:
        return sorted(order, key=lambda i: -(rows[i].time_us or 0.0))
    if sort is Sort.GAP and measures is not None:
        return sorted(order, key=lambda i: -measures.gaps[i].gap_us)
    return order


def _identity(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.source_name,
        "source_sha256": plan.source_sha256,
        "target": str(plan.target),
        "cpu": plan.target.model,
        "version": plan.version,
        "threads": plan.threads,
        "graph": plan.graph,
        "notes": list(plan.notes),
    }


def _estimated(plan: Plan) -> str:
    """The CPU whose times are estimates; "" where they were measured."""
    return plan.target.model if plan.target.cpu else ""


def _heading(plan: Plan) -> str:
    gpu, where = plan.target.tensorrt, "for" if plan.target.cpu else "on"
    by = f"with {plan.threads} thread{'s' * (plan.threads > 1)} {where} {plan.target.model}"
    if gpu is not None:
        by = f"by {gpu.title}" + (f" on {plan.target.model}" if plan.target.model else "")
    model = plan.source_name or "a model"
    built = f"{model}, built for {plan.target} {by}, by twofour {plan.version}"
    if plan.target.cuda is not None:
        on = (
            f" on {plan.target.model}"
            if plan.target.model
            else ", which was not here: nothing was timed"
        )
        built = f"{model}, built for {plan.target}{on}, by twofour {plan.version}"
    if plan.target.cpu:
        built += f"\nnothing was timed: est. is the cost model's, from facts of {plan.target.cpu}"
    if waves := plan.graph.get("waves"):
        operators, calls = plan.graph["operators"], plan.graph["calls"]
        built += f"\n{operators} operators became {calls} kernels in {waves} waves"
    return "\n".join((built, *(f"note: {note}" for note in plan.notes)))


def _profile(plan: Plan, number: int) -> list[str]:
    """Which shapes the table is of."""
    from twofour.runtime.shapes import shape_text

    profile = plan.profiles[number - 1]
    if len(plan.profiles) == 1 and not profile.symbols:
        return []
    takes = ", ".join(f"{info.name} {shape_text(info, profile)}" for info in profile.inputs)
    usual = ", ".join(f"{symbol.name} {symbol.usual}" for symbol in profile.symbols)
    timed = f"; shapes and times: {usual}" if usual else ""
    return [f"profile {number} of {len(plan.profiles)}: {takes}{timed}"]

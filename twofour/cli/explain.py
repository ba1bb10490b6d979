"""twofour explain: what each layer runs as, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from twofour.cli.output import Json, Output, Quiet, printable
from twofour.cli.roofline import Measures, gap_table, measured, rates_data, summary

if TYPE_CHECKING:
    from twofour.compiler.explain import Explained, Total
    from twofour.engine import Layer, Plan

_WIDE = 110


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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show for every layer what it runs as, its time, and the reasons.

    Example: twofour explain resnet20.engine --layer layer1.0.conv1
    Example: twofour explain resnet20.engine --sort gap
    """
    from twofour.compiler import explain as explaining
    from twofour.engine import Engine

    out = Output(as_json, quiet)
    plan = Engine.load(engine).plan
    if layer:
        one = explaining.find_layer(plan, layer, profile)
        out.show(*_detail(one))
        out.data("explain.layer/1", dataclasses.asdict(one))
        return
    rows = explaining.explain(plan, profile)
    out.show(_heading(plan), *_profile(plan, profile))
    measures = measured(plan, profile, out) if roofline or sort is Sort.GAP else None
    order = _order(rows, measures, sort)
    if measures is None:
        out.show(_layers([rows[i] for i in order], out.width), *_reasons(rows))
        out.show(_totals(explaining.totals(plan, profile)), *_fallbacks(rows))
    else:
        named = [(measures.gaps[i], rows[i].runs_as) for i in order]
        out.show(*gap_table(named, out.width), *summary(measures, plan.threads))
    out.data("explain/1", _document(plan, profile, order, measures))


def _document(
    plan: Plan, profile: int, order: list[int], measures: Measures | None
) -> dict[str, Any]:
    """All that is known of the layers, as plain data in the order of the table."""
    from twofour.compiler import explain as explaining

    rows, found = explaining.explain(plan, profile), explaining.layers_of(plan, profile)
    layers = [
        {**dataclasses.asdict(found[i]), "explained": dataclasses.asdict(rows[i])} for i in order
    ]
    totals = [dataclasses.asdict(total) for total in explaining.totals(plan, profile)]
    document = {"engine": _identity(plan), "layers": layers, "totals": totals}
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


def _heading(plan: Plan) -> str:
    built = (
        f"{plan.source_name or 'a model'}, built for {plan.target} with {plan.threads} "
        f"thread{'s' * (plan.threads > 1)} on {plan.target.model}, by twofour {plan.version}"
    )
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


def _layers(rows: Sequence[Explained], width: int) -> Table:
    """A narrow terminal shows fewer columns, never broken numbers."""
    wide = width >= _WIDE
    table = Table(
        caption="us: measured at build. dense, sparse: the best candidate of each kind, "
        "gain: their ratio; a kind that its first candidate left behind was not tried further.",
        caption_justify="left",
    )
    for header in ("layer", "operator", "shape") if wide else ("layer",):
        table.add_column(header, overflow="fold")
    table.add_column("runs as", overflow="fold")
    for header in ("us", "share", "dense", "sparse", "gain"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        middle = [printable(row.op), printable(row.shape)] if wide else []
        table.add_row(
            printable(row.name),
            *middle,
            printable(row.runs_as),
            _number(row.time_us, "{:.2f}"),
            _number(row.share, "{:.0%}"),
            _number(row.best_dense_us, "{:.2f}"),
            _number(row.best_sparse_us, "{:.2f}"),
            _number(row.gain, "{:.2f}x"),
        )
    return table


def _reasons(rows: tuple[Explained, ...]) -> list[str]:
    """Each reason once, with the layers it holds for."""
    layers: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.why:
            layers.setdefault(reason, []).append(row.name)
    lines = [f"- {reason}\n  {', '.join(names)}" for reason, names in layers.items()]
    return ["why some layers are not sparse, not integer, or not our own", *lines] if lines else []


def _totals(totals: tuple[Total, ...]) -> Table:
    table = Table(title="by tactic", title_justify="left")
    table.add_column("tactic")
    for header in ("layers", "us", "share", "million multiply-adds"):
        table.add_column(header, justify="right")
    for total in totals:
        table.add_row(
            printable(total.tactic),
            str(total.layers),
            _number(total.time_us, "{:.1f}"),
            _number(total.share if total.time_us else None, "{:.0%}"),
            f"{total.macs / 1e6:.2f}",
        )
    return table


def _fallbacks(rows: tuple[Explained, ...]) -> list[str]:
    names = [f"{row.name} ({row.op})" for row in rows if row.fallback]
    if not names:
        return ["every layer runs on a kernel of its own; none on ONNX Runtime"]
    return [f"on ONNX Runtime, for want of a kernel: {', '.join(names)}"]


def _detail(layer: Layer) -> list[Table | str]:
    from twofour.compiler.explain import verdict

    facts = (
        f"{layer.name}: {layer.op}, {layer.shape or 'no shape'}\n"
        f"runs as {layer.tactic} {layer.precision} {layer.config}".rstrip()
        + f"\nweights: {layer.pattern or 'none'}, {layer.weight_bytes} bytes packed, "
        f"{layer.macs} multiply-adds"
    )
    table = Table(title="candidates", title_justify="left")
    for header in ("tactic", "configuration"):
        table.add_column(header, overflow="fold")
    table.add_column("us", justify="right")
    table.add_column("verdict", overflow="fold", ratio=1)
    best_first = sorted(layer.candidates, key=lambda c: (c.time_us is None, c.time_us or 0.0))
    for candidate in best_first:
        table.add_row(
            printable(candidate.tactic),
            printable(candidate.config),
            _number(candidate.time_us, "{:.2f}"),
            printable(verdict(candidate, layer)),
        )
    notes = [f"note: {note}" for note in layer.notes]
    return [facts, *([table] if layer.candidates else []), *notes]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)

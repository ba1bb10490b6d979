"""twofour explain --roofline: which layers lose the time, and to what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from twofour.cli.output import Output, printable

if TYPE_CHECKING:
    from twofour.compiler.rates import Rates
    from twofour.compiler.roofline import Gap
    from twofour.engine import Plan

_WIDE, _WIDER = 110, 150
_KINDS = {
    "results": "scaling, rounding and storing results",
    "weights": "reading weights",
    "zeros": "zeros that fill up K",
    "lanes": "lanes without a channel",
}


@dataclass(frozen=True)
class Measures:
    """What was measured.

    Attributes:
        rates: of this machine.
        gaps: each layer of the profile against them, in the order they run in.
    """

    rates: Rates
    gaps: tuple[Gap, ...]


def measured(plan: Plan, profile: int, out: Output) -> Measures:
    """Measures the rates that the layers of a profile are held against."""
    from twofour.compiler.rates import measure_rates
    from twofour.compiler.roofline import gaps

    with out.stage("measuring rates") as report:
        rates = measure_rates(plan, report)
    return Measures(rates, gaps(plan, rates, profile))


def gap_table(rows: list[tuple[Gap, str]], width: int) -> list[Table | str]:
    """The table; where the terminal is narrow the reasons stand below it.

    Args:
        rows: each layer, and what it runs as.
        width: of the terminal.
    """
    wide, wider = width >= _WIDE, width >= _WIDER
    table = Table(
        caption="us: measured at build. ideal: its multiply-adds at the peak of their kind of "
        "kernel, or else its bytes, copied within L2; of roof: its share of us. gap: what it took "
        "beyond; of gap: its share of all gaps.",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    if wider:
        table.add_column("runs as", overflow="fold")
    for header in ("us", "ideal", "of roof", "gap", "of gap"):
        table.add_column(header, justify="right", no_wrap=True)
    if wide:
        table.add_column("why (each by itself; two may overlap)", overflow="fold", ratio=1)
    for gap, runs_as in rows:
        table.add_row(
            printable(gap.name),
            *([printable(runs_as)] if wider else []),
            _number(gap.time_us),
            _number(gap.ideal_us),
            f"{gap.ideal_us / gap.time_us:.0%}" if gap.ideal_us and gap.time_us else "",
            _number(gap.gap_us),
            f"{gap.share:.0%}",
            *([printable("\n".join(loss.text for loss in gap.losses))] if wide else []),
        )
    return [table] if wide else [table, *_reasons([gap for gap, _ in rows])]


def summary(measures: Measures, threads: int) -> list[str]:
    """The whole network: its share of the roofline, what was lost to what, and the rates."""
    rates, rows = measures.rates, measures.gaps
    time_us = sum(gap.time_us or 0.0 for gap in rows)
    ideal_us = sum(gap.ideal_us or 0.0 for gap in rows)
    share = f": {ideal_us / time_us:.0%} of the roofline" if time_us else ""
    lost = []
    for kind, words in _KINDS.items():
        losses = [loss for gap in rows for loss in gap.losses if loss.kind == kind]
        if losses:
            lost.append(f"{words} {sum(loss.time_us or 0.0 for loss in losses):.1f} us")
    bytes_us = sum(gap.gap_us for gap in rows if gap.bound == "bytes")
    lost.append(f"layers without multiply-adds {bytes_us:.1f} us")
    peaks = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.peaks.gmacs.items())
    return [
        f"all layers {time_us:.1f} us, ideal {ideal_us:.1f} us{share}",
        f"beyond the ideal, by itself: {', '.join(lost)}",
        f"rates of one core here{f', times {threads} threads' * (threads > 1)}: thousand million "
        f"multiply-adds a second, as if dense: {peaks}; copies within L2 {rates.copy_gbps:.0f} "
        f"GB/s; {rates.weights_bytes / 1e6:.1f} MB of weights read at {rates.read_gbps:.0f} GB/s",
    ]


def rates_data(rates: Rates) -> dict[str, Any]:
    """The rates as plain data."""
    return {
        "peak_gmacs": rates.peaks.gmacs,
        "copy_gbps": rates.copy_gbps,
        "weights_bytes": rates.weights_bytes,
        "read_gbps": rates.read_gbps,
        "results": [{**vars(kind), "ns": ns} for kind, ns in rates.result_ns.items()],
    }


def _reasons(rows: list[Gap]) -> list[str]:
    """Each reason once, with the layers it holds for."""
    layers: dict[str, list[str]] = {}
    for gap in rows:
        for loss in gap.losses:
            layers.setdefault(loss.text, []).append(gap.name)
    lines = [f"- {text}\n  {', '.join(names)}" for text, names in layers.items()]
    return ["why, each by itself; two may overlap", *lines] if lines else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

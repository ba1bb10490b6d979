"""One table of networks side by side (accuracy, latency, size), for people and programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from twofour.bench.timing import Timing, ratio

Plain = dict[str, Any]

_HEADERS = ("runs on", "weights", "top-1", "latency", "±", "speed", "size")


@dataclass(frozen=True)
class Row:
    """One network on one engine.

    Attributes:
        name: what runs it, for example "ONNX Runtime INT8".
        weights: what it runs, for example "2:4 int8".
        top1: 0 to 1; None where it was not measured.
        timing: of one inference; None where it was not measured.
        size_bytes: of its file.
    """

    name: str
    weights: str
    top1: float | None
    timing: Timing | None
    size_bytes: int | None


def plain(rows: Sequence[Row], baseline: str) -> list[Plain]:
    """For programs: numbers with their units in their names.

    Args:
        rows: from one race.
        baseline: name of the row that `speed` refers to.
    """
    base = next(row for row in rows if row.name == baseline)
    return [
        {
            "name": row.name,
            "weights": row.weights,
            "top1": row.top1,
            "size_bytes": row.size_bytes,
            **(_times(row.timing) if row.timing else {}),
            **(_speed(row.timing, base.timing) if row.timing and base.timing else {}),
        }
        for row in rows
    ]


def rich_table(rows: Sequence[Plain], baseline: str, title: str = "") -> Table:
    """For a terminal.

    Args:
        rows: as `plain` gave them.
        baseline: name of the row that `speed` refers to.
        title: above the table.
    """
    table = Table(title=title or None, caption=_caption(baseline), title_justify="left")
    for header in _HEADERS:
        table.add_column(header, justify="left" if header in _HEADERS[:2] else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown(rows: Sequence[Plain], baseline: str) -> str:
    """For a page: a table, and a line that says what its columns mean. Arguments as above."""
    lines = [
        _line(_HEADERS),
        _line(["---" if header in _HEADERS[:2] else "--:" for header in _HEADERS]),
    ]
    lines += [_line(_cells(row)) for row in rows]
    return "\n".join([*lines, "", _caption(baseline), ""])


def _times(timing: Timing) -> Plain:
    return {
        "median_us": timing.median_us,
        "p90_us": timing.p90_us,
        "min_us": timing.min_us,
        "spread_us": timing.spread_us,
        "calls": timing.calls,
    }


def _speed(timing: Timing, baseline: Timing) -> Plain:
    """Above 1 for what is faster than the baseline."""
    found = ratio(timing, baseline)
    return {"speed": found.median, "speed_low": found.low, "speed_high": found.high}


def _cells(row: Plain) -> list[str]:
    return [
        row["name"],
        row["weights"],
        _cell(row, "top1", lambda top1: f"{100 * top1:.2f} %"),
        _cell(row, "median_us", lambda us: f"{us:.1f} us"),
        _cell(row, "spread_us", lambda us: f"{us:.1f}"),
        _cell(row, "speed", lambda speed: f"{speed:.2f}x"),
        _cell(row, "size_bytes", lambda size: f"{size / 1e3:.0f} kB"),
    ]


def _cell(row: Plain, key: str, show: Callable[[Any], str]) -> str:
    value = row.get(key)
    return "" if value is None else show(value)


def _caption(baseline: str) -> str:
    return (
        "latency: median of single calls; ±: distance between the quartiles of the rounds' "
        f"medians; speed: times as fast as {baseline}"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

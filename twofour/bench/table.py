"""One table of networks side by side (accuracy, latency, size), for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from twofour.bench.timing import Ratio, Timing, ratio

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


def rich_table(rows: Sequence[Row], baseline: str, title: str = "") -> Table:
    """For a terminal.

    Args:
        rows: from one race.
        baseline: name of the row that `speed` refers to.
        title: above the table.
    """
    table = Table(title=title or None, caption=_caption(baseline), title_justify="left")
    for header in _HEADERS:
        table.add_column(header, justify="left" if header in _HEADERS[:2] else "right")
    for row in rows:
        table.add_row(*_cells(row, _find(rows, baseline)))
    return table


def markdown(rows: Sequence[Row], baseline: str) -> str:
    """For a page: a table, and a line that says what its columns mean."""
    lines = [
        _line(_HEADERS),
        _line(["---" if header in _HEADERS[:2] else "--:" for header in _HEADERS]),
    ]
    lines += [_line(_cells(row, _find(rows, baseline))) for row in rows]
    return "\n".join([*lines, "", _caption(baseline), ""])


def plain(rows: Sequence[Row], baseline: str) -> list[dict[str, Any]]:
    """For programs: numbers with their units in their names."""
    base = _find(rows, baseline)
    return [
        {
            "name": row.name,
            "weights": row.weights,
            "top1": row.top1,
            "size_bytes": row.size_bytes,
            **(_times(row.timing) if row.timing else {}),
            "speed": found.median if (found := _speed(row, base)) else None,
        }
        for row in rows
    ]


def _times(timing: Timing) -> dict[str, Any]:
    return {
        "median_us": timing.median_us,
        "p90_us": timing.p90_us,
        "min_us": timing.min_us,
        "spread_us": timing.spread_us,
        "calls": timing.calls,
    }


def _cells(row: Row, baseline: Row) -> list[str]:
    speed = _speed(row, baseline)
    return [
        row.name,
        row.weights,
        "" if row.top1 is None else f"{100 * row.top1:.2f} %",
        "" if row.timing is None else f"{row.timing.median_us:.1f} us",
        "" if row.timing is None else f"{row.timing.spread_us:.1f}",
        "" if speed is None else f"{speed.median:.2f}x",
        "" if row.size_bytes is None else f"{row.size_bytes / 1e3:.0f} kB",
    ]


def _speed(row: Row, baseline: Row) -> Ratio | None:
    """Above 1 for what is faster than the baseline."""
    if row.timing is None or baseline.timing is None:
        return None
    return ratio(row.timing, baseline.timing)


def _find(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)


def _caption(baseline: str) -> str:
    return (
        "latency: median of single calls; ±: distance between the quartiles of the rounds' "
        f"medians; speed: times as fast as {baseline}"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

"""Plots as PNG: the same as the pages show, for papers, slides and terminals that show images."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from twofour.core.errors import InputError
from twofour.report.sensitivity import Document, number

_COST, _GAIN, _SOFT = "#c8452e", "#2b7a58", "#5d6772"
_ROW_INCHES, _LEAST_INCHES, _MOST_INCHES = 0.17, 3.6, 40.0
_DPI, _NAMED, _LETTERS = 130, 8, 34


def plot_sensitivity(document: Document, path: str | os.PathLike[str]) -> None:
    """Draws, for each pattern, the drop of each layer beside its gain, and one over the other.

    Args:
        document: of `twofour sensitivity --json`.
        path: of the PNG file.

    Raises:
        InputError: it cannot be written.
    """
    patterns = list(dict.fromkeys(case["pattern"] for case in document["cases"]))
    parts = [[c for c in document["cases"] if c["pattern"] == p] for p in patterns]
    heights = [
        min(max(_ROW_INCHES * len(part) + 1.2, _LEAST_INCHES), _MOST_INCHES) for part in parts
    ]
    figure = Figure(figsize=(13.0, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(patterns), 3, squeeze=False, height_ratios=heights, width_ratios=(1.0, 0.5, 1.3)
    )
    for row, pattern, cases in zip(axes, patterns, parts, strict=True):
        _draw(row, document, pattern, cases)
    dense = "" if document["dense"] is None else f", dense {document['dense']:.4g}"
    figure.suptitle(f"{Path(document['model']).name}: {document['metric']}{dense}", fontsize=11)
    _save(figure, Path(path))


def _draw(
    axes: Sequence[Axes], document: Document, pattern: str, cases: Sequence[Mapping[str, Any]]
) -> None:
    """Bars of drops, bars of gains, drops over gains; the worst layer on top."""
    ways = [way for way in document["tradeoffs"] if way["pattern"] == pattern]
    gains = {each["layer"]: each["gain_us"] for way in ways for each in way["gains"]}
    rows = sorted(cases, key=lambda case: -number(case["drop"]))
    drops, gained, both = axes
    _bars(drops, [(_short(r["layer"]), r["drop"], r["drop_error"]) for r in rows], _COST)
    drops.set_title(f"{pattern}: drop, each layer pruned alone", fontsize=9)
    if not gains:
        gained.set_axis_off()
        both.set_axis_off()
        return
    _bars(gained, [("", gains.get(r["layer"]), None) for r in rows], _GAIN)
    gained.set_title(f"us gained in {ways[0]['precision']}", fontsize=9)
    _scatter(both, [(gains[r["layer"]], number(r["drop"]), r) for r in rows if r["layer"] in gains])
    both.set_xlabel("us gained", fontsize=8)
    both.set_title("drop over gain", fontsize=9)


def _bars(axes: Axes, rows: Sequence[tuple[str, float | None, float | None]], colour: str) -> None:
    places = range(len(rows))
    values = [0.0 if value is None else value for _, value, _ in rows]
    errors = [error or 0.0 for _, _, error in rows]
    axes.barh(places, values, xerr=errors if any(errors) else None, color=colour, height=0.72)
    axes.set_yticks(places, [name for name, _, _ in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color=_SOFT, linewidth=0.8)
    for place, (_, value, _) in enumerate(rows):
        if value is None:
            axes.text(0, place, " not known", fontsize=7, va="center", color=_SOFT)
    _plain(axes)


def _scatter(axes: Axes, rows: Sequence[tuple[float, float, Mapping[str, Any]]]) -> None:
    finite = [(x, y, row) for x, y, row in rows if math.isfinite(y)]
    axes.scatter([x for x, _, _ in finite], [y for _, y, _ in finite], s=16, color=_COST)
    axes.axhline(0, color=_SOFT, linewidth=0.8)
    axes.margins(0.08, 0.1)
    for x, y, row in finite[:_NAMED]:
        axes.annotate(_short(row["layer"]), (x, y), (5, 3), textcoords="offset points", fontsize=7)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.grid(axis="x", color="#e3e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"...{name[3 - _LETTERS :]}"


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(temporary, dpi=_DPI, format="png")
        temporary.replace(path)
    except OSError as e:
        raise InputError(f"cannot write {path}", [str(e)], "name a file in another folder") from e

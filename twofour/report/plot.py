"""Plots as PNG: the same as the pages show, for papers, slides and terminals that show images."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from twofour.core.errors import InputError
from twofour.report.charts import ending, place_labels
from twofour.report.sensitivity import Document, number

_COST, _GAIN, _SOFT = "#c8452e", "#2b7a58", "#5d6772"
_ROW_INCHES, _LEAST_INCHES, _MOST_INCHES = 0.17, 3.6, 40.0
_DPI, _NAMED, _LETTERS = 130, 8, 34
_Point = tuple[float, float, Mapping[str, Any]]
_ZOOM = 1.6  # letters of charts.py to points of 7


def plot_sensitivity(document: Document, path: str | os.PathLike[str]) -> None:
    """Draws, for each pattern, the drop of each layer beside its gain, and one over the other.

    Args:
        document: of `twofour sensitivity --json`.
        path: of the PNG file.

    Raises:
        InputError: it cannot be written.
    """
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # shown as boxes
        _save(_figure(document), Path(path))


def _figure(document: Document) -> Figure:
    """A row for each pattern; names are texts, a $ in them no formula."""
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
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for row, pattern, cases in zip(axes, patterns, parts, strict=True):
        _name_worst(row[2], _points(document, pattern, cases))
    return figure


def _draw(
    axes: Sequence[Axes], document: Document, pattern: str, cases: Sequence[Mapping[str, Any]]
) -> None:
    """Bars of drops, bars of gains, drops over gains; the worst layer on top."""
    ways = [way for way in document["tradeoffs"] if way["pattern"] == pattern]
    gains = _gains(document, pattern)
    rows = sorted(cases, key=lambda case: -number(case["drop"]))
    drops, gained, both = axes
    _bars(drops, [(ending(r["layer"], _LETTERS), r["drop"], r["drop_error"]) for r in rows], _COST)
    drops.set_title(f"{pattern}: drop, each layer pruned alone", fontsize=9)
    if not gains:
        gained.set_axis_off()
        both.set_axis_off()
        return
    _bars(gained, [("", gains.get(r["layer"]), None) for r in rows], _GAIN)
    gained.set_title(f"us gained in {ways[0]['precision']}", fontsize=9)
    _scatter(both, _points(document, pattern, cases))
    both.set_xlabel("us gained", fontsize=8)
    both.set_title("drop over gain", fontsize=9)


def _gains(document: Document, pattern: str) -> dict[str, float]:
    ways = [way for way in document["tradeoffs"] if way["pattern"] == pattern]
    return {each["layer"]: each["gain_us"] for way in ways for each in way["gains"]}


def _points(document: Document, pattern: str, cases: Sequence[Mapping[str, Any]]) -> list[_Point]:
    """Gain, drop and layer, the worst first; those without a gain or a number left out."""
    gains = _gains(document, pattern)
    rows = sorted(cases, key=lambda case: -number(case["drop"]))
    known = [(gains[r["layer"]], number(r["drop"]), r) for r in rows if r["layer"] in gains]
    return [(x, y, row) for x, y, row in known if math.isfinite(y)]


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


def _scatter(axes: Axes, rows: Sequence[_Point]) -> None:
    axes.scatter([x for x, _, _ in rows], [y for _, y, _ in rows], s=16, color=_COST)
    axes.axhline(0, color=_SOFT, linewidth=0.8)
    axes.margins(0.08, 0.1)
    _plain(axes)


def _name_worst(axes: Axes, rows: Sequence[_Point]) -> None:
    """Names beside the worst points, none over another; called when places are final."""
    scale = 72 / axes.figure.dpi
    height = axes.bbox.height * scale
    pixels = [axes.transData.transform((x, y)) * scale for x, y, _ in rows]
    left, bottom = axes.bbox.x0 * scale, axes.bbox.y0 * scale
    points = [
        (_ZOOM * (x - left), _ZOOM * (height - (y - bottom)), ending(row["layer"], _LETTERS), "")
        for (x, y), (_, _, row) in zip(pixels, rows, strict=True)
    ]
    for point in place_labels(points, _NAMED, _ZOOM * axes.bbox.width * scale):
        if point.label is not None:
            x, y, side = point.label
            place = (x / _ZOOM / scale / axes.bbox.width, 1 - y / _ZOOM / height)
            align = "left" if side == "start" else "right"
            axes.text(*place, point.name, transform=axes.transAxes, fontsize=7, ha=align)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.grid(axis="x", color="#e3e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(temporary, dpi=_DPI, format="png")
        temporary.replace(path)
    except OSError as e:
        raise InputError(f"cannot write {path}", [str(e)], "name a file in another folder") from e

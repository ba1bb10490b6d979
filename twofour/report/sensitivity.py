"""The page of `twofour sensitivity`: what each layer costs, what it gains, what to leave dense."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from twofour.core.version import __version__
from twofour.report.charts import bar, ending, place_labels, scale_of
from twofour.report.page import render, write_page

Document = Mapping[str, Any]
_ROW, _TOP = 17, 34
_DROP, _GAIN = (210.0, 600.0), (660.0, 880.0)  # left and right end of each column of bars
_PLOT = (46.0, 455.0, 26.0, 250.0)  # left, right, top, bottom of a plot
_NAMED = 10
_LETTERS = 32


def write_sensitivity(document: Document, path: str | os.PathLike[str]) -> None:
    """Writes the page.

    Args:
        document: of `twofour sensitivity --json`.
        path: of the HTML file.

    Raises:
        InputError: it cannot be written.
    """
    write_page(path, sensitivity_page(document))


def sensitivity_page(document: Document) -> str:
    """The page as HTML."""
    ways = {way["pattern"]: way for way in document["tradeoffs"]}
    patterns = dict.fromkeys(case["pattern"] for case in document["cases"])
    parts = [_part(document, pattern, ways.get(pattern)) for pattern in patterns]
    content = {"found": document, "parts": parts, "version": __version__, "title": "Sensitivity"}
    return render("sensitivity.html", content)


def _part(document: Document, pattern: str, way: Document | None) -> dict[str, Any]:
    """All that is shown of one pattern."""
    gains = {each["layer"]: each["gain_us"] for each in way["gains"]} if way else {}
    steps = {step["layer"]: step for step in way["steps"]} if way else {}
    cases = [case for case in document["cases"] if case["pattern"] == pattern]
    rows = [
        {
            **case,
            "words": _drop(case),
            "gain_us": gains.get(case["layer"]),
            "rate": steps.get(case["layer"], {}).get("drop_per_us"),
        }
        for case in sorted(cases, key=lambda case: -number(case["drop"]))
    ]
    return {
        "pattern": pattern,
        "way": way,
        "rows": rows,
        "left": [each for each in document["left"] if each["pattern"] == pattern],
        "bars": _bars(rows, known=way is not None),
        "scatter": _scatter(rows) if way else None,
        "curve": _curve(way) if way and way["steps"] else None,
    }


def number(value: float | None) -> float:
    """A drop of a document: infinite where it has none, because the network gave no number."""
    return math.inf if value is None else value


def _bars(rows: Sequence[Document], *, known: bool) -> dict[str, Any]:
    """A row for each layer: its drop, and beside it its gain."""
    errors = [row["drop_error"] or 0.0 for row in rows]
    drops = [number(row["drop"]) for row in rows]
    ends = [d + s * e for d, e in zip(drops, errors, strict=True) for s in (-1, 1)]
    drop = scale_of(ends, *_DROP)
    gain = scale_of([row["gain_us"] or 0.0 for row in rows], *_GAIN)
    lines = [
        {
            "y": _TOP + _ROW * index,
            "name": row["layer"],
            "short": ending(row["layer"], _LETTERS),
            "drop": bar(drop, number(row["drop"]), row["drop_error"], row["words"]),
            "gain": bar(gain, row["gain_us"], None, f"{row['gain_us']:.2f} us")
            if row["gain_us"] is not None
            else None,
        }
        for index, row in enumerate(rows)
    ]
    height = _TOP + _ROW * len(rows) + 8
    return {"lines": lines, "drop": drop, "gain": gain if known else None, "height": height}


def _drop(row: Document) -> str:
    if row["drop"] is None:
        return "no number"
    error = "" if row["drop_error"] is None else f" \u00b1{row['drop_error']:.2g}"
    return f"{row['drop']:+.3g}{error}"


def _scatter(rows: Sequence[Document]) -> dict[str, Any]:
    """Each layer: its drop over its gain. The names are those of the worst."""
    left, right, top, bottom = _PLOT
    known = [row for row in rows if row["gain_us"] is not None]
    x = scale_of([row["gain_us"] for row in known], left, right)
    y = scale_of([number(row["drop"]) for row in known], bottom, top)
    points = [
        (
            x.at(row["gain_us"]),
            y.at(number(row["drop"])),
            row["layer"],
            f"{row['words']}, {row['gain_us']:.2f} us",
        )
        for row in known
    ]
    return {
        "x": x,
        "y": y,
        "points": place_labels(points, _NAMED, right),
        "measured": [],
        "plot": _PLOT,
    }


def _curve(way: Document) -> dict[str, Any]:
    """The estimated drop over the gain, layer by layer, and what was measured."""
    left, right, top, bottom = _PLOT
    steps = way["steps"]
    drops = [number(step["total_drop"]) for step in steps]
    measured = [number(some["drop"]) for some in way["together"]]
    x = scale_of([step["total_gain_us"] for step in steps], left, right)
    y = scale_of([*drops, *measured], bottom, top)

    def point(count: int, drop: float, words: str) -> tuple[float, float, str, str]:
        us = steps[count - 1]["total_gain_us"]
        return x.at(us), y.at(drop), f"{count} layers", f"{us:.1f} us, {words}"

    estimated = [point(k + 1, drop, f"{drop:.3g} estimated") for k, drop in enumerate(drops)]
    known = [
        point(some["count"], number(some["drop"]), f"{_drop(some)} measured")
        for some in way["together"]
    ]
    return {
        "x": x,
        "y": y,
        "points": place_labels(estimated, 0, right),
        "measured": place_labels(known, len(known), (left + right) / 3),
        "plot": _PLOT,
    }

"""The page of `twofour search`: the front, and what each layer became and could have been."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twofour.core.version import __version__
from twofour.report.charts import Scale, ending, place_labels, scale_of
from twofour.report.page import render, write_page

Document = Mapping[str, Any]
_PLOT = (56.0, 900.0, 26.0, 380.0)  # left, right, top, bottom
_ROW, _TOP = 17, 34
_TIMES = (230.0, 880.0)  # left and right end of the column of times
_NAMED, _LETTERS, _CELL_LETTERS = 8, 34, 60
_EVERYTHING = "everything"
_LEAST_US = 1e-3
_ROUND = (1, 1.5, 2, 3, 4, 5, 6, 8)
_APART = 40.0  # pixels between two ticks


def write_search(document: Document, path: str | os.PathLike[str]) -> None:
    """Writes the page.

    Args:
        document: of `twofour search --json`.
        path: of the HTML file.

    Raises:
        InputError: it cannot be written.
    """
    write_page(path, search_page(document))


def search_page(document: Document) -> str:
    """The page as HTML."""
    points = [_point(document, index) for index in range(len(document["points"]))]
    answer = document["answer"]
    content = {
        "title": f"{document['model']}, searched",
        "found": document,
        "points": sorted(points, key=lambda point: float(point["latency_us"])),
        "best": None if answer is None else points[answer],
        "unseen": None if document["unseen"] is None else _drop(document["unseen"]),
        "plot": _plot(document, points),
        "choices": list(dict.fromkeys(c for unit in document["units"] for c in unit["times_us"])),
        "units": [_unit(unit) for unit in document["units"]],
        "layers": _layers(document["units"]),
        "version": __version__,
    }
    return render("search.html", content)


def _point(document: Document, index: int) -> dict[str, Any]:
    point = document["points"][index]
    number, _, name = point["name"].partition(", ")
    return {
        **point,
        "number": number if name else "",
        "label": name or point["name"],
        "is_answer": index == document["answer"],
        "words": _drop(point),
        "layers": ", ".join(f"{count} {text}" for text, count in point["counts"].items()),
    }


def _drop(point: Document) -> str:
    if point["drop"] is None:
        return "no number"
    error = "" if point["drop_error"] is None else f" \u00b1{point['drop_error']:.2g}"
    return f"{point['drop']:+.3g}{error}"


def _plot(document: Document, points: Sequence[Document]) -> dict[str, Any]:
    """The metric of each engine over its latency, the front joined."""
    left, right, top, bottom = _PLOT
    known = [point for point in points if point["figure"] is not None]
    x = _Times.of([point["latency_us"] for point in known], left, right)
    y = _zoomed([*(point["figure"] for point in known), document["dense"]], bottom, top)
    sides = sorted(known, key=lambda p: (not p["is_answer"], _EVERYTHING not in p["label"]))
    placed = place_labels(
        [
            (
                x.at(point["latency_us"]),
                y.at(point["figure"]),
                "the answer" if point["is_answer"] else point["label"],
                f"{point['latency_us']:.1f} us, {document['metric']} {point['figure']:.4g}, "
                f"drop {point['words']}: {point['layers']}",
            )
            for point in sides
        ],
        sum(p["is_answer"] or _EVERYTHING in p["label"] for p in sides),
        right,
    )
    marks = [
        {
            "point": mark,
            "kind": "cost" if point["is_answer"] else "gain" if point["on_front"] else "mark",
            "radius": 6 if point["is_answer"] else 4,
        }
        for mark, point in zip(placed, sides, strict=True)
    ]
    front = sorted((p for p in known if p["on_front"]), key=lambda p: float(p["latency_us"]))
    return {
        "x": x,
        "y": y,
        "marks": marks,
        "front": [(x.at(p["latency_us"]), y.at(p["figure"])) for p in front],
        "bound": _bound(document, x, y),
        "plot": _PLOT,
    }


@dataclass(frozen=True)
class _Times:
    """Times on a logarithmic scale: what is half as long is as far away everywhere."""

    scale: Scale

    @staticmethod
    def of(times: Sequence[float], first: float, last: float) -> _Times:
        """From below the least to above the largest."""
        ends = math.log(min(times) * 0.93), math.log(max(times) * 1.07)
        return _Times(Scale(*ends, first, last))

    def at(self, us: float) -> float:
        """The pixel of a time."""
        return self.scale.at(math.log(max(us, _LEAST_US)))

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Pixel and text of round times, none over another."""
        least, most = (math.exp(end) for end in (self.scale.least, self.scale.most))
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)))
        round_ = [step * 10.0**power for power in powers for step in _ROUND]
        found: list[tuple[float, str]] = []
        for us in (each for each in round_ if least <= each <= most):
            if not found or self.at(us) - found[-1][0] > _APART:
                found.append((self.at(us), f"{us:g}"))
        return tuple(found)


def _zoomed(values: Sequence[float], first: float, last: float) -> Scale:
    """A scale of the values alone: a metric of 90 that falls to 88 would hide in one from 0."""
    least, most = min(values), max(values)
    room = 0.08 * (most - least) or 0.5
    return Scale(least - room, most + room, first, last)


def _bound(document: Document, x: _Times, y: Scale) -> tuple[float, float, float, float]:
    """A line: both ends."""
    left, right, top, bottom = _PLOT
    if document["max_drop"] is None:
        at = x.at(document["max_latency_us"])
        return at, top, at, bottom
    sign = -1 if document["higher_is_better"] else 1
    at = y.at(document["dense"] + sign * document["max_drop"])
    return left, at, right, at


def _unit(unit: Document) -> dict[str, Any]:
    parts = [f"{part} {_small(error)}" for part, error in unit["errors"].items()]
    return {
        **unit,
        "shown": ending(unit["name"], _CELL_LETTERS),
        "more": len(unit["layers"]) - 1,
        "cost": ", ".join(parts),
    }


def _small(error: float | None) -> str:
    return "no number" if error is None or math.isinf(error) else f"{error:.2g}"


def _layers(units: Sequence[Document]) -> dict[str, Any]:
    """A row for each unit: the time of each choice, and the one that was taken."""
    scale = scale_of([us for unit in units for us in unit["times_us"].values()], *_TIMES)
    lines = [
        {
            "y": _TOP + _ROW * at,
            "name": unit["name"],
            "short": ending(unit["name"], _LETTERS),
            "dots": [
                (scale.at(us), choice, f"{us:.2f} us", choice == unit["choice"])
                for choice, us in unit["times_us"].items()
            ],
            "from": scale.at(min(unit["times_us"].values())),
            "to": scale.at(max(unit["times_us"].values())),
        }
        for at, unit in enumerate(units)
    ]
    return {"scale": scale, "lines": lines, "height": _TOP + _ROW * len(units) + 8}

"""The heat map of a run: what each layer costs in each pattern and precision, tried alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twofour.report.charts import last_parts
from twofour.report.outcomes import read_record
from twofour.report.quantities import digits, signed, with_unit

_LETTERS = 60
_STRONGEST = 62.0
"""Percent of colour in the darkest cell: text over it stays readable."""


@dataclass(frozen=True)
class Tried:
    """One layer in one form, all others as they were.

    Attributes:
        layer: its name.
        pattern: pattern, or pattern and precision.
        drop: of the metric; None where the network gave no number.
        drop_error: its standard error.
    """

    layer: str
    pattern: str
    drop: float | None
    drop_error: float | None


@dataclass(frozen=True)
class Untried:
    """A layer that was not tried in one form, and why."""

    layer: str
    pattern: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What is read of a scan's document."""

    metric: str
    unit: str
    dense: float | None
    samples: int | None
    cases: tuple[Tried, ...]
    left: tuple[Untried, ...]


def heat_map(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table; None where nothing was tried.

    Args:
        document: of `twofour sensitivity --json`.

    Raises:
        ValueError: it is none.
    """
    scan: Scan = read_record(Scan, document, "sensitivity")
    if not scan.cases:
        return None
    places = [(case.layer, case.pattern) for case in scan.cases]
    places += [(each.layer, each.pattern) for each in scan.left]
    names = list(dict.fromkeys(layer for layer, _ in places))
    columns = list(dict.fromkeys(pattern for _, pattern in places))
    found = {(case.layer, case.pattern): case for case in scan.cases}
    left = {(each.layer, each.pattern): each.reason for each in scan.left}
    drops = [case.drop for case in scan.cases if case.drop is not None]
    worst = max((drop for drop in drops), default=0.0)
    rows = [
        {
            "name": name,
            "shown": last_parts(name, _LETTERS) or "no name",
            "worst": max((_order(found.get((name, each))) for each in columns), default=-math.inf),
            "cells": [
                _cell(found.get((name, each)), left.get((name, each), ""), worst, scan.unit)
                for each in columns
            ],
        }
        for name in names
    ]
    points = "points" if scan.unit == "%" else scan.unit
    return {
        "why": "",
        "columns": columns,
        "rows": rows,
        "metric": scan.metric or "the metric",
        "dense": with_unit(scan.dense, scan.unit),
        "samples": scan.samples or 0,
        "points": points,
        "ends": ("0", f"{digits(worst)} {points}".strip()) if worst > 0 else None,
        "strongest": _STRONGEST,
        "left": bool(scan.left),
    }


def _order(case: Tried | None) -> float:
    """By how bad it is: no number is worse than any."""
    if case is None:
        return -1e200
    return 1e200 if case.drop is None else case.drop


def _cell(case: Tried | None, reason: str, worst: float, unit: str) -> dict[str, Any]:
    """Its words, and how strong its colour is: from 0 to the drop of the worst."""
    if case is None:
        return {
            "words": "\u2013",
            "kind": "none",
            "title": reason,
            "strength": 0.0,
            "value": -1e200,
        }
    error = case.drop_error
    title = f"\u00b1{digits(error, 2)} standard error" if error is not None else ""
    if case.drop is None:
        words = {"words": "no number", "kind": "sure", "strength": _STRONGEST}
        return {**words, "title": "the network gave no number", "value": 1e200}
    strength = _STRONGEST * math.sqrt(max(case.drop, 0.0) / worst) if worst > 0 else 0.0
    chance = error is not None and abs(case.drop) < 2 * error
    return {
        "words": signed(case.drop, unit),
        "kind": "chance" if chance else "better" if case.drop < 0 else "sure",
        "title": title,
        "strength": round(strength, 1),
        "value": case.drop,
    }


@dataclass(frozen=True)
class Searched:
    """A layer of a search, or several that share a choice.

    Attributes:
        name: of it.
        drops: pattern or precision -> drop of the metric with it alone.
    """

    name: str
    drops: dict[str, float | None]


@dataclass(frozen=True)
class SearchDocument:
    """What is read of a search's document."""

    metric: str
    unit: str
    dense: float | None
    samples: int | None
    units: tuple[Searched, ...]


def search_map(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of what a search measured; None where it measured nothing.

    Args:
        document: of `twofour search --json`.

    Raises:
        ValueError: it is none.
    """
    found: SearchDocument = read_record(SearchDocument, document, "search")
    cases = [
        {"layer": unit.name, "pattern": part, "drop": drop}
        for unit in found.units
        for part, drop in unit.drops.items()
    ]
    known = {name: getattr(found, name) for name in ("metric", "unit", "dense", "samples")}
    return heat_map({**known, "cases": cases})

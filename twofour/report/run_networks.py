"""The networks of a run: accuracy against latency, and the table of pattern by precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from twofour.core.outcome import Cell, Figure, Outcome, Point
from twofour.report.charts import (
    Scale,
    last_parts,
    place_labels,
    round_values,
    scale_between,
    scale_of,
)
from twofour.report.quantities import amount, energy, rounded, signed, size, time, times, with_unit

_PLOT = (58.0, 910.0, 20.0, 376.0)  # left, right, top, bottom
_LETTERS = 30
_KINDS = ("candidate", "baseline", "peer", "variant", "front")
_NAMED = 24
_NAMES = {
    "candidate": "this network",
    "baseline": "baseline",
    "peer": "other engines",
    "variant": "variants",
    "front": "front of the search",
}
_LEAST_US = 1e-6
_WIDE = 20.0
"""Latencies that differ by more are drawn on a logarithmic axis."""


def plot(outcome: Outcome) -> dict[str, Any] | None:
    """Accuracy over latency; None without a point that can be drawn."""
    known = [p for p in outcome.points if _drawable(p)]
    known.sort(key=lambda p: _KINDS.index(p.kind) if p.kind in _KINDS else len(_KINDS))
    if not known:
        return None
    unit = outcome.task.unit if outcome.task is not None else ""
    left, right, top, bottom = _PLOT
    across = _Across(known, left, right)
    limits = _limits(outcome)
    values = [end for p in known for end in (p.figure.value, *_ends(p.figure))]
    up = scale_between([*values, *([limits[1]] if limits else [])], bottom, top)
    spots = [(across.at(p.latency_us), up.at(p.figure.value)) for p in known]
    named = [(*s, last_parts(p.name, _LETTERS), "") for s, p in zip(spots, known, strict=True)]
    labelled = sum(p.kind != "front" for p in known)
    placed = place_labels(named, min(labelled, _NAMED), right)
    points = [
        {
            "kind": p.kind if p.kind in _KINDS else "variant",
            "x": spot.x,
            "y": spot.y,
            "ends": [up.at(end) for end in _ends(p.figure)],
            "label": spot.label,
            "short": spot.name,
            "words": f"{p.name}: {figure_words(p.figure, unit)}, {time(p.latency_us)}",
        }
        for p, spot in zip(known, placed, strict=True)
    ]
    front = sorted((p["x"], p["y"]) for p in points if p["kind"] == "front")
    used = {point["kind"] for point in points}
    return {
        "box": _PLOT,
        "x_ticks": across.ticks,
        "logarithmic": across.logarithmic,
        "y_ticks": [(up.at(v), rounded(v, "")) for v in round_values(up.least, up.most)],
        "points": list(reversed(points)),
        "front": front,
        "legend": [(kind, _NAMES[kind]) for kind in _KINDS if kind in used],
        "asked": _asked(limits, across, up) if limits else None,
        "metric": outcome.task.metric if outcome.task is not None else "figure",
        "unit": unit,
    }


class _Across:
    """The axis of latency: from 0, or logarithmic where latencies differ by much."""

    def __init__(self, points: Sequence[Point], left: float, right: float) -> None:
        latencies = [p.latency_us for p in points]
        self.logarithmic = max(latencies) > _WIDE * min(latencies)
        shown = [math.log10(us) for us in latencies] if self.logarithmic else latencies
        make = scale_between if self.logarithmic else scale_of
        self._scale: Scale = make(shown, left, right)

    def at(self, us: float) -> float:
        """The pixel."""
        return self._scale.at(math.log10(max(us, _LEAST_US)) if self.logarithmic else us)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and texts of round latencies."""
        ends = self._scale.least, self._scale.most
        if not self.logarithmic:
            return [(self.at(us), rounded(us, "us")) for us in round_values(*ends)]
        powers = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
        steps = (1, 2, 5) if ends[1] - ends[0] < 3 else (1,)
        values = [step * 10.0**power for power in powers for step in steps]
        return [
            (self.at(us), rounded(us, "us"))
            for us in values
            if ends[0] <= math.log10(us) <= ends[1]
        ]


def _drawable(point: Point) -> bool:
    return math.isfinite(point.figure.value) and _LEAST_US <= point.latency_us < math.inf


def _ends(figure: Figure) -> list[float]:
    """Both ends of the interval, or nothing."""
    ends = [end for end in (figure.low, figure.high) if end is not None]
    return ends if len(ends) == 2 else []


def _limits(outcome: Outcome) -> tuple[float, float, bool] | None:
    """Latency and figure that the gate asks for, and whether figures above it pass.

    None unless it asks for both.
    """
    base = next((p for p in outcome.points if p.kind == "baseline" and _drawable(p)), None)
    checks = {check.name: check for check in outcome.checks}
    if base is None or outcome.task is None or not {"accuracy", "speed"} <= set(checks):
        return None
    drop, speed = checks["accuracy"], checks["speed"]
    if drop.unit != "points" or outcome.task.unit != "%" or not speed.limit > 0:
        return None
    if not math.isfinite(drop.limit):
        return None
    more = outcome.task.higher_is_better
    least = base.figure.value - (drop.limit if more else -drop.limit)
    return base.latency_us / speed.limit, least, more


def _asked(limits: tuple[float, float, bool], across: _Across, up: Scale) -> dict[str, float]:
    """The part of the plot that the gate allows: fast enough, good enough."""
    left, _, top, bottom = _PLOT
    x, y = across.at(limits[0]), up.at(limits[1])
    high, low = (top, y) if limits[2] else (y, bottom)
    return {"x": left, "y": high, "width": round(x - left, 2), "height": round(low - high, 2)}


def figure_words(figure: Figure | None, unit: str) -> str:
    """91.23 % (90.1 to 92.0)."""
    if figure is None:
        return ""
    words = with_unit(figure.value, unit) or "no number"
    interval = interval_words(figure, unit)
    return f"{words} ({interval})" if interval else words


def interval_words(figure: Figure | None, unit: str) -> str:
    """90.1 to 92.0; "" where it is not known."""
    ends = _ends(figure) if figure is not None else []
    return " to ".join(amount(end, unit) for end in ends)


def cells(outcome: Outcome) -> dict[str, Any] | None:
    """The table of networks; None without one."""
    if not outcome.cells:
        return None
    unit = outcome.task.unit if outcome.task is not None else ""
    base = next((c for c in outcome.cells if (c.weights, c.precision) == _BASE), None)
    most = {name: _most(outcome.cells, name) for name in ("latency_us", "engine_bytes")}
    chosen = [p for p in outcome.points if p.kind == "candidate"]
    rows = [_cell(each, base, unit, most, chosen, outcome.cells) for each in outcome.cells]
    made = [row for row in rows if not row["note"]]
    return {
        "rows": rows,
        "metric": outcome.task.metric if outcome.task is not None else "figure",
        "joules": any(row["joules"] for row in made),
        "memory": any(row["memory"] for row in made),
        "chosen": any(row["chosen"] for row in rows),
        "based": base is not None,
    }


_BASE = ("dense", "float32")


def _most(found: Sequence[Cell], name: str) -> float:
    return max((getattr(cell, name) or 0.0 for cell in found), default=0.0)


def _cell(
    cell: Cell,
    base: Cell | None,
    unit: str,
    most: dict[str, float],
    chosen: Sequence[Point],
    every: Sequence[Cell],
) -> dict[str, Any]:
    moved = None
    if (
        base is not None
        and cell is not base
        and cell.figure is not None
        and base.figure is not None
    ):
        moved = cell.figure.value - base.figure.value
    dense = next((c for c in every if (c.weights, c.precision) == ("dense", cell.precision)), None)
    spread = [cell.latency_low_us, cell.latency_high_us]
    return {
        "weights": cell.weights,
        "precision": cell.precision,
        "note": cell.note or ("" if cell.figure or cell.latency_us else "not made"),
        "figure": with_unit(cell.figure.value, unit) if cell.figure is not None else "",
        "interval": interval_words(cell.figure, unit),
        "moved": signed(moved, unit) if moved is not None else "",
        "latency": time(cell.latency_us),
        "spread": " to ".join(time(us) for us in spread if us) if all(spread) else "",
        "bar": _share(cell.latency_us, most["latency_us"]),
        "speed": times(_ratio(base.latency_us if base else None, cell.latency_us)),
        "engine": size(cell.engine_bytes),
        "engine_bar": _share(cell.engine_bytes, most["engine_bytes"]),
        "engine_of": _of(cell.engine_bytes, base.engine_bytes if base else None),
        "weight": size(cell.weight_bytes),
        "weight_of": _of(cell.weight_bytes, dense.weight_bytes)
        if dense is not None and dense is not cell
        else "",
        "memory": size(cell.memory_bytes),
        "joules": energy(cell.joules),
        "chosen": any(p.latency_us == cell.latency_us and p.figure == cell.figure for p in chosen),
    }


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _of(part: float | None, whole: float | None) -> str:
    ratio = _ratio(part, whole)
    return times(ratio) if ratio is not None and part != whole else ""


def _share(value: float | None, most: float) -> float:
    """Percent of the largest."""
    return round(100 * value / most, 1) if value and most else 0.0

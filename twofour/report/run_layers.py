"""The layers of a run: where the time goes, the slowest products, and the table of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from twofour.core.outcome import LayerRow
from twofour.core.plan import is_sparse
from twofour.report.charts import ending, last_parts, scale_of
from twofour.report.quantities import digits, percent, time, times

_BARS = (226.0, 880.0)
_ROW, _TOP, _THIN = 38, 34, 10
_SHOWN = 16
_LETTERS = 34
_CELL_LETTERS, _NAME_LETTERS = 120, 46
FALLBACK = "onnxruntime"
KINDS = ("sparse", "dense", "other", "outside")
_SHORT = {"float32": "f32", "bfloat16": "bf16"}


def kind_of(row: LayerRow) -> str:
    """One of KINDS: skips zeros, a product that does not, another kernel, ONNX Runtime."""
    if row.choice.split(" ")[0] == FALLBACK:
        return "outside"
    if is_sparse(row.choice):
        return "sparse"
    return "dense" if row.pattern else "other"


def words_of(row: LayerRow) -> str:
    """What it runs as: "2:4 int8", "dense f32", "int8", "ONNX Runtime"."""
    kind, precision = kind_of(row), _SHORT.get(row.precision, row.precision)
    if kind == "outside":
        return "ONNX Runtime"
    named = {"sparse": row.choice.split(" ")[0], "dense": "dense", "other": ""}[kind]
    if kind == "sparse" and row.pattern.startswith(named):
        named = row.pattern
    return f"{named} {precision}".strip()


def layers(rows: Sequence[LayerRow]) -> dict[str, Any] | None:
    """All that is shown of them; None without any."""
    if not rows:
        return None
    whole = math.fsum(_known(row.time_us) for row in rows)
    most = max((_known(row.share) for row in rows), default=0.0)
    return {
        "rows": [_row(place, row, most) for place, row in enumerate(rows)],
        "groups": _groups(rows, whole),
        "whole": time(whole) if whole else "",
        "bars": _bars(rows),
        "floats": any(row.float_us is not None for row in rows),
        "roofline": any(row.roofline is not None for row in rows),
        "sparse": any(row.sparse_us is not None for row in rows),
    }


def _known(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _row(place: int, row: LayerRow, most: float) -> dict[str, Any]:
    gain = row.dense_us / row.sparse_us if row.dense_us and row.sparse_us else None
    return {
        "place": place,
        "name": row.name,
        "shown": last_parts(row.name, _NAME_LETTERS) or "no name",
        "op": ending(row.op, _CELL_LETTERS),
        "shape": ending(row.shape, _CELL_LETTERS),
        "runs_as": words_of(row),
        "kind": kind_of(row),
        "choice": ending(row.choice, _CELL_LETTERS),
        "reason": row.reason,
        "time": (row.time_us, time(row.time_us)),
        "share": (row.share, percent(row.share)),
        "bar": round(100 * _known(row.share) / most, 1) if most else 0.0,
        "dense": (row.dense_us, time(row.dense_us)),
        "sparse": (row.sparse_us, time(row.sparse_us)),
        "float": (row.float_us, time(row.float_us)),
        "gain": (gain, times(gain)),
        "roofline": (row.roofline, percent(row.roofline)),
    }


def _groups(rows: Sequence[LayerRow], whole: float) -> list[dict[str, Any]]:
    """Layers that run alike, together: how many, their time, where each begins in one bar."""
    found: dict[tuple[str, str], list[LayerRow]] = {}
    for row in rows:
        found.setdefault((kind_of(row), words_of(row)), []).append(row)
    groups: list[dict[str, Any]] = []
    ordered = sorted(found.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1]))
    start = 0.0
    for (kind, words), some in ordered:
        us = math.fsum(_known(row.time_us) for row in some)
        share = 100 * us / whole if whole else 0.0
        groups.append(
            {
                "kind": kind,
                "words": words if kind != "other" else f"other kernels, {words or 'no type'}",
                "count": len(some),
                "time": time(us) if us else "",
                "share": percent(share / 100) if us else "",
                "start": round(start, 3),
                "width": round(share, 3),
                "shade": sum(group["kind"] == kind for group in groups),
            }
        )
        start += share
    return groups


def _bars(rows: Sequence[LayerRow]) -> dict[str, Any] | None:
    """The slowest layers that kernels competed for: the best time of each kind."""
    raced = [
        (place, row)
        for place, row in enumerate(rows)
        if sum(us is not None for us in (row.dense_us, row.sparse_us, row.float_us)) >= 2
    ]
    raced.sort(key=lambda pair: -_known(pair[1].time_us))
    shown = raced[:_SHOWN]
    if not shown:
        return None
    every = [us for _, row in shown for us in (row.dense_us, row.sparse_us, row.float_us) if us]
    scale = scale_of(every, *_BARS)
    lines = [
        _line(place, row, scale.at, _TOP + _ROW * index) for index, (place, row) in enumerate(shown)
    ]
    return {
        "lines": lines,
        "more": len(raced) - len(shown),
        "ticks": [(x, f"{text} \u00b5s") for x, text in scale.ticks],
        "height": _TOP + _ROW * len(shown) + 6,
        "zero": scale.at(0.0),
        "floats": any(row.float_us is not None for _, row in shown),
    }


def _line(place: int, row: LayerRow, at: Callable[[float], float], y: float) -> dict[str, Any]:
    """The bars of one layer, below each other."""
    lower = row.precision != "float32"
    kinds = [("float", row.float_us, "f32")] if lower else []
    kinds += [("dense", row.dense_us, "dense"), ("sparse", row.sparse_us, "sparse")]
    known = [(kind, us, name) for kind, us, name in kinds if us is not None]
    bars = []
    top = y + (_ROW - len(known) * (_THIN + 1)) / 2
    for index, (kind, us, _) in enumerate(known):
        bars.append(
            {
                "kind": kind,
                "y": round(top + index * (_THIN + 1), 1),
                "height": _THIN,
                "width": round(max(at(us) - at(0.0), 0.0), 2),
                "end": at(us),
                "words": digits(us) if us >= 1 else f"{us:.2f}",
            }
        )
    said = ", ".join(f"{name} {time(us)}" for _, us, name in known)
    return {
        "place": place,
        "y": y,
        "middle": y + _ROW / 2 + 4,
        "short": last_parts(row.name, _LETTERS),
        "words": f"{row.name}: {said}",
        "bars": bars,
    }

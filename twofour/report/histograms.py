"""How well INT8 represents tensors, as rows and small histograms: of a page, or a part of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from twofour.report.charts import bar, ending, scale_of

Document = Mapping[str, Any]
CELL_LETTERS = 96
_BOX = (6.0, 254.0, 8.0, 78.0)  # left, right, top, bottom of a small histogram
_ROW, _TOP, _BARS = 17, 34, (210.0, 880.0)
_LETTERS = 32
_LEAST_CLIPPED = 1e-6


def decibels(value: float | None) -> float:
    """Of a document: infinite where it has none, because every value is exact."""
    return math.inf if value is None else value


def tensor_row(tensor: Document) -> dict[str, Any]:
    """A tensor, and its figures in words; `db` orders it, infinite where nothing is known."""
    known = tensor["seen"] is not None
    db = decibels(tensor["sqnr_db"])
    words = _db(db) if known else "not looked at"
    return {
        **tensor,
        "shown": ending(tensor["name"], CELL_LETTERS),
        "db": db,
        "words": words,
        "seen_words": _span(tensor["seen"]) if known else "",
        "kept_words": _span(tensor["kept"]),
        "clipped_words": percent(tensor["clipped"]),
        "worst_words": _channel(tensor),
    }


def _channel(tensor: Document) -> str:
    if tensor["kind"] == "activation":
        return ""
    return _db(decibels(tensor["worst_channel_db"]))


def _db(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f} dB"


def _span(ends: Sequence[float]) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"


def percent(share: float | None) -> str:
    """A share in words; "" for one that is not known."""
    if share is None:
        return ""
    if 0 < share < _LEAST_CLIPPED:
        return "<0.0001 %"
    return f"{100 * share:.3g} %"


def histogram(row: Document) -> dict[str, Any]:
    """A histogram: logarithms of counts over values, and the ends of what the scale keeps."""
    left, right, top, bottom = _BOX
    bins, kept = row["bins"], row["kept"]
    ends = (bins["low"], bins["high"], *kept)
    low, high = min(ends), max(ends)
    pixels = (right - left) / ((high - low) or 1.0)
    width = (bins["high"] - bins["low"]) / len(bins["counts"])
    most = math.log1p(max(bins["counts"]))
    inside: list[str] = []
    outside: list[str] = []
    for index, count in enumerate(bins["counts"]):
        if not count:
            continue
        start = bins["low"] + index * width
        height = (bottom - top) * math.log1p(count) / most
        x, step = left + (start - low) * pixels, max(width * pixels, 0.8)
        part = f"M{x:.1f} {bottom:g}v{-height:.1f}h{step:.2f}v{height:.1f}z"
        middle = start + width / 2
        (inside if kept[0] <= middle <= kept[1] else outside).append(part)
    return {
        **row,
        "short": ending(row["name"], _LETTERS),
        "inside": "".join(inside),
        "outside": "".join(outside),
        "lines": [round(left + (end - low) * pixels, 1) for end in kept],
        "zero": round(left - low * pixels, 1) if low <= 0 <= high else None,
        "ends": (f"{low:.3g}", f"{high:.3g}"),
        "box": _BOX,
    }


def layer_bars(layers: Sequence[Document]) -> dict[str, Any]:
    """A bar for each layer: its SQNR; none where it is exact."""
    values = [decibels(each["sqnr_db"]) for each in layers]
    scale = scale_of(values, *_BARS)
    lines = [
        {
            "y": _TOP + _ROW * index,
            "name": f"{each['layer']} ({each['op']})",
            "short": ending(each["layer"], _LETTERS),
            "drop": bar(scale, value, None, f"{_db(value)}, cosine {each['cosine']:.5f}"),
            "gain": None,
        }
        for index, (each, value) in enumerate(zip(layers, values, strict=True))
    ]
    height = _TOP + _ROW * len(layers) + 8
    return {"lines": lines, "drop": scale, "gain": None, "height": height}

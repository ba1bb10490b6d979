"""The fused graph of a run: nodes with their times, edges, and what each node says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from twofour.core.outcome import Edge, LayerRow
from twofour.report.charts import last_parts
from twofour.report.graph_places import Sizes, draw
from twofour.report.quantities import time
from twofour.report.run_layers import kind_of, words_of

_SIZES = Sizes()
_LETTERS = 20
_MOST_DRAWN = 4000
_STRONGEST = 60.0
_PRECISIONS = {"int8": "int8", "uint8": "int8", "bfloat16": "bf16", "float32": "f32"}


def graph(rows: Sequence[LayerRow], edges: Sequence[Edge]) -> dict[str, Any] | None:
    """The drawing; None without layers, and one that only says why where it cannot be drawn."""
    if not rows:
        return None
    count = len(rows)
    known = [each for each in edges if -1 <= each.source < count and -1 <= each.target < count]
    if not known:
        return {"why": "The engine does not say what its layers read: build it again."}
    if count > _MOST_DRAWN:
        return {"why": f"{count:,} layers are too many to draw; the table has them all."}
    ends = _Ends(known)
    links = list(dict.fromkeys(_links(known, ends, count)))
    forward = [(source, target) for source, target in links if source < target]
    total = len(ends.inputs) + count + len(ends.outputs)
    drawing = draw(total, forward, _SIZES)
    most = max((_known(row.share) for row in rows), default=0.0)
    nodes = [_layer(place, row, most) for place, row in enumerate(rows)]
    every = [
        *(_end(name, "input") for name in ends.inputs),
        *nodes,
        *(_end(name, "output") for name in ends.outputs),
    ]
    for number, (node, (x, y)) in enumerate(zip(every, drawing.nodes, strict=True)):
        node |= {"number": number, "x": x, "y": y}
    return {
        "why": "",
        "nodes": every,
        "edges": [
            {"source": source, "target": target, "path": path}
            for (source, target), path in zip(forward, drawing.paths, strict=True)
        ],
        "width": drawing.width,
        "height": drawing.height,
        "size": (_SIZES.width, _SIZES.height),
        "against": len(links) - len(forward),
        "kinds": list(dict.fromkeys(node["precision"] for node in nodes if node["precision"])),
        "sparse": any(node["kind"] == "sparse" for node in nodes),
        "outside": any(node["kind"] == "outside" for node in nodes),
        "timed": most > 0,
        "layers": count,
    }


class _Ends:
    """The model's inputs and outputs, as nodes before and behind the layers."""

    def __init__(self, edges: Sequence[Edge]) -> None:
        self.inputs = list(dict.fromkeys(e.tensor for e in edges if e.source == -1 != e.target))
        self.outputs = list(dict.fromkeys(e.tensor for e in edges if e.target == -1 != e.source))


def _links(edges: Sequence[Edge], ends: _Ends, count: int) -> list[tuple[int, int]]:
    """Numbers of nodes: inputs, layers, outputs."""
    first = len(ends.inputs)
    inputs = {name: place for place, name in enumerate(ends.inputs)}
    outputs = {name: first + count + place for place, name in enumerate(ends.outputs)}
    return [
        (
            inputs[edge.tensor] if edge.source == -1 else first + edge.source,
            outputs[edge.tensor] if edge.target == -1 else first + edge.target,
        )
        for edge in edges
        if (edge.source, edge.target) != (-1, -1) and edge.source != edge.target
    ]


def _known(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _layer(place: int, row: LayerRow, most: float) -> dict[str, Any]:
    share = _known(row.share)
    kind = kind_of(row)
    us = time(row.time_us)
    return {
        "row": place,
        "kind": kind,
        "precision": "outside" if kind == "outside" else _PRECISIONS.get(row.precision, "none"),
        "title": last_parts(row.name, _LETTERS) or row.op or "no name",
        "below": ", ".join(filter(None, (us, words_of(row)))) or row.op,
        "said": ", ".join(filter(None, (row.name, row.op, words_of(row), us))),
        "heat": round(_STRONGEST * math.sqrt(share / most), 1) if most and share > 0 else 0.0,
    }


def _end(name: str, kind: str) -> dict[str, Any]:
    return {
        "row": -1,
        "kind": kind,
        "precision": "",
        "title": last_parts(name, _LETTERS) or kind,
        "below": f"{kind} of the model",
        "said": f"{kind} {name}",
        "heat": 0.0,
    }

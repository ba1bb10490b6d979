"""How a run came about: its stages in time, its files and what each was made from, the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from twofour.core.outcome import Artifact, StageRecord, Surroundings
from twofour.report.charts import last_parts
from twofour.report.graph_places import Sizes, draw
from twofour.report.quantities import seconds, size

_TIMED = ("done", "reused", "failed")
_LETTERS, _NODE_LETTERS, _BELOW_LETTERS = 60, 23, 27
_MOST_DRAWN = 80
_SIZES = Sizes(width=188.0, height=40.0, across=12.0, down=26.0, gutter=30.0, aspect=1.2)


def stages(records: Sequence[StageRecord]) -> dict[str, Any] | None:
    """The stages one after the other; None without any."""
    if not records:
        return None
    took = [_seconds(each) for each in records]
    whole = math.fsum(took)
    rows, start = [], 0.0
    for each, length in zip(records, took, strict=True):
        rows.append(
            {
                "name": each.name,
                "status": each.status or "not known",
                "kind": each.status.replace(" ", "-") if each.status in _STATES else "none",
                "seconds": seconds(each.seconds) if each.status in _TIMED else "",
                "start": round(100 * start / whole, 2) if whole else 0.0,
                "width": round(100 * length / whole, 2) if whole else 0.0,
                "text": each.text,
                "key": each.key[:12],
                "settings": list(each.settings.items()),
            }
        )
        start += length
    again = math.fsum(t for t, each in zip(took, records, strict=True) if each.status == "reused")
    return {"rows": rows, "own": seconds(whole - again), "reused": seconds(again) if again else ""}


_STATES = (*_TIMED, "left out", "not reached")


def _seconds(stage: StageRecord) -> float:
    if stage.status not in _TIMED or not math.isfinite(stage.seconds):
        return 0.0
    return max(stage.seconds, 0.0)


def lineage(artifacts: Sequence[Artifact]) -> dict[str, Any] | None:
    """The files as a table and a graph; None without any."""
    if not artifacts:
        return None
    place_of = {each.path: place for place, each in enumerate(artifacts)}
    rows = [
        {
            "place": place,
            "path": each.path,
            "file": last_parts(_file(each), _LETTERS) or "no name",
            "kind": each.kind,
            "sha256": each.sha256,
            "short": each.sha256[:12],
            "size": size(each.size_bytes),
            "bytes": each.size_bytes,
            "stage": each.stage,
            "made_from": [_source(path, artifacts, place_of) for path in each.made_from],
        }
        for place, each in enumerate(artifacts)
    ]
    return {"rows": rows, "graph": _graph(artifacts, place_of)}


def _source(
    path: str, artifacts: Sequence[Artifact], place_of: Mapping[str, int]
) -> dict[str, Any]:
    """A file that another was made from, in a few words; its place in the table if it is there."""
    place = place_of.get(path)
    if place is None:
        return {"place": None, "words": last_parts(path, _LETTERS), "path": path}
    found = artifacts[place]
    words = f"{_file(found)} of {found.stage}" if found.stage else _file(found)
    return {"place": place, "words": last_parts(words, _LETTERS), "path": path}


def _graph(artifacts: Sequence[Artifact], place_of: Mapping[str, int]) -> dict[str, Any] | None:
    """What was made from what, drawn; None where that says nothing.

    Where there are engines, only what led to them: the figures that they gave stand in the table.
    """
    sources = [
        sorted({place_of[path] for path in each.made_from if path in place_of} - {place})
        for place, each in enumerate(artifacts)
    ]
    kept = _led_to([k for k, each in enumerate(artifacts) if each.kind == "engine"], sources)
    order = [place for place in _sorted(sources) if place in kept or not kept]
    if not any(sources[place] for place in order) or len(order) > _MOST_DRAWN:
        return None
    number = {place: index for index, place in enumerate(order)}
    edges = [
        (number[source], number[place])
        for place in order
        for source in sources[place]
        if number[source] < number[place]
    ]
    drawing = draw(len(order), edges, _SIZES)
    pairs = zip(order, drawing.nodes, strict=True)
    return {
        "nodes": [_node(artifacts[place], place, at) for place, at in pairs],
        "paths": drawing.paths,
        "width": drawing.width,
        "height": drawing.height,
        "size": (_SIZES.width, _SIZES.height),
        "left_out": len(artifacts) - len(order),
    }


def _led_to(ends: Sequence[int], sources: Sequence[Sequence[int]]) -> set[int]:
    """These, and all that they were made from."""
    found: set[int] = set()
    waiting = list(ends)
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            waiting += sources[place]
    return found


def _node(artifact: Artifact, place: int, at: tuple[float, float]) -> dict[str, Any]:
    """A file by the stage that wrote it, or, given by the user, by its name."""
    file, stage = _file(artifact), artifact.stage
    below = [file if stage else artifact.kind, size(artifact.size_bytes)]
    return {
        "place": place,
        "x": at[0],
        "y": at[1],
        "short": last_parts(stage or file, _NODE_LETTERS) or "no name",
        "below": last_parts(", ".join(filter(None, below)), _BELOW_LETTERS),
        "path": artifact.path,
        "given": not stage,
    }


def _file(artifact: Artifact) -> str:
    return artifact.path.rpartition("/")[2]


def _sorted(sources: Sequence[Sequence[int]]) -> list[int]:
    """Each after what it was made from; what was made from itself comes as it is listed."""
    found: list[int] = []
    done: set[int] = set()
    for first in range(len(sources)):
        waiting = [(first, iter(sources[first]))]
        entered = {first}
        while waiting:
            place, rest = waiting[-1]
            following = next((s for s in rest if s not in done and s not in entered), None)
            if following is not None:
                entered.add(following)
                waiting.append((following, iter(sources[following])))
                continue
            waiting.pop()
            if place not in done:
                done.add(place)
                found.append(place)
    return found


def environment(where: Surroundings) -> dict[str, Any] | None:
    """The machine in words; None where nothing is known of it."""
    facts = [
        ("CPU", where.cpu),
        ("cores", str(where.cores) if where.cores else ""),
        ("memory", size(where.memory_bytes) if where.memory_bytes else ""),
        ("system", where.system),
        ("engine target", where.target),
        ("engine threads", str(where.threads) if where.threads else ""),
        ("seed", str(where.seed)),
    ]
    if not any(value for name, value in facts[:-1]) and not where.command and not where.packages:
        return None
    return {
        "facts": [(name, value) for name, value in facts if value],
        "command": where.command,
        "packages": sorted(where.packages.items()),
    }

"""The measured rows as data with ratios, and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cuda.cases import WORKS, Array
from benchmarks.document import head, noted

Row = dict[str, Any]

EAGER = "torch eager f32"
GOALS = {
    "eager": (4.3, "times as fast as PyTorch f32 eager"),
    "compiled": (1.3, "times as fast as the best of torch.compile"),
    "dense": (1.0, "times as fast as our best dense engine"),
    "memory": (47.0, "percent less memory than PyTorch f32 eager"),
    "joules": (3.0, "times fewer joules than PyTorch f32 eager"),
    "sparse_int8": (1.21, "INT8 2:4 over INT8 dense, times as fast"),
}
"""What a row is held against: figure -> (goal, in words)."""
COMPILED_FROM, SPARSE_INT8 = 32, ("resnet34",)


def closeness(got: Sequence[Array], wanted: Sequence[Array], classes: bool) -> Row:
    """How near outputs are to the reference's.

    Args:
        got: of a contestant.
        wanted: of PyTorch in float32.
        classes: whether they are of classes, along the last axis.
    """
    if len(got) != len(wanted) or any(a.shape != b.shape for a, b in zip(got, wanted, strict=True)):
        shapes = [[each.shape for each in arrays] for arrays in (got, wanted)]
        return {"wrong": f"shapes {shapes[0]}, expected {shapes[1]}"}
    flat = [np.concatenate([each.ravel() for each in arrays]) for arrays in (got, wanted)]
    a, b = (each.astype(np.float64) for each in flat)
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    found: Row = {"cosine": float(a @ b) / size if size else 0.0}
    if classes:
        found["top1"] = float((got[0].argmax(-1) == wanted[0].argmax(-1)).mean())
    return found


def ratio(rounds: Mapping[str, Sequence[float]], ours: str, theirs: str) -> float | None:
    """How many times as fast ours is: the median of the rounds, each by itself."""
    if not rounds.get(ours) or not rounds.get(theirs):
        return None
    return float(np.median(np.array(rounds[theirs]) / np.array(rounds[ours])))


def best(rows: Sequence[Row], *words: str) -> Row | None:
    """The fastest of the contestants with these words in their name, of all that were timed."""
    found = [r for r in rows if "us" in r and all(word in r["name"] for word in words)]
    return min(found, key=lambda r: float(r["us"]), default=None)


def judged(row: Row, rounds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The figures of a row that have goals; those that could be computed.

    Args:
        row: has contestants.
        rounds: name of each -> microseconds of its turns.
    """
    everyone = row["contestants"]
    ours, dense = best(everyone, "twofour", "2:4"), best(everyone, "twofour", "dense")
    eager = next((r for r in everyone if r["name"] == EAGER and "us" in r), None)
    found: dict[str, float | None] = {}
    if ours is None:
        return {}
    if eager is not None:
        found["eager"] = ratio(rounds, ours["name"], eager["name"])
        if ours.get("latency_us") and eager.get("latency_us"):
            found["latency"] = eager["latency_us"] / ours["latency_us"]
        if ours.get("memory_bytes") and eager.get("memory_bytes"):
            found["memory"] = 100 * (1 - ours["memory_bytes"] / eager["memory_bytes"])
        if ours.get("joules") and eager.get("joules"):
            found["joules"] = eager["joules"] / ours["joules"]
    compiled = best(everyone, "compile")
    if compiled is not None:
        found["compiled"] = ratio(rounds, ours["name"], compiled["name"])
    if dense is not None:
        found["dense"] = ratio(rounds, ours["name"], dense["name"])
    found["sparse_int8"] = ratio(rounds, "twofour int8 2:4", "twofour int8 dense")
    return {name: value for name, value in found.items() if value is not None}


def verdicts(row: Row) -> list[str]:
    """Each figure beside its goal, in words."""
    lines = []
    for name, (goal, words) in GOALS.items():
        figure = row["figures"].get(name)
        if figure is None:
            continue
        if name == "compiled" and row["batch"] < COMPILED_FROM:
            continue
        if name == "sparse_int8" and row["network"] not in SPARSE_INT8:
            continue
        held = "reached" if figure >= goal else "MISSED"
        lines.append(f"{figure:.2f} {words} (goal {goal:g}: {held})")
    if (latency := row["figures"].get("latency")) is not None:
        lines.append(f"{latency:.2f} times the latency of PyTorch f32 eager, each run by itself")
    return lines


def page(document: Mapping[str, Any]) -> str:
    """Markdown of everything that was measured."""
    lines = [
        *head(document),
        "Weights are drawn from a seed and pruned to 2:4; all run the same. Inputs lie on the GPU; "
        "every contestant but those without `graph` and without `twofour` is one CUDA graph. "
        "Contestants take turns: `us` is the median of the rounds of one inference among many "
        "that follow each other, `spread` the distance between the quartiles, `latency` the "
        "median of runs each by itself, started and waited for. Memory: weights, inputs, and what "
        "a run takes. `cosine` and `top-1`: against PyTorch in float32 without TF32.",
        "",
        *noted(document),
    ]
    lines += _summary(document["rows"])
    for row in document["rows"]:
        lines += _table(row, document["command"])
    return "\n".join(lines)


def _summary(rows: Sequence[Row]) -> list[str]:
    """A line for each row: our fastest engine, and how far it is ahead; empty without one."""
    figures = ("eager", "compiled", "dense", "memory", "joules")
    lines = [
        "| network | batch | fastest engine | us | over f32 eager | over torch.compile "
        "| over our dense | memory saved | joules of f32 eager | cosine |",
        "| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        ours = best(row["contestants"], "twofour")
        if ours is None:
            continue
        found = [row["figures"].get(name) for name in figures]
        shown = ["" if v is None else f"{v:.2f}x" for v in found]
        shown[3] = "" if found[3] is None else f"{found[3]:.0f} %"
        cosine = "" if ours.get("cosine") is None else f"{ours['cosine']:.4f}"
        name = ours["name"].removeprefix("twofour ")
        cells = [row["network"], str(row["batch"]), name, _number(ours["us"]), *shown, cosine]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 2 else []


def _table(row: Row, command: str) -> list[str]:
    unit, own = WORKS[row["network"]].unit, row.get("command", command)
    lines = [
        f"## {row['network']}, batch {row['batch']} ({unit})",
        "",
        *([f"    {own}", ""] if own != command else []),
        "| contestant | us | spread | a second | latency us | MB | mJ | cosine | top-1 | |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --- |",
    ]
    timed = sorted((r for r in row["contestants"] if "us" in r), key=lambda r: float(r["us"]))
    for each in [*timed, *(r for r in row["contestants"] if "us" not in r)]:
        cells = [
            each["name"],
            _number(each.get("us")),
            _number(each.get("spread_us")),
            _number(1e6 * row["batch"] / each["us"] if "us" in each else None),
            _number(each.get("latency_us")),
            _number(None if not each.get("memory_bytes") else each["memory_bytes"] / 1e6),
            _number(None if each.get("joules") is None else 1e3 * each["joules"]),
            "" if each.get("cosine") is None else f"{each['cosine']:.5f}",
            "" if each.get("top1") is None else f"{100 * each['top1']:.1f} %",
            "; ".join(filter(None, (each.get("setting"), each.get("note"), each.get("reason")))),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return [*lines, "", *(f"- {text}" for text in verdicts(row)), ""]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def read_outputs(path: Path) -> list[Array]:
    """What a contestant wrote."""
    with np.load(path) as held:
        return [held[name] for name in held.files]

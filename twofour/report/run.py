"""The page of a pipeline run: one file that needs nothing else, from the run's record alone.

    write_run(json.loads(Path("RUN/run.json").read_text()), "RUN/report.html")

Each part of the page is made by a file of its own (`run_*.py`) and drawn by a template of the same
name. A part that the run does not have is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from twofour.core.outcome import Outcome
from twofour.core.version import __version__
from twofour.report.outcomes import read_outcome
from twofour.report.page import render, write_page
from twofour.report.run_graph import graph
from twofour.report.run_history import environment, lineage, stages
from twofour.report.run_layers import layers
from twofour.report.run_networks import cells, plot
from twofour.report.run_quality import quantized
from twofour.report.run_sensitivity import heat_map, search_map
from twofour.report.run_verdict import about, headline, verdict

Document = Mapping[str, Any]
_LETTERS = 200
_PARTS = (
    ("verdict", "Verdict"),
    ("notes", "Notes"),
    ("plot", "Accuracy and latency"),
    ("networks", "Networks"),
    ("layers", "Layers"),
    ("graphs", "Graph"),
    ("sensitivity", "Sensitivity"),
    ("quantization", "Quantization"),
    ("stages", "Stages"),
    ("lineage", "Lineage"),
    ("environment", "Environment"),
)


def write_run(document: Document, path: str | os.PathLike[str]) -> None:
    """Writes the page.

    Args:
        document: the plain form of an `Outcome`, as run.json has it, or any part of one.
        path: of the HTML file.

    Raises:
        InputError: it is not the record of a run, or the file cannot be written.
    """
    write_page(path, run_page(document))


def run_page(document: Document) -> str:
    """The page as HTML. Arguments and errors as for `write_run`."""
    outcome = read_outcome(document)
    found: dict[str, Any] = {
        "verdict": verdict(outcome),
        "notes": [note for note in outcome.notes if note],
        "plot": plot(outcome),
        "networks": cells(outcome),
        "layers": layers(outcome.layers),
        "graphs": graph(outcome.layers, outcome.edges),
        "sensitivity": _sensitivity(outcome),
        "quantization": _part(outcome, "quantize", quantized),
        "stages": stages(outcome.stages),
        "lineage": lineage(outcome.artifacts),
        "environment": environment(outcome.surroundings),
    }
    name = outcome.name or "a run"
    content = {
        **{key: found[key] for key in ("verdict", "notes", "plot", "layers", "stages", "lineage")},
        "cells": found["networks"],
        "graph": found["graphs"],
        "heat": found["sensitivity"],
        "quantized": found["quantization"],
        "environment": found["environment"],
        "name": name if len(name) <= _LETTERS else f"{name[:_LETTERS]}...",
        "about": about(outcome),
        "headline": headline(outcome),
        "empty": not any(found.values()),
        "task_up": outcome.task is None or outcome.task.higher_is_better,
        "parts": [(key, words) for key, words in _PARTS if found[key]],
        "title": name[:_LETTERS],
        "version": __version__,
    }
    return render("run.html", content)


def _sensitivity(outcome: Outcome) -> dict[str, Any] | None:
    """Of a scan; without one, of a search."""
    return _part(outcome, "sensitivity", heat_map) or _part(outcome, "search", search_map)


def _part(
    outcome: Outcome, name: str, make: Callable[[Document], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """What is drawn of another command's document; one that cannot be read says so."""
    document = outcome.documents.get(name)
    if document is None:
        return None
    try:
        return make(document)
    except ValueError as e:
        return {"why": f"The document of {name} in this run cannot be shown: {e}"}

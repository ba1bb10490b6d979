"""What a manifest keeps of a pipeline run: what the version was made from, and its figures.

It reads the plain form of an `Outcome` (RUN/run.json). Paths within the run's folder stay, so that
a hash can be found again; the command is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twofour.core import outcome
from twofour.core.errors import InputError

_SCHEMA = f"twofour.{outcome.SCHEMA}"
_MOST_BYTES = 64 << 20
_KEPT = ("path", "kind", "sha256", "size_bytes", "stage", "made_from")
_SURROUNDINGS = ("cpu", "cores", "system", "target", "threads", "seed", "packages")


def read_run(path: Path) -> dict[str, Any]:
    """The document of a run.

    Args:
        path: of run.json, or of the run's folder.

    Raises:
        InputError: it cannot be read, or is none.
    """
    path = path / "run.json" if path.is_dir() else path
    fix = "name the folder of a run of twofour pipeline"
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        document = json.loads(content)
        if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
            raise ValueError(f"its schema is not {_SCHEMA}")
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} is no run", [str(e)], fix) from e
    return document


def of_run(document: Mapping[str, Any]) -> dict[str, Any]:
    """The lineage: artifacts with their hashes, keys of stages, the gate's checks, versions.

    Args:
        document: plain form of an `Outcome`.
    """
    surroundings = document.get("surroundings") or {}
    return {
        "run": document.get("name", ""),
        "created": document.get("created", ""),
        "verdict": document.get("verdict", ""),
        "task": document.get("task"),
        "checks": {each["name"]: each["text"] for each in document.get("checks", ())},
        "stages": {each["name"]: each["key"] for each in document.get("stages", ())},
        "artifacts": [
            {key: each[key] for key in _KEPT if key in each}
            for each in document.get("artifacts", ())
        ],
        "surroundings": {key: surroundings[key] for key in _SURROUNDINGS if key in surroundings},
    }


def metrics_of_run(document: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the candidate: its metric, its latency, and what the gate measured.

    Args:
        document: plain form of an `Outcome`.
    """
    task = document.get("task") or {}
    found: dict[str, float] = {}
    for point in document.get("points", ()):
        if point.get("kind") == "candidate":
            found[str(task.get("metric", "figure"))] = float(point["figure"]["value"])
            found["latency_us"] = float(point["latency_us"])
    for check in document.get("checks", ()):
        found[f"gate.{check['name']}"] = float(check["value"])
    return found

"""A baseline that another run recorded: `gate: {baseline: FILE}`, its run.json.

    recorded = read_recorded(Path("runs/before/run.json"))
    measured = against(recorded, Now(task, figure, latency, memory_bytes, surroundings), limits)
    checks = judge_gate(measured, limits)

What counts is the candidate of that run: its figure of the metric, its latency, its memory. Its
samples and rounds are gone; so nothing is paired, and the intervals are wider than in one run.
Times are compared on the same CPU with as many cores and threads, figures of the same metric on as
many samples; anything else is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofour.bench.baseline import require_alike
from twofour.core.errors import InputError
from twofour.core.outcome import SCHEMA, Figure, Outcome, Surroundings, Task
from twofour.core.records import from_plain
from twofour.evaluate.metrics import find_metric
from twofour.pipeline.gate import Figures, Limits, Measured, Times

_CANDIDATE = "candidate"
_FIX = "name the run.json of a run that went through to its end, or baseline: dense"


@dataclass(frozen=True)
class Recorded:
    """What a run says of its candidate.

    Attributes:
        name: of the file.
        task: what was judged; None where nothing was.
        figure: of the metric; None where nothing was judged.
        latency_us: of one run, with its interval where it was recorded.
        memory_bytes: peak resident memory; None where it was not measured.
        surroundings: where it was measured.
    """

    name: str
    task: Task | None
    figure: Figure | None
    latency_us: Figure
    memory_bytes: int | None
    surroundings: Surroundings


@dataclass(frozen=True)
class Now:
    """The candidate of this run.

    Attributes:
        task: what is judged; None where nothing is.
        figure: of the metric, with its interval; None where nothing is judged.
        latency_us: of one run, with its interval.
        memory_bytes: peak resident memory; None where it was not measured.
        surroundings: where this is.
    """

    task: Task | None
    figure: Figure | None
    latency_us: Figure
    memory_bytes: int | None
    surroundings: Surroundings


def read_recorded(path: Path) -> Recorded:
    """Reads a run.json.

    Raises:
        InputError: no such file, it is none, or its run measured no candidate.
    """
    outcome = _outcome(path)
    point = next((each for each in outcome.points if each.kind == _CANDIDATE), None)
    if point is None:
        reason = "expected a point of kind 'candidate': its run measured none"
        raise InputError(f"{path} is no baseline", [reason], _FIX)
    cells = [cell for cell in outcome.cells if cell.latency_us == point.latency_us]
    cell = next((each for each in cells if each.figure in (None, point.figure)), None)
    latency = Figure(point.latency_us)
    if cell is not None:
        latency = Figure(point.latency_us, cell.latency_low_us, cell.latency_high_us)
    figure = point.figure if outcome.task is not None else None
    memory_bytes = cell.memory_bytes if cell is not None else None
    return Recorded(str(path), outcome.task, figure, latency, memory_bytes, outcome.surroundings)


def against(before: Recorded, now: Now, limits: Limits) -> Measured:
    """What the gate judges, as far as the limits ask for it.

    Raises:
        InputError: it was measured under other conditions; all that differ are named.
    """
    accuracy = None
    if limits.max_drop is not None:
        accuracy = _figures(before, now)
    speed = None
    if limits.min_speedup is not None:
        require_alike(_conditions(before.surroundings), _conditions(now.surroundings))
        speed = Times(before.latency_us, now.latency_us)
    return Measured(accuracy, speed, now.memory_bytes, before.memory_bytes)


def _figures(before: Recorded, now: Now) -> Figures | None:
    """None where this run judged nothing, which the gate says itself."""
    if now.task is None or now.figure is None:
        return None
    if before.task is None or before.figure is None:
        reason = "expected a figure of the metric, got none: its run judged no samples"
        raise InputError(f"{before.name} has no accuracy to compare with", [reason], _FIX)
    pairs = {
        "metric": (before.task.metric, now.task.metric),
        "samples": (before.task.samples, now.task.samples),
    }
    differ = [
        f"{name}: the baseline has {then}, this run {this}"
        for name, (then, this) in pairs.items()
        if then != this
    ]
    if differ:
        fix = "judge by the same metric on the same samples, or record another baseline"
        raise InputError(f"this run cannot be compared with {before.name}", differ, fix)
    return Figures(find_metric(now.task.metric), before.figure, now.figure)


def _conditions(surroundings: Surroundings) -> dict[str, Any]:
    """What has to be equal, by the names of `bench/baseline.py`."""
    return {
        "cpu": surroundings.cpu,
        "cores": surroundings.cores,
        "threads": surroundings.threads,
    }


def _outcome(path: Path) -> Outcome:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"no baseline at {path}", [e.strerror or str(e)], _FIX) from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is no baseline", [f"it is no JSON: {e}"], _FIX) from e
    found = document.pop("schema", None) if isinstance(document, dict) else None
    if found != f"twofour.{SCHEMA}":
        reason = f"expected a document of schema twofour.{SCHEMA}, got {found or 'none'}"
        raise InputError(f"{path} is no baseline", [reason], _FIX)
    try:
        return from_plain(Outcome, {k: v for k, v in document.items() if k != "documents"})
    except ValueError as e:
        raise InputError(f"{path} is a damaged baseline", [str(e)], _FIX) from e

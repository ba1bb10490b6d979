"""The top of a run's page: the verdict, each check with its interval and limit, the headline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from twofour.core.outcome import FAILED, PASSED, UNDECIDED, Check, Outcome, Point
from twofour.report.charts import Scale, ending, round_values, scale_between
from twofour.report.quantities import amount, is_known, rounded, signed, time, times, with_unit

WORDS = {PASSED: "Passed", FAILED: "Failed", UNDECIDED: "Undecided"}
_SAID = {
    PASSED: "every limit of the gate holds",
    FAILED: "a limit of the gate does not hold",
    UNDECIDED: "the measurements are too uncertain to say",
}
_MARKS = {PASSED: "\u2713", FAILED: "\u2715", UNDECIDED: "?"}
_AXIS = (12.0, 348.0)
_MORE_IS_BETTER = {"speed": True, "accuracy": False, "memory": False}  # accuracy: the drop
_TICKS, _LETTERS = 4, 40


def verdict(outcome: Outcome) -> dict[str, Any] | None:
    """The verdict in words; None where the run has no gate."""
    if not outcome.verdict and not outcome.checks:
        return None
    word = WORDS.get(outcome.verdict, ending(outcome.verdict, _LETTERS) or "No verdict")
    return {
        "kind": outcome.verdict if outcome.verdict in WORDS else "none",
        "word": word,
        "mark": _MARKS.get(outcome.verdict, "\u2013"),
        "said": _SAID.get(outcome.verdict, ""),
        "checks": [_check(each) for each in outcome.checks],
    }


def _check(check: Check) -> dict[str, Any]:
    more = more_is_better(check)
    limit = rounded(check.limit, check.unit) if is_known(check.limit) else ""
    interval = ""
    if is_known(check.low) and is_known(check.high):
        show = amount if check.unit == "points" else with_unit  # once is enough for that word
        ends = [show(end, check.unit) for end in (check.low, check.high)]
        interval = " to ".join(ends)
    return {
        "name": check.name,
        "kind": check.verdict if check.verdict in WORDS else "none",
        "verdict": WORDS.get(check.verdict, ending(check.verdict, _LETTERS) or "not judged"),
        "mark": _MARKS.get(check.verdict, "\u2013"),
        "asked": f"at {'least' if more else 'most'} {limit}" if limit else "",
        "found": with_unit(check.value, check.unit) or "no number",
        "interval": interval,
        "text": check.text,
        "plot": _plot(check, more),
    }


def more_is_better(check: Check) -> bool:
    """Whether a check asks for at least its limit: from its name, else from what it says."""
    if check.name in _MORE_IS_BETTER:
        return _MORE_IS_BETTER[check.name]
    return (check.value >= check.limit) == (check.verdict == PASSED)


def _plot(check: Check, more: bool) -> dict[str, Any] | None:
    """Value, interval and limit on one axis; None where there is no number to draw."""
    ends = [end for end in (check.low, check.high) if end is not None and math.isfinite(end)]
    known = [each for each in (check.value, check.limit, *ends) if math.isfinite(each)]
    if not known or not math.isfinite(check.limit):
        return None
    anchor = [] if check.unit == "bytes" else [1.0 if check.unit == "x" else 0.0]
    scale = scale_between([*known, *anchor], *_AXIS)
    limit = scale.at(check.limit)
    good = (limit, _AXIS[1]) if more else (_AXIS[0], limit)
    return {
        "value": scale.at(check.value) if math.isfinite(check.value) else None,
        "ends": tuple(scale.at(end) for end in ends) if len(ends) == 2 else None,
        "limit": limit,
        "good": (good[0], round(good[1] - good[0], 2)),
        "ticks": _ticks(scale, check.unit),
        "axis": _AXIS,
    }


def _ticks(scale: Scale, unit: str) -> list[tuple[float, str]]:
    """A few round values, with their unit."""
    values: Sequence[float] = round_values(scale.least, scale.most)
    while len(values) > _TICKS:
        values = values[::2]
    unit = "" if unit == "points" else unit
    return [(scale.at(value), rounded(value, unit)) for value in values]


def headline(outcome: Outcome) -> list[dict[str, str]]:
    """What the candidate is beside the baseline, as a few large figures."""
    base, new = (_first(outcome.points, kind) for kind in ("baseline", "candidate"))
    if new is None:
        return []
    task = outcome.task
    unit = task.unit if task is not None else ""
    found = [
        _tile(task.metric if task is not None else "figure", with_unit(new.figure.value, unit))
    ]
    found.append(_tile("latency", time(new.latency_us)))
    if base is not None:
        moved = new.figure.value - base.figure.value
        points = "points" if unit == "%" else ""
        found[0]["beside"] = f"{signed(moved, unit)} {points}".strip() + f" against {base.name}"
        found[1]["beside"] = f"{base.name} takes {time(base.latency_us)}"
        if (speed := _speedup(outcome, base, new)) is not None:
            found.insert(1, _tile("speed-up", times(speed), f"as fast as {base.name}"))
    return [tile for tile in found if tile["value"]]


def _speedup(outcome: Outcome, base: Point, new: Point) -> float | None:
    """The gate's, which noise moves less than medians; else that of the medians."""
    for check in outcome.checks:
        if check.name == "speed" and is_known(check.value):
            return check.value
    if is_known(base.latency_us) and new.latency_us > 0:
        return base.latency_us / new.latency_us
    return None


def _tile(name: str, value: str, beside: str = "") -> dict[str, str]:
    return {"name": name or "figure", "value": value, "beside": beside}


def _first(points: Sequence[Point], kind: str) -> Point | None:
    return next((point for point in points if point.kind == kind), None)


def about(outcome: Outcome) -> list[str]:
    """What was judged, where and when, in a few words each."""
    task, where = outcome.task, outcome.surroundings
    found = []
    if task is not None and task.metric:
        better = "" if task.higher_is_better else ", less is better"
        samples = f" on {task.samples:,} samples" if task.samples else ""
        found.append(f"{task.metric}{samples}{better}")
    if where.target or where.cpu:
        found.append(where.target or where.cpu)
    if where.threads:
        found.append(f"{where.threads} thread{'s' * (where.threads > 1)}")
    if outcome.created:
        found.append(
            outcome.created.replace("T", " ").replace("+00:00", " UTC").replace("Z", " UTC")
        )
    return found

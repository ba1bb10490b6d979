"""What the gate asked and found, in one line for each check."""

from __future__ import annotations

import math
from collections.abc import Sequence

from twofour.core.interval import Interval
from twofour.core.outcome import FAILED, PASSED, UNDECIDED, Check
from twofour.evaluate.metric import Metric

MORE = {"accuracy": "judge more samples", "speed": "measure longer"}
_MARKS = {PASSED: "passed", FAILED: "FAILED", UNDECIDED: "undecided"}


def gate_lines(checks: Sequence[Check]) -> list[str]:
    """For a terminal: the verdict of each check, then what was asked and found."""
    return [f"{_MARKS[check.verdict]}: {check.name}: {check.text}" for check in checks]


def accuracy_text(
    metric: Metric, figures: tuple[float, float], drop: Interval, limit: float, sure: str
) -> str:
    """Of a drop.

    Args:
        metric: that judged both.
        figures: of the baseline, and of the candidate.
        drop: between them.
        limit: of it.
        sure: what is known of the noise.
    """
    unit = " points" if metric.unit == "%" else ""
    before, after = (amount(each) + (f" {metric.unit}" if metric.unit else "") for each in figures)
    change = f"{amount(abs(drop.value))}{unit} {'worse' if drop.value >= 0 else 'better'}"
    found = f"{metric.name} {after}, {change} than the baseline's {before}"
    return _line(found, sure, f"at most {amount(limit)}{unit} worse was asked for")


def speed_text(found: Interval, limit: float, sure: str) -> str:
    """Of a speed-up. Arguments as above."""
    words = f"{found.value:.2f} times as fast as the baseline"
    return _line(words, sure, f"at least {limit:g} was asked for")


def memory_text(used: float, baseline: float | None, limit: float, share: float | None) -> str:
    """Of peak resident memory.

    Args:
        used: by the candidate, in bytes.
        baseline: by the baseline, where it is known.
        limit: in bytes.
        share: of the baseline's that the limit is, where it is one.
    """
    beside = "" if baseline is None else f" (the baseline's is {megabytes(baseline)})"
    part = "" if share is None else f", {share:.0%} of the baseline's,"
    asked = f"at most {megabytes(limit)}{part} was asked for"
    return _line(f"peak resident memory {megabytes(used)}{beside}", "", asked)


def ends_text(found: Interval, confidence: float, without: str, digits: str = "") -> str:
    """What is known of the noise: both ends, or why there are none.

    Args:
        found: with its ends.
        confidence: of each.
        without: why there is none, where there is none.
        digits: format of the ends; by default as `amount` has it.
    """
    if found.low is None or found.high is None:
        return f"no interval: {without}; the figure alone decides"
    if math.isinf(found.low) or math.isinf(found.high):
        return f"no interval: {without}"
    low, high = (format(end, digits) if digits else amount(end) for end in (found.low, found.high))
    return f"with {100 * confidence:g} % confidence at least {low}, and at most {high}"


def amount(value: float) -> str:
    """Two places after the point, more where the value is small."""
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.4g}"


def megabytes(size_bytes: float) -> str:
    """In 10^6 bytes."""
    return f"{size_bytes / 1e6:.1f} MB"


def quantity(value: float, unit: str) -> str:
    """A figure of a check, with its unit."""
    if unit == "bytes":
        return megabytes(value)
    return f"{value:.3f}x" if unit == "x" else f"{amount(value)}{f' {unit}' if unit else ''}"


def _line(found: str, sure: str, asked: str) -> str:
    return "; ".join(part for part in (found, sure, asked) if part)

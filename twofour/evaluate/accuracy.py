"""Top-1 accuracy, and the gate of the demo and the examples: figures as they are.

What noise may have made of a figure, `pipeline/gate.py` asks; it needs all rows and rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import GateError, InputError

Array = NDArray[Any]


def top1(
    predict: Callable[[Array], Array],
    x: Array,
    labels: Array,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """The share of samples whose largest output stands at their label.

    Args:
        predict: x [B, ...] -> scores [B, classes].
        x: [S, ...], S >= 1.
        labels: whole numbers [S].
        batch: B; the last batch is smaller if S is no multiple of it.
        progress: called with (samples done, samples) after each batch.

    Returns:
        0 to 1. A sample whose scores hold NaN counts as wrong.

    Raises:
        InputError: x and labels do not match, or the scores have another shape.
    """
    if len(x) != len(labels) or len(x) == 0:
        raise InputError(
            "samples and labels do not match",
            ["expected one label for each sample, at least one", f"got {len(x)} and {len(labels)}"],
        )
    right = 0
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        scores = predict(part)
        if scores.ndim != 2 or len(scores) != len(part):
            raise InputError(
                "the network gives no scores",
                [f"expected [{len(part)}, classes], got {list(scores.shape)}"],
                "top-1 needs a classifier's output",
            )
        found = scores.argmax(axis=1)
        right += int(np.sum((found == labels[start : start + batch]) & ~np.isnan(scores).any(1)))
        if progress is not None:
            progress(min(start + batch, len(x)), len(x))
    return right / len(x)


@dataclass(frozen=True)
class Limits:
    """What the gate asks for.

    Attributes:
        max_drop_points: most percentage points of top-1 that may be lost.
        min_speedup: times as fast as the baseline; the speed-up must be above it.
    """

    max_drop_points: float = 1.5
    min_speedup: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        passed: whether both limits hold.
        drop_points: percentage points of top-1 lost against the reference; negative for a gain.
        speedup: times as fast as the baseline.
        reasons: one line for each limit: what was asked, what was found.
    """

    passed: bool
    drop_points: float
    speedup: float
    reasons: tuple[str, ...]

    def require(self) -> None:
        """Does nothing if the gate was passed.

        Raises:
            GateError: it was not.
        """
        if not self.passed:
            fix = "fine-tune longer, or read `twofour explain` for layers without a fast kernel"
            raise GateError("the gate is closed", self.reasons, fix)


def gate(
    reference_top1: float, top1: float, baseline_us: float, time_us: float, limits: Limits
) -> Verdict:
    """Judges a compressed network.

    Args:
        reference_top1: of the network before compression, 0 to 1.
        top1: of the compressed one, 0 to 1.
        baseline_us: time of what it has to beat.
        time_us: its own time, from the same race.
        limits: what is asked.
    """
    drop = 100 * (reference_top1 - top1)
    speedup = baseline_us / time_us
    # 1e-9: a drop of exactly the limit passes, whatever binary fractions make of it.
    accurate, fast = drop <= limits.max_drop_points + 1e-9, speedup > limits.min_speedup
    before, after = f"{100 * reference_top1:.2f} %", f"{100 * top1:.2f} %"
    reasons = (
        f"{_mark(accurate)} top-1 {after}, {drop:.2f} points below {before}, "
        f"limit {limits.max_drop_points:g}",
        f"{_mark(fast)} {speedup:.2f} times as fast as the baseline, "
        f"limit above {limits.min_speedup:g}",
    )
    return Verdict(accurate and fast, drop, speedup, reasons)


def _mark(held: bool) -> str:
    return "held:" if held else "BROKEN:"

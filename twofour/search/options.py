"""What a search is asked for, and how it looks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from twofour.compiler.build import EFFORTS
from twofour.compiler.forms import PRECISIONS
from twofour.core.data import DataLike
from twofour.core.errors import InputError
from twofour.core.patterns import Pattern
from twofour.core.scan import Processes, Spread
from twofour.search.apply import ApplyOptions
from twofour.search.explore import Goal

PATTERNS = ("2:4", "2:4/pair", "4:8")
LEAST_EVALUATIONS = 6


@dataclass(frozen=True)
class SearchOptions:
    """What is asked for, and how it is looked for. One of the two bounds has to be given.

    Attributes:
        max_drop: most that the metric may be worse than the float model's, in its own unit; the
            least latency within it is looked for.
        max_latency_us: most that a run may take; the best metric within it is looked for.
        metric: one of `metrics.METRICS`, or module:function.
        output: that the metric reads; by default the first.
        samples: that engines are judged on: the first so many; None for all.
        scan_samples: that single changes are judged on, of these; their error needs few.
        calibrate: data for pruning and calibrating, by default the same; better another.
        apply: how layers are pruned and quantized.
        precisions: to choose from; "f32" always is.
        patterns: to choose from, beside dense.
        shapes: of a run; by default those of the first sample.
        threads: of engines.
        tuning_effort: 1 to 3, as of a build.
        evaluations: engines that are built, run and judged.
        jobs: processes that judge single changes.
        spread: workers, instead of `jobs` processes: those of a cluster (`cluster.tasks`).
        cache: file that keeps what was found.
        timing_cache: file that keeps the times of kernels; by default beside the cache.
    """

    max_drop: float | None = None
    max_latency_us: float | None = None
    metric: str = "top1"
    output: str | None = None
    samples: int | None = None
    scan_samples: int = 256
    calibrate: DataLike | None = None
    apply: ApplyOptions = field(default_factory=ApplyOptions)
    precisions: Sequence[str] = PRECISIONS
    patterns: Sequence[str] = PATTERNS
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    threads: int = 1
    tuning_effort: int = 2
    evaluations: int = 24
    jobs: int = 1
    spread: Spread | None = None
    cache: str | os.PathLike[str] | None = None
    timing_cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Refuses what means nothing. Raises InputError."""
        bounds = [b for b in (self.max_drop, self.max_latency_us) if b is not None]
        if len(bounds) != 1:
            raise InputError(
                "a search needs one bound",
                [f"expected a drop or a latency, got {len(bounds)} of them"],
                "give --max-drop 1.0, or --max-latency 250us",
            )
        if not math.isfinite(bounds[0]) or bounds[0] < 0 or self.max_latency_us == 0:
            raise InputError(f"bad bound {bounds[0]}", ["expected a number above 0"])
        if self.evaluations < LEAST_EVALUATIONS or self.jobs < 1 or self.scan_samples < 1:
            found = f"{self.evaluations} evaluations, {self.jobs} jobs, {self.scan_samples} samples"
            expected = f"expected at least {LEAST_EVALUATIONS}, 1 and 1, got {found}"
            raise InputError("bad bounds of the search", [expected], "allow more")
        if self.tuning_effort not in EFFORTS[1:]:
            expected = f"expected {EFFORTS[1]} to {EFFORTS[-1]}: a search is made of times"
            raise InputError(f"cannot search with tuning effort {self.tuning_effort!r}", [expected])
        for what, given, known in (
            ("precision", self.precisions, PRECISIONS),
            ("pattern", [str(Pattern.parse(p)) for p in self.patterns], PATTERNS),
        ):
            if unknown := [each for each in given if each not in known]:
                expected = f"expected some of {', '.join(known)}"
                raise InputError(f"no kernels for {what} {unknown[0]!r}", [expected])

    @property
    def workers(self) -> Spread:
        """Who judges single changes."""
        return self.spread or Processes(self.jobs)

    @property
    def goal(self) -> Goal:
        """The bound."""
        return Goal(self.max_drop, self.max_latency_us)

"""Which points to build: predictions that learn from what was built, until the bound is met.

    1. the corners: every layer float32; INT8; 2:4 INT8; 2:4/pair INT8
    2. points spread over the front that the solver predicts
    3. at the bound: the solver's answer with what was learned (`fit.py`); if that was built
       already, one a little further on this side or the other, as long as it may be better
    4. what is left of the evaluations: the widest gaps of the front

An answer is a point that was built. All that this depends on is in the cache and in the files of
times, so a search that was ended goes the same way again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from twofour.compiler.forms import INT8
from twofour.core.progress import Stage
from twofour.search.choices import BASELINE, Choice
from twofour.search.harms import Harms
from twofour.search.learned import Learned
from twofour.search.points import Assignment, Point, Workshop, error_front
from twofour.search.units import Network

_SPREAD = 0.35  # of the evaluations, for the second step
_WIDTH = 200.0  # largest error over the least one that the second step goes to
_STEPS = (1.0, 1.05, 0.95, 1.12, 0.88, 1.25, 0.78, 1.5, 0.65, 2.0, 0.5)
_BETTER = 0.995  # of the best point's time or error: less is not worth an evaluation
_TARGETS = 40


@dataclass(frozen=True)
class Goal:
    """What is asked for: one of the two.

    Attributes:
        max_drop: of the metric, the least time within it.
        max_latency_us: the best metric within it.
    """

    max_drop: float | None = None
    max_latency_us: float | None = None

    def holds(self, point: Point) -> bool:
        """Whether a point is within the bound."""
        if point.drop is None:
            return False
        if self.max_drop is not None:
            return point.drop <= self.max_drop + 1e-9
        return point.latency_us <= (self.max_latency_us or math.inf)

    def best(self, points: Sequence[Point]) -> Point | None:
        """The best one that holds; None where none does."""
        found = [point for point in points if self.holds(point)]
        if self.max_drop is not None:
            return min(found, key=lambda p: (p.latency_us, p.drop), default=None)
        return min(found, key=lambda p: (p.drop, p.latency_us), default=None)


@dataclass
class Explorer:
    """Chooses what to build.

    Attributes:
        network: units and times.
        harms: of their choices.
        workshop: builds.
        goal: what is asked for.
        evaluations: points at most.
        stage: shows the progress.
    """

    network: Network
    harms: Harms
    workshop: Workshop
    goal: Goal
    evaluations: int
    stage: Stage
    _offered: tuple[tuple[Choice, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Leaves out choices that gain nothing."""
        self._offered = tuple(self.harms.worth(unit) for unit in self.network.units)

    def run(self) -> tuple[Point, ...]:
        """All points, in the order in which they were built."""
        for name, choices in corners(self.network):
            self._build(name, choices)
        self._spread()
        for name, next_ in (("at the bound", self._at_bound), ("in a gap", self._in_gap)):
            while self._left and (found := next_()):
                self._build(name, found)
        return self._points

    @property
    def _points(self) -> tuple[Point, ...]:
        return tuple(self.workshop.points.values())

    @property
    def _left(self) -> int:
        return self.evaluations - len(self.workshop.points)

    def _build(self, name: str, choices: Assignment) -> None:
        number = len(self.workshop.points) + 1
        self.workshop.point(f"{number} of {self.evaluations}, {name}", choices, self.stage)

    def _spread(self) -> None:
        """Points of ever smaller errors; what was learned of one counts for the next."""
        wanted = min(round(_SPREAD * self.evaluations), self._left)
        for index in range(wanted):
            model = self._learned()
            whole = model.fastest(math.inf)
            most = 0.0 if whole is None else model.error(whole)
            found = model.fastest(most * _WIDTH ** -((index + 0.5) / wanted))
            if found is not None and found not in self.workshop.points:
                self._build("spread over the front", found)

    def _at_bound(self) -> Assignment | None:
        """The next choices near the bound that may be better than the best point; None for none."""
        model, best = self._learned(), self.goal.best(self._points)
        for choices in self._near(model):
            if choices in self.workshop.points:
                continue
            if best is None or self._may_be_better(model, choices, best):
                return choices
        return None

    def _near(self, model: Learned) -> Iterator[Assignment]:
        for step in _STEPS:
            if self.goal.max_drop is not None:
                found = model.fastest(step * model.drops.most(self.goal.max_drop))
            else:
                found = model.least_harm((self.goal.max_latency_us or math.inf) * step)
            if found is not None:
                yield found

    def _may_be_better(self, model: Learned, choices: Assignment, best: Point) -> bool:
        if self.goal.max_drop is not None:
            return model.time_us(choices) < _BETTER * best.latency_us
        return model.error(choices) < _BETTER * (best.error or math.inf)

    def _in_gap(self) -> Assignment | None:
        """Choices in the widest gap of the front that has new ones.

        Of the front by the error: that by the metric has gaps that no engine will ever fill, where
        chance was kind to a fast one.
        """
        model, found = self._learned(), error_front(self._points)
        gaps = sorted(
            pairwise(found),
            key=lambda pair: -pair[1].latency_us / pair[0].latency_us,
        )
        for fast, slow in gaps:
            choices = model.least_harm(math.sqrt(fast.latency_us * slow.latency_us))
            if choices is not None and choices not in self.workshop.points:
                return choices
        return None

    def _learned(self) -> Learned:
        return Learned.of(self.network, self.harms, self._offered, self._points)

    def predicted(self) -> tuple[tuple[float, float, float], ...]:
        """The front that the solver predicts, with all that was learned: time, error, drop."""
        model = self._learned()
        times = [point.latency_us for point in self._points]
        least, most = 0.97 * min(times), max(times)
        found = {}
        for index in range(_TARGETS):
            choices = model.least_harm(least * (most / least) ** (index / (_TARGETS - 1)))
            if choices is not None:
                error = model.error(choices)
                found[choices] = model.time_us(choices), error, model.drops.at(error)
        return tuple(found.values())


def corners(network: Network) -> Iterator[tuple[str, Assignment]]:
    """Every layer alike, as far as it can be: what people do without a search."""
    seen = set()
    ways = {
        "everything float32": (BASELINE,),
        "everything INT8": (Choice("", INT8),),
        "everything 2:4 INT8": (Choice("2:4", INT8), Choice("", INT8)),
        "everything 2:4/pair INT8": (
            Choice("2:4/pair", INT8),
            Choice("2:4", INT8),
            Choice("", INT8),
        ),
    }
    for name, wanted in ways.items():
        choices = tuple(
            next((c for c in wanted if c in unit.times), BASELINE) for unit in network.units
        )
        if choices not in seen:
            seen.add(choices)
            yield name, choices

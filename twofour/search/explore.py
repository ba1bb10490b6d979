"""Which points to build: predictions that learn from what was built, until the bound is met.

    1. the corners: every layer float32; INT8; 2:4 INT8; 2:4/pair INT8
    2. points spread over the front that the solver predicts
    3. at the bound: the solver's answer with what was learned (`fit.py`); if that was built
       already, one a little further on this side or the other, as long as it may be better
    4. beside each corner that nothing built is ahead of in both: the solver's answer to its time
    5. what is left of the evaluations: the widest gaps of the front, as far as the metric still
       gets better there

An answer is a point that was built. All that this depends on is in the cache and in the files of
times, so a search that was ended goes the same way again.
"""

from __future__ import annotations

import math
from collections import Counter
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
_BESIDE = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9)  # of a corner's time
_TRIES = 6  # for each corner
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
    _tried: Counter[Assignment] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        """Leaves out choices that gain nothing."""
        self._offered = tuple(self.harms.worth(unit) for unit in self.network.units)

    def run(self) -> tuple[Point, ...]:
        """All points, in the order in which they were built."""
        for name, choices in corners(self.network):
            self._build(name, choices)
        self._spread()
        steps = {
            "at the bound": self._at_bound,
            "beside layers all alike": self._beside_corner,
            "in a gap": self._in_gap,
        }
        for name, next_ in steps.items():
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

    def _beside_corner(self) -> Assignment | None:
        """Choices that should lose less than a corner in a little less time, if none built does."""
        model = self._learned()
        for _, corner in corners(self.network):
            point = self.workshop.points.get(corner)
            if point is None or point.error is None or self._tried[corner] == _TRIES:
                continue
            if any(other.is_ahead_of(point) for other in self._points):
                continue
            for share in _BESIDE:
                choices = model.least_harm(share * point.latency_us)
                if choices is None or choices in self.workshop.points:
                    continue
                if model.error(choices) < point.error:
                    self._tried[corner] += 1
                    return choices
        return None

    def _in_gap(self) -> Assignment | None:
        """Choices in the widest gap of the front that has new ones.

        Of the front by the error: that by the metric has gaps that no engine will ever fill, where
        chance was kind to a fast one.
        """
        model, found = self._learned(), _improving(error_front(self._points))
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


def _improving(front: Sequence[Point]) -> Sequence[Point]:
    """A front, fastest first, up to where no slower point surely has a better metric."""
    for index, point in enumerate(front):
        if point.drop is None:
            continue
        sure = point.drop - (point.drop_error or 0.0)
        if all(other.drop is None or other.drop >= sure for other in front[index + 1 :]):
            return front[: index + 1]
    return front


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

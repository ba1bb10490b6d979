"""Predictions of choices that were not built, with what was learned of those that were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twofour.search.choices import Choice
from twofour.search.fit import Factors, Rising, fit_factors
from twofour.search.harms import Harms
from twofour.search.points import Assignment, Point
from twofour.search.solve import Edge, Problem, fastest, least_harm
from twofour.search.units import Network, crossing


@dataclass(frozen=True)
class Learned:
    """Predictions, with the factors that points taught.

    Attributes:
        network: units and times.
        harms: of their choices.
        offered: the choices of each unit.
        times: factors of the times.
        errors: factors of the errors.
        drops: of the metric, over the error.
    """

    network: Network
    harms: Harms
    offered: tuple[tuple[Choice, ...], ...]
    times: Factors
    errors: Factors
    drops: Rising

    @staticmethod
    def of(
        network: Network,
        harms: Harms,
        offered: tuple[tuple[Choice, ...], ...],
        points: Sequence[Point],
    ) -> Learned:
        """From the points so far."""
        times = [(time_parts(network, p.choices), p.latency_us) for p in points]
        errors = [(error_parts(network, harms, p.choices), p.error or 0.0) for p in points]
        drops = [(p.error, p.drop) for p in points if p.error is not None and p.drop is not None]
        return Learned(
            network, harms, offered, fit_factors(times), fit_factors(errors), Rising.through(drops)
        )

    def time_us(self, choices: Assignment) -> float:
        """Of one run."""
        return self.times.whole(time_parts(self.network, choices))

    def error(self, choices: Assignment) -> float:
        """Of the outputs."""
        return self.errors.whole(error_parts(self.network, self.harms, choices))

    def fastest(self, most_error: float) -> Assignment | None:
        """The fastest choices of at most so much error."""
        return self._choices(fastest(self._problem(), most_error))

    def least_harm(self, most_us: float) -> Assignment | None:
        """The choices of the least error that take at most so long."""
        return self._choices(least_harm(self._problem(), most_us))

    def _choices(self, found: Sequence[int] | None) -> Assignment | None:
        if found is None:
            return None
        return tuple(own[index] for own, index in zip(self.offered, found, strict=True))

    def _problem(self) -> Problem:
        kinds = sorted({choice.precision for own in self.offered for choice in own})
        units = list(zip(self.network.units, self.offered, strict=True))
        return Problem(
            [[self.times.of(str(c)) * unit.times[c] for c in own] for unit, own in units],
            [[self.errors.whole(self.harms.parts(unit, c)) for c in own] for unit, own in units],
            [[kinds.index(c.precision) for c in own] for own in self.offered],
            tuple(self._edges(kinds)),
        )

    def _edges(self, kinds: Sequence[str]) -> Iterator[Edge]:
        for source, target, elements in self.network.passages:
            costs: dict[tuple[int, int], float] = {}
            for pair, us in self.network.per_element.items():
                if us > 0 and set(pair) <= set(kinds):
                    a, b = (kinds.index(each) for each in pair)
                    cost = self.times.of(_passing(pair)) * us * elements
                    costs |= {(a, b): cost, (b, a): cost}
            if costs:
                yield Edge(source, target, costs)


def time_parts(network: Network, choices: Assignment) -> dict[str, float]:
    """What a run consists of: layers by their choice, what passes by its precisions."""
    found: dict[str, float] = {}
    for unit, choice in zip(network.units, choices, strict=True):
        found[str(choice)] = found.get(str(choice), 0.0) + unit.times[choice]
    crossed = crossing([choice.precision for choice in choices], network.passages)
    for pair, elements in crossed.items():
        if us := network.per_element.get(pair, 0.0):
            found[_passing(pair)] = us * elements
    return found


def error_parts(network: Network, harms: Harms, choices: Assignment) -> dict[str, float]:
    """What the error consists of, by patterns and precisions."""
    found: dict[str, float] = {}
    for unit, choice in zip(network.units, choices, strict=True):
        for part, error in harms.parts(unit, choice).items():
            found[part] = found.get(part, 0.0) + error
    return found


def _passing(pair: tuple[str, str]) -> str:
    return f"{pair[0]} beside {pair[1]}"

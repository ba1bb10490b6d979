"""Which points a search builds, of a network whose times and errors are known to add up."""

from __future__ import annotations

import pytest

from twofour.compiler.forms import F32, INT8
from twofour.core.progress import unseen
from twofour.search.choices import BASELINE, Choice
from twofour.search.explore import Explorer, Goal, corners
from twofour.search.harms import Harm, Harms
from twofour.search.points import Assignment, Point
from twofour.search.units import Network, Unit

COUNT = 12
TIMES = {("", F32): 40.0, ("", INT8): 10.0, ("2:4", INT8): 7.0, ("2:4/pair", INT8): 5.0}
ERRORS = {INT8: 0.001, "2:4": 0.01, "2:4/pair": 0.05}


def unit(index: int) -> Unit:
    """The later ones lose more by pruning, and gain as much."""
    times = {Choice(*choice): us for choice, us in TIMES.items()}
    return Unit((f"layer{index}",), 100, times)


def harms() -> Harms:
    return Harms(
        {
            (f"layer{i}", part): Harm(f"layer{i}", part, error * 1.5**i, None)
            for i in range(COUNT)
            for part, error in ERRORS.items()
        }
    )


class Workshop:
    """Measures what the network is known to give; the metric falls with the error beyond 0.4."""

    def __init__(self) -> None:
        self.points: dict[Assignment, Point] = {}

    def point(self, name: str, choices: Assignment, stage: object) -> Point:
        us = sum(TIMES[c.pattern, c.precision] for c in choices)
        known = harms()
        error = sum(sum(known.parts(unit(i), choice).values()) for i, choice in enumerate(choices))
        drop = max(0.0, error - 0.4)
        made = Point(name, choices, us, (1.0, 1.0, 1.0), 90 - drop, drop, 0.1, error)
        self.points[choices] = made
        return made


@pytest.fixture(scope="module")
def explored() -> Explorer:
    network = Network(tuple(map(unit, range(COUNT))), (), {})
    goal = Goal(max_drop=1.0)
    made = Explorer(network, harms(), Workshop(), goal, 40, unseen)  # type: ignore[arg-type]
    made.run()
    return made


def test_no_point_is_built_twice_and_no_more_than_allowed(explored: Explorer) -> None:
    points = list(explored.workshop.points.values())
    assert 20 < len(points) <= 40
    assert len({point.choices for point in points}) == len(points)


def test_every_network_of_layers_alike_is_beaten(explored: Explorer) -> None:
    points = list(explored.workshop.points.values())
    for name, choices in corners(explored.network):
        own = explored.workshop.points[choices]
        ahead = [point for point in points if point.is_ahead_of(own)]
        assert ahead or "pair" in name, name  # nothing is as fast as every layer in the fastest


def test_gaps_are_filled_where_the_metric_still_gets_better(explored: Explorer) -> None:
    filled = [p for p in explored.workshop.points.values() if "in a gap" in p.name]
    assert filled
    assert max(point.latency_us for point in filled) < 12 * TIMES["", INT8]


def test_a_point_is_ahead_of_another_in_both() -> None:
    def made(us: float, drop: float | None) -> Point:
        return Point("", (BASELINE,), us, (1.0, 1.0, 1.0), None, drop, None, None)

    assert made(1.0, 1.0).is_ahead_of(made(2.0, 1.0))
    assert made(1.0, 0.5).is_ahead_of(made(1.0, 1.0))
    assert not made(1.0, 1.0).is_ahead_of(made(1.0, 1.0))
    assert not made(1.0, 2.0).is_ahead_of(made(2.0, 1.0))
    assert not made(1.0, None).is_ahead_of(made(2.0, 1.0))

"""Fronts of points."""

from __future__ import annotations

from twofour.search.explore import Goal
from twofour.search.points import Point, error_front, front


def point(us: float, drop: float | None, error: float | None = None) -> Point:
    return Point(f"{us}", (), us, (1.0, 1.0, 1.0), 0.0, drop, None, error)


def test_the_front() -> None:
    """A tie in the metric is of use to the faster one only; what has no number is on no front."""
    points = [point(9, 0.0), point(5, 1.0), point(6, 1.0), point(4, 2.0), point(1, None)]
    assert [p.latency_us for p in front(points)] == [4, 5, 9]
    assert front([]) == ()


def test_the_front_by_the_error_is_another() -> None:
    points = [point(9, 0.0, 0.3), point(5, 1.0, 0.2), point(4, 2.0, 0.5), point(1, 0.0, None)]
    assert [p.latency_us for p in error_front(points)] == [4, 5]


def test_what_holds_a_drop() -> None:
    goal = Goal(max_drop=1.0)
    assert [goal.holds(p) for p in (point(1, 1.0), point(1, 1.01), point(1, None))] == [
        True,
        False,
        False,
    ]
    best = goal.best([point(5, 0.0), point(3, 0.9), point(2, 1.2), point(1, None)])
    assert best is not None
    assert best.latency_us == 3
    assert goal.best([point(2, 1.2)]) is None


def test_what_holds_a_latency() -> None:
    goal = Goal(max_latency_us=3.0)
    best = goal.best([point(5, 0.0), point(3, 0.9), point(2, 1.2), point(1, None)])
    assert best is not None
    assert best.latency_us == 3
    assert goal.best([point(2, None), point(4, 0.0)]) is None

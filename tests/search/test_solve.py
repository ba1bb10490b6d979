"""The solver against all there is, on problems small enough for that."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.search.solve import Edge, Problem, fastest, least_harm

number = st.integers(0, 60).map(float)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    units = draw(st.integers(1, 5))
    counts = [draw(st.integers(1, 3)) for _ in range(units)]
    numbers = [[draw(number) for _ in range(n)] for n in counts]
    harms = [[draw(number) for _ in range(n)] for n in counts]
    kinds = [[draw(st.integers(0, 2)) for _ in range(n)] for n in counts]
    edges = [
        Edge(a, b, {pair: draw(number) for pair in itertools.permutations(range(3), 2)})
        for a, b in itertools.combinations(range(units), 2)
        if draw(st.booleans())
    ]
    return Problem(numbers, harms, kinds, edges, draw(number))


def every(problem: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(each)) for each in problem.times)))


@settings(max_examples=120, deadline=None)
@given(problems(), st.integers(0, 200).map(float))
def test_fastest_is_the_best_of_all(problem: Problem, limit: float) -> None:
    within = [c for c in every(problem) if problem.harm(c) <= limit]
    found = fastest(problem, limit)
    assert (found is None) == (not within)
    if found is not None:
        assert problem.harm(found) <= limit + 1e-6
        best = min(map(problem.time, within))
        assert problem.time(found) == pytest.approx(best, rel=2e-4, abs=2e-2)


@settings(max_examples=120, deadline=None)
@given(problems(), st.integers(0, 400).map(float))
def test_least_harm_is_the_best_of_all(problem: Problem, limit: float) -> None:
    within = [c for c in every(problem) if problem.time(c) <= limit]
    found = least_harm(problem, limit)
    assert (found is None) == (not within)
    if found is not None:
        assert problem.time(found) <= limit + 1e-3
        best = min(map(problem.harm, within))
        assert problem.harm(found) == pytest.approx(best, rel=2e-4, abs=2e-2)


def test_no_limit_is_no_limit() -> None:
    problem = Problem([[3.0, 1.0]], [[0.0, 9.0]], [[0, 0]])
    assert fastest(problem, math.inf) == (1,)
    assert fastest(problem, 8.9) == (0,)
    assert least_harm(problem, 0.5) is None


def test_of_equally_fast_choices_the_less_harmful_one() -> None:
    problem = Problem([[2.0, 2.0, 2.0]], [[5.0, 1.0, 3.0]], [[0, 0, 0]])
    assert fastest(problem, math.inf) == (1,)


def test_a_passage_is_dearer_than_what_it_would_gain() -> None:
    """Alone the middle one would be int8."""
    times, harms, kinds = [[9.0, 5.0]] * 3, [[0.0, 9.0], [0.0, 1.0], [0.0, 9.0]], [[0, 1]] * 3
    cost = {(0, 1): 3.0, (1, 0): 3.0}
    edges = [Edge(0, 1, cost), Edge(1, 2, cost)]
    assert fastest(Problem(times, harms, kinds), 2.0) == (0, 1, 0)
    assert fastest(Problem(times, harms, kinds, edges), 2.0) == (0, 0, 0)
    assert fastest(Problem(times, harms, kinds, edges), 100.0) == (1, 1, 1)


def test_a_hundred_units_with_passages() -> None:
    """As many as a large network has."""
    units = 100
    times = [[20.0 + u % 7, 12.0 + u % 5, 6.0 + u % 3] for u in range(units)]
    harms = [[0.0, 0.1 * (1 + u % 11), 0.3 * (1 + u % 13)] for u in range(units)]
    kinds = [[0, 1, 1]] * units
    edges = [Edge(u, u + 1, {(0, 1): 2.0, (1, 0): 2.0}) for u in range(units - 1)]
    problem = Problem(times, harms, kinds, edges)
    times_us = []
    for limit in (0.0, 5.0, 20.0, 60.0, math.inf):
        found = fastest(problem, limit)
        assert found is not None
        assert problem.harm(found) <= limit + 1e-6
        times_us.append(problem.time(found))
    assert times_us == sorted(times_us, reverse=True)
    assert len(set(times_us)) == len(times_us)

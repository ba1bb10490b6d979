"""The search for the fewest items against trying every set, on networks that are made up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.core.budget import LEAST_EVALUATIONS, Choice, fewest

Drop = Callable[[frozenset[str]], float]
PLENTY = 200


class Counted:
    """A judge that refuses a set it was asked for before."""

    def __init__(self, drop: Drop) -> None:
        self._drop = drop
        self.seen: list[frozenset[str]] = []

    def __call__(self, sets: Sequence[frozenset[str]]) -> list[float]:
        assert sets
        assert not set(sets) & set(self.seen)
        assert len(set(sets)) == len(sets)
        self.seen += sets
        return [self._drop(each) for each in sets]


def search(names: Sequence[str], drop: Drop, limit: float, most: int = PLENTY) -> Choice:
    judge = Counted(drop)
    found = fewest(names, judge, limit, most)
    assert found.evaluations == len(judge.seen) <= most
    assert frozenset(found.left) in judge.seen  # every answer was judged
    assert found.drop == drop(frozenset(found.left))
    assert found.holds == (found.drop <= limit + 1e-9)
    return found


def least(names: Sequence[str], drop: Drop, limit: float) -> int | None:
    """By trying every set."""
    sizes = [
        len(chosen)
        for count in range(len(names) + 1)
        for chosen in itertools.combinations(names, count)
        if drop(frozenset(chosen)) <= limit + 1e-9
    ]
    return min(sizes, default=None)


def adding_up(costs: dict[str, float]) -> Drop:
    return lambda left: sum(cost for name, cost in costs.items() if name not in left)


quarters = st.integers(0, 40).map(lambda n: n / 4)  # sums of them are exact


@settings(max_examples=200, deadline=None)
@given(st.lists(quarters, min_size=1, max_size=8), quarters)
def test_where_gains_add_up_no_set_is_smaller(costs: list[float], limit: float) -> None:
    drop = adding_up({f"l{i}": cost for i, cost in enumerate(costs)})
    names = [f"l{i}" for i in range(len(costs))]
    found = search(names, drop, limit)
    assert found.holds
    assert len(found.left) == least(names, drop, limit)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5), quarters, st.booleans())
def test_whatever_the_drops_are(
    data: st.DataObject, count: int, limit: float, monotone: bool
) -> None:
    """The answer holds, and no member of it can be taken out."""
    names = [f"l{i}" for i in range(count)]
    sets = [frozenset(s) for k in range(count + 1) for s in itertools.combinations(names, k)]
    table = {each: data.draw(quarters) for each in sets}

    def drop(left: frozenset[str]) -> float:
        if not monotone:
            return table[left]
        return min(value for each, value in table.items() if each <= left)

    found = search(names, drop, limit)
    if found.holds and len(found.left) > 1:
        for name in found.left:
            assert drop(frozenset(found.left) - {name}) > limit
    best = least(names, drop, limit)
    if not found.holds:
        assert drop(frozenset(names)) > limit
        assert not monotone or best is None
    else:
        assert best is not None
        assert len(found.left) >= best
        assert (len(found.left) <= 1) == (best <= 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(quarters, min_size=1, max_size=40), quarters, st.integers(LEAST_EVALUATIONS, 30))
def test_the_evaluations_are_bounded(costs: list[float], limit: float, most: int) -> None:
    names = [f"l{i}" for i in range(len(costs))]
    found = search(names, adding_up(dict(zip(names, costs, strict=True))), limit, most)
    assert found.holds


def test_nothing_to_do() -> None:
    found = search(["a", "b"], lambda left: 0.5, 0.5)
    assert (found.left, found.holds, found.evaluations, found.drop_of_all) == ((), True, 1, None)


def test_no_items() -> None:
    assert not search([], lambda left: 2.0, 1.0).holds


def test_not_even_with_all() -> None:
    found = search(["a", "b"], lambda left: 2.0 - 0.1 * len(left), 1.0)
    assert (found.left, found.holds, found.evaluations) == (("a", "b"), False, 2)
    assert found.drop_of_all == pytest.approx(1.8)


def test_it_stops_where_one_is_enough() -> None:
    """The likeliest first: 2 and the first four, not all forty."""
    names = [f"l{i}" for i in range(40)]
    found = search(names, lambda left: 0.0 if "l2" in left else 5.0, 1.0)
    assert (found.left, found.evaluations) == (("l2",), 6)


def test_few_evaluations_take_the_order_that_was_given() -> None:
    """Forty items, and not enough evaluations to judge each of them."""
    names = [f"l{i}" for i in range(40)]
    costs = {name: 1.0 / (i + 1) for i, name in enumerate(names)}
    found = search(names, adding_up(costs), 1.5, 16)
    assert 0 < len(found.gains) < 40
    assert len(found.left) == least_of_order(list(costs.values()), 1.5)


def least_of_order(costs: list[float], limit: float) -> int:
    return next(k for k in range(len(costs) + 1) if sum(costs[k:]) <= limit)


def test_networks_without_a_number() -> None:
    found = search(["a", "b", "c"], lambda left: 0.0 if len(left) > 1 else math.inf, 1.0)
    assert found.holds
    assert len(found.left) == 2
    assert set(found.gains.values()) == {0.0}


def test_a_useless_member_is_taken_out() -> None:
    """`b` seems to gain alone, but not once `a` and `c` are left alone."""

    def drop(left: frozenset[str]) -> float:
        if {"a", "c"} <= left:
            return 0.0
        return 10.0 - 3 * ("a" in left) - 2 * ("b" in left) - ("c" in left)

    assert search(["a", "b", "c"], drop, 1.0).left == ("a", "c")


@pytest.mark.parametrize(("items", "most"), [(["a", "a"], 20), (["a"], LEAST_EVALUATIONS - 1)])
def test_bad_arguments(items: list[str], most: int) -> None:
    with pytest.raises(ValueError, match="evaluations"):
        fewest(items, lambda sets: [0.0] * len(sets), 1.0, most)

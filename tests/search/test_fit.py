"""What points teach: factors, and a rising map."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.search.fit import NEUTRAL, Rising, fit_factors


def test_without_points_nothing_is_known() -> None:
    assert fit_factors([]) == NEUTRAL
    assert fit_factors([({"a": 0.0}, 3.0), ({"a": math.inf}, 3.0), ({"a": 1.0}, 0.0)]) == NEUTRAL


def test_one_factor_is_shared_by_all_parts() -> None:
    found = fit_factors([({"a": 10.0, "b": 30.0}, 60.0)])
    assert found.shared == 1.5
    assert found.whole({"a": 2.0, "new": 4.0}) == pytest.approx(9.0)


def test_own_factors_are_found_from_mixed_points() -> None:
    truth = {"f32": 1.1, "int8": 1.6, "passing": 3.0}
    random = np.random.default_rng(0)
    points = []
    for _ in range(12):
        parts = {name: float(random.uniform(5, 50)) for name in truth}
        points.append((parts, sum(truth[n] * v for n, v in parts.items())))
    found = fit_factors(points)
    for name, factor in truth.items():
        assert found.of(name) == pytest.approx(factor, rel=0.1)
    parts = {"f32": 20.0, "int8": 20.0, "passing": 1.0}
    whole = sum(truth[n] * v for n, v in parts.items())
    assert found.whole(parts) == pytest.approx(whole, rel=0.03)


def test_a_part_of_one_point_is_not_taken_at_its_word() -> None:
    """Nothing tells that it was this part; no factor becomes negative or huge."""
    points = [({"a": 10.0}, 10.0), ({"a": 10.0, "b": 0.01}, 30.0), ({"a": 9.0, "c": 1.0}, 0.1)]
    found = fit_factors(points)
    assert all(0 < factor < 10 for factor in found.own.values())


def test_the_map_goes_through_points_that_rise() -> None:
    rising = Rising.through([(1.0, 2.0), (3.0, 4.0)])
    assert [rising.at(x) for x in (0, 0.5, 1, 2, 3, 6)] == [0, 1, 2, 3, 4, 8]
    assert [rising.most(y) for y in (0, 1, 2, 3, 4)] == pytest.approx([0, 0.5, 1, 2, 3])
    assert rising.most(8.0) == pytest.approx(6.0)


def test_noise_that_falls_is_evened_out() -> None:
    rising = Rising.through([(1.0, 1.0), (2.0, 0.0), (4.0, 5.0)])
    assert rising.at(1.5) == pytest.approx(0.5)
    assert rising.most(0.5) == pytest.approx(1.5)


def test_a_network_that_loses_nothing() -> None:
    rising = Rising.through([(1.0, -0.2), (2.0, -0.1)])
    assert rising.most(0.5) == math.inf
    assert rising.at(100.0) <= 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(-20, 100)), max_size=12),
    st.integers(0, 100),
)
def test_the_map_never_falls_and_its_inverse_is_one(
    points: list[tuple[int, int]], limit: int
) -> None:
    rising = Rising.through([(x / 10, y / 10) for x, y in points])
    values = [rising.at(x) for x in np.linspace(0, 12, 60)]
    assert all(b >= a - 1e-9 for a, b in pairwise(values))
    most = rising.most(limit / 10)
    assert most >= 0
    if 0 < most < math.inf:
        assert rising.at(most) <= limit / 10 + 1e-6


def test_a_point_that_was_disturbed_counts_less() -> None:
    random = np.random.default_rng(1)
    points = []
    for _ in range(10):
        parts = {name: float(random.uniform(20, 50)) for name in ("a", "b")}
        points.append((parts, 1.2 * parts["a"] + 0.9 * parts["b"]))
    clean = fit_factors(points)
    spoiled = fit_factors([*points, (points[0][0], 5 * points[0][1])])
    for name in ("a", "b"):
        assert spoiled.of(name) == pytest.approx(clean.of(name), rel=0.03)

"""Records: what comes back equals what went out, and nothing of another type gets in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.core.records import from_plain, to_plain


@dataclass(frozen=True)
class Point:
    name: str
    at: tuple[int, ...]
    weight: float | None = None


@dataclass(frozen=True)
class Cloud:
    points: tuple[Point, ...]
    counts: dict[str, int] = field(default_factory=dict)
    closed: bool = False
    scale: float = 1.0


points = st.builds(
    Point,
    st.text(st.characters(codec="utf-8")),
    st.lists(st.integers()).map(tuple),
    st.none() | st.floats(-1e200, 1e200),
)
clouds = st.builds(
    Cloud,
    st.lists(points).map(tuple),
    st.dictionaries(st.text(), st.integers()),
    st.booleans(),
    st.floats(-1e200, 1e200),
)


@given(clouds)
def test_from_plain_is_the_inverse_of_to_plain(cloud: Cloud) -> None:
    assert from_plain(Cloud, json.loads(json.dumps(to_plain(cloud)))) == cloud


def test_missing_fields_take_their_defaults() -> None:
    assert from_plain(Cloud, {"points": []}) == Cloud(())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "Cloud: expected an object, got []"),
        ({}, "Cloud: field 'points' is missing"),
        ({"points": [], "colour": 1}, "Cloud: unknown field 'colour'"),
        ({"points": {}}, "Cloud.points: expected a list, got {}"),
        ({"points": [3]}, "Cloud.points[0]: expected an object, got 3"),
        ({"points": [{"name": 1, "at": []}]}, "Cloud.points[0].name: expected str, got 1"),
        ({"points": [{"name": "\ud800", "at": []}]}, "Cloud.points[0].name: expected valid text"),
        ({"points": [{"name": "", "at": [1.0]}]}, "Cloud.points[0].at[0]: expected int, got 1.0"),
        ({"points": [{"name": "", "at": [True]}]}, "Cloud.points[0].at[0]: expected int, got True"),
        ({"points": [{"name": "", "at": "12"}]}, "Cloud.points[0].at: expected a list, got '12'"),
        ({"points": [], "counts": {"a": "1"}}, "Cloud.counts['a']: expected int, got '1'"),
        ({"points": [], "closed": 1}, "Cloud.closed: expected bool, got 1"),
        ({"points": [], "scale": True}, "Cloud.scale: expected a finite number, got True"),
        ({"points": [], "scale": float("nan")}, "Cloud.scale: expected a finite number, got nan"),
        ({"points": [], "scale": 10**400}, "Cloud.scale: expected a finite number, got 1000"),
        ({"points": [], "scale": None}, "Cloud.scale: expected a finite number, got None"),
    ],
)
def test_anything_else_is_refused_by_name(data: object, message: str) -> None:
    with pytest.raises(ValueError, match="Cloud") as refused:
        from_plain(Cloud, data)
    assert str(refused.value).startswith(message)

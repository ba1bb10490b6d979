"""What to leave dense: the order by cost per gain, against every subset."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.core.sensitivity import (
    Case,
    Sensitivity,
    Together,
    Tradeoff,
    case_of,
    document,
    judged,
    tradeoff,
)


def case(layer: str, drop: float, pattern: str = "2:4") -> Case:
    return Case(layer, pattern, layer, 64, 0.9, 90.0 - drop, drop, 0.1, 1.0)


def way(drops: dict[str, float], gains: dict[str, float]) -> Tradeoff:
    return tradeoff([case(name, drop) for name, drop in drops.items()], "2:4", "int8", gains)


def test_the_order_is_by_drop_per_us() -> None:
    found = way(
        {"a": 1.0, "b": 1.0, "c": -3.0, "d": 0.2, "none": 0.0, "unknown": 9.0},
        {"a": 1.0, "b": 4.0, "c": 1.0, "d": 2.0, "none": 0.0, "other": 5.0},
    )
    assert [step.layer for step in found.steps] == ["c", "d", "b", "a"]
    assert [step.drop for step in found.steps] == [-3.0, 0.2, 1.0, 1.0]
    assert [step.total_drop for step in found.steps] == [0.0, 0.2, 1.2, 2.2]
    assert [step.total_gain_us for step in found.steps] == [1.0, 3.0, 7.0, 8.0]
    assert found.steps[-1].share == 1.0
    assert found.useless == ("none",)
    assert "unknown" not in found.gains


def test_how_many_layers_a_share_of_the_gain_takes() -> None:
    found = way({"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 1.0, "b": 1.0, "c": 2.0})
    assert [found.step_for(share) for share in (0.0, 0.25, 0.5, 0.76, 1.0)] == [1, 1, 2, 3, 3]
    assert way({"a": 0.1}, {}).step_for(0.5) == 0


def test_a_network_that_gives_no_number_comes_last() -> None:
    found = way({"a": math.nan, "b": 5.0}, {"a": 9.0, "b": 1.0})
    assert [step.layer for step in found.steps] == ["b", "a"]
    assert found.steps[1].total_drop == math.inf
    whole = Sensitivity("m", "top1", "%", True, 90.0, 10, (case("b", 5.0), case("a", math.nan)))
    assert [each.layer for each in whole.at("2:4")] == ["a", "b"]


amounts = st.integers(0, 20).map(float)


@given(st.lists(st.tuples(amounts, st.integers(1, 20).map(float)), min_size=1, max_size=7))
def test_no_other_choice_gains_as_much_for_less(layers: list[tuple[float, float]]) -> None:
    names = [f"l{k}" for k in range(len(layers))]
    drops = {name: drop for name, (drop, _) in zip(names, layers, strict=True)}
    gains = {name: gain for name, (_, gain) in zip(names, layers, strict=True)}
    for step in way(drops, gains).steps:
        for size in range(len(names) + 1):
            for chosen in itertools.combinations(names, size):
                if sum(gains[name] for name in chosen) >= step.total_gain_us - 1e-9:
                    assert sum(drops[name] for name in chosen) >= step.total_drop - 1e-9


def test_patterns_keep_apart() -> None:
    cases = (case("a", 1.0), case("a", 2.0, "2:4/pair"), case("b", 1.5))
    found = Sensitivity("m", "top1", "%", True, 90.0, 10, cases)
    assert found.patterns == ("2:4", "2:4/pair")
    assert [each.layer for each in found.at("2:4")] == ["b", "a"]
    assert [each.drop for each in found.at("2:4/pair")] == [2.0]


def test_results_survive_the_cache() -> None:
    found = case_of(("a", "w", 4), "2:4", judged(0.5, 1.0, 2.0, None, 3.0))
    assert found == Case("a", "2:4", "w", 4, 0.5, 1.0, 2.0, None, 3.0)
    assert Together.of(3, judged(0.9, 1.0, 2.0, 0.5, 3.0)) == Together(3, 1.0, 2.0, 0.5)


def test_the_document_is_plain() -> None:
    found = Sensitivity("m", "top1", "%", True, 90.0, 10, (case("a", 1.0),))
    plain = document(found, [way({"a": 1.0}, {"a": 2.0})], "a CPU")
    assert plain["tradeoffs"][0]["gains"] == [{"layer": "a", "gain_us": 2.0}]
    assert plain["tradeoffs"][0]["steps"][0]["drop_per_us"] == pytest.approx(0.5)
    assert plain["machine"] == "a CPU"

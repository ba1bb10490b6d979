"""Graphs in ranks: edges lead down, nothing overlaps, little crosses, long ones are folded."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.report.graph import ranked
from twofour.report.graph_places import Drawing, Sizes, draw

SIZES = Sizes()
PAIRS = st.tuples(st.integers(0, 24), st.integers(0, 24)).map(sorted).map(tuple)
GRAPHS = st.lists(PAIRS.filter(lambda pair: pair[0] != pair[1]), unique=True, max_size=60)


def chain(count: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(range(count)))


def residual(blocks: int) -> list[tuple[int, int]]:
    """Blocks of two layers, each with a way around."""
    return [*chain(2 * blocks + 1), *((2 * k, 2 * k + 2) for k in range(blocks))]


def ends(path: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where a path begins and ends."""
    place = first = (0.0, 0.0)
    for letter, text in re.findall(r"([MVLQCv])([^A-Za-z]*)", path):
        numbers = [float(each) for each in text.split()]
        if letter in "MLQC":
            place = (numbers[-2], numbers[-1])
        elif letter == "V":
            place = (place[0], numbers[0])
        else:
            place = (place[0], place[1] + numbers[0])
        first = place if letter == "M" else first
    return first, place


def check(count: int, edges: list[tuple[int, int]]) -> Drawing:
    """No node over another, every edge from the foot of its source to the head of its target."""
    drawing = draw(count, edges, SIZES)
    assert len(drawing.nodes) == count
    for (x, y), (a, b) in itertools.combinations(drawing.nodes, 2):
        apart = abs(x - a) >= SIZES.width - 0.2 or abs(y - b) >= SIZES.height - 0.2
        assert apart, ((x, y), (a, b))
    for (source, target), path in zip(edges, drawing.paths, strict=True):
        start, end = ends(path)
        for node, place, lower in ((source, start, SIZES.height), (target, end, 0.0)):
            x, y = drawing.nodes[node]
            assert place == pytest.approx((x + SIZES.width / 2, y + lower), abs=0.3)
    for x, y in drawing.nodes:
        assert -0.1 <= x <= drawing.width - SIZES.width + 0.1
        assert -0.1 <= y <= drawing.height - SIZES.height + 0.1
    return drawing


@settings(max_examples=60, deadline=None)
@given(GRAPHS)
def test_any_graph_is_drawn(edges: list[tuple[int, int]]) -> None:
    check(25, edges)
    graph = ranked(25, edges)
    rank = {node: place for place, row in enumerate(graph.ranks) for node in row}
    assert all(rank[upper] < rank[lower] for upper, lower in graph.links)
    assert sorted(node for row in graph.ranks for node in row) == sorted(rank)
    for (source, target), way in zip(edges, graph.chains, strict=True):
        assert (way[0], way[-1]) == (source, target)
        assert [rank[node] for node in way] == list(range(rank[source], rank[target] + 1))


def test_nothing_and_one() -> None:
    assert check(0, []).paths == ()
    assert len(check(1, []).nodes) == 1


def test_a_chain_is_straight_and_folded_like_a_page() -> None:
    drawing = check(120, chain(120))
    lefts = {x for x, _ in drawing.nodes}
    assert len(lefts) == drawing.columns > 2
    assert 0.8 < drawing.width / drawing.height < 3.2


def test_the_main_way_of_residual_blocks_stays_straight() -> None:
    drawing = check(9, residual(4))
    for (x, y), (a, b) in itertools.pairwise(drawing.nodes):
        assert b < y or x == pytest.approx(a, abs=1.0)  # but for where it is folded


def test_a_fold_cuts_where_one_value_is_cut() -> None:
    """Behind a block; within one there are two."""
    drawing = check(101, residual(50))
    firsts = [k for k in range(1, 101) if drawing.nodes[k][1] < drawing.nodes[k - 1][1]]
    assert len(firsts) == drawing.columns - 1 > 1
    assert {k % 2 for k in firsts} == {1}


def crossings(count: int, edges: list[tuple[int, int]]) -> int:
    graph = ranked(count, edges)
    place = {node: k for row in graph.ranks for k, node in enumerate(row)}
    rank = {node: k for k, row in enumerate(graph.ranks) for node in row}
    pairs = itertools.combinations(graph.links, 2)
    return sum(
        rank[a] == rank[c] and (place[a] - place[c]) * (place[b] - place[d]) < 0
        for (a, b), (c, d) in pairs
    )


def test_what_need_not_cross_does_not() -> None:
    tree = [((k - 1) // 2, k) for k in range(1, 31)]
    assert crossings(31, tree) == 0
    ladders = [(a + 3 * k, b + 3 * (k + 1)) for k in range(5) for a, b in ((0, 2), (1, 1), (2, 0))]
    assert crossings(18, ladders) == 0
    assert crossings(6, [(a, b) for a in range(3) for b in range(3, 6)]) == 9  # all of K3,3


def test_edges_that_leave_together_share_their_way() -> None:
    edges = [*chain(10), *((0, k) for k in range(2, 10))]
    graph = ranked(10, edges)
    points = sum(len(row) for row in graph.ranks) - 10
    assert points == 8


def test_thousands_of_long_edges_are_drawn_in_time() -> None:
    """Without bounds these would pass through millions of points."""
    edges = [*chain(3000), *((k, 2999 - k) for k in range(1200))]
    assert len(draw(3000, edges, SIZES).paths) == len(edges)

"""Where the nodes and edges of a ranked graph lie: coordinates, columns, and lines as SVG paths.

    x        each node near its neighbours, as far as those beside it let it (least squares)
    columns  ranks stand below each other; a long graph is cut where little is cut, and its
             parts stand side by side, read as a newspaper is
    lines    smooth between ranks; from one column to the next through the gutter between them

Source: the least squares with gaps are solved exactly by pooling adjacent violators, Ayer et al.
1955.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from twofour.report.graph import Link, Ranked, ranked

_SWEEPS = 10
_STRAIGHT, _DIRECT, _AROUND = 4.0, 8.0, 1e-3
"""Pulls of a link: between two points of a long edge, between two nodes, between node and point."""
_LIGHT = 1e-4
"""Of a point, that of a node is 1: where both want to be in one place, the point makes way."""
_POINT = 8.0
_LANE, _BEND = 9.0, 7.0


@dataclass(frozen=True)
class Sizes:
    """In pixels.

    Attributes:
        width: of a node.
        height: of a node.
        across: between nodes side by side.
        down: between ranks.
        gutter: between columns, beside their lanes.
        aspect: width over height that the drawing should have.
    """

    width: float = 176.0
    height: float = 42.0
    across: float = 16.0
    down: float = 26.0
    gutter: float = 44.0
    aspect: float = 1.6


@dataclass(frozen=True)
class Drawing:
    """A graph drawn.

    Attributes:
        nodes: left and top of each node.
        paths: of each edge, as the `d` of an SVG path.
        width: of all.
        height: of all.
        columns: that it was cut into.
    """

    nodes: tuple[tuple[float, float], ...]
    paths: tuple[str, ...]
    width: float
    height: float
    columns: int


def draw(count: int, edges: Sequence[Link], sizes: Sizes) -> Drawing:
    """Draws a graph.

    Args:
        count: nodes.
        edges: source and target of each, all different, each source less than its target.
        sizes: of what is drawn.
    """
    graph = ranked(count, edges)
    across = _across(graph, sizes)
    columns = _columns(graph, across, sizes)
    return _Lines(graph, across, columns, sizes).drawing()


def _across(graph: Ranked, sizes: Sizes) -> list[float]:
    """The middle of each node and point, from the left."""
    total = sum(len(row) for row in graph.ranks)
    found = [0.0] * total
    bodies = [(sizes.width, 1.0) if n < graph.count else (_POINT, _LIGHT) for n in range(total)]
    near: tuple[dict[int, list[tuple[int, float]]], ...] = ({}, {})
    for upper, lower in graph.links:
        ends = (upper < graph.count) + (lower < graph.count)
        pull = (_STRAIGHT, _AROUND, _DIRECT)[ends]
        near[0].setdefault(lower, []).append((upper, pull))
        near[1].setdefault(upper, []).append((lower, pull))
    for row in graph.ranks:
        _place(row, {node: 0.0 for node in row}, bodies, sizes.across, found)
    for sweep in range(_SWEEPS):
        ways = near if sweep == _SWEEPS - 1 else (near[sweep % 2],)
        for row in graph.ranks if sweep % 2 == 0 else reversed(graph.ranks):
            wanted = {node: _wanted(node, ways, found) for node in row}
            _place(row, wanted, bodies, sizes.across, found)
    return found


def _wanted(
    node: int, ways: Sequence[Mapping[int, list[tuple[int, float]]]], found: Sequence[float]
) -> float:
    """The weighted mean of the neighbours; without any, where it is."""
    near = [pair for way in ways for pair in way.get(node, ())]
    weight = sum(pull for _, pull in near)
    return sum(pull * found[other] for other, pull in near) / weight if near else found[node]


def _place(
    row: Sequence[int],
    wanted: Mapping[int, float],
    bodies: Sequence[tuple[float, float]],
    across: float,
    found: list[float],
) -> None:
    """Sets the nodes of a rank as near to where they want to be as those beside them allow.

    Args:
        row: the rank.
        wanted: the middle that each wants.
        bodies: width and weight of each node.
        across: least distance between two.
        found: their middles, written.
    """
    starts, start, before = [], 0.0, None
    for node in row:
        if before is not None:
            start += (bodies[before][0] + bodies[node][0]) / 2 + across
        starts.append(start)
        before = node
    blocks: list[tuple[float, float, int]] = []  # mean, weight and length of runs that touch
    for node, begin in zip(row, starts, strict=True):
        mean, weight, length = wanted[node] - begin, bodies[node][1], 1
        while blocks and blocks[-1][0] >= mean:
            other, heavy, size = blocks.pop()
            mean = (mean * weight + other * heavy) / (weight + heavy)
            weight, length = weight + heavy, length + size
        blocks.append((mean, weight, length))
    shifts = [mean for mean, _, length in blocks for _ in range(length)]
    for node, begin, shift in zip(row, starts, shifts, strict=True):
        found[node] = begin + shift


@dataclass(frozen=True)
class _Column:
    """Ranks below each other.

    Attributes:
        ranks: from the first to the last, the last excluded.
        left: what is taken from an x of them, so that they begin at 0.
        width: of them.
    """

    ranks: range
    left: float
    width: float


def _columns(graph: Ranked, across: Sequence[float], sizes: Sizes) -> list[_Column]:
    """Cuts the ranks so that the drawing is about as wide as it should be."""
    count = len(graph.ranks)
    pitch = sizes.height + sizes.down
    ends = [_ends(graph, row, across, sizes) for row in graph.ranks]
    usual = sum(right - left for left, right in ends) / max(count, 1)
    width = max(usual, sizes.width) * 1.15 + sizes.gutter
    parts = max(1, round(math.sqrt(sizes.aspect * count * pitch / width)))
    cuts = [0, *_cuts(graph, min(parts, max(count, 1))), count]
    found = []
    for first, last in pairwise(cuts):
        left = min((ends[rank][0] for rank in range(first, last)), default=0.0)
        right = max((ends[rank][1] for rank in range(first, last)), default=0.0)
        found.append(_Column(range(first, last), left, right - left))
    return found


def _ends(
    graph: Ranked, row: Sequence[int], across: Sequence[float], sizes: Sizes
) -> tuple[float, float]:
    """The left and right end of a rank."""
    half = {node: sizes.width / 2 if node < graph.count else _POINT / 2 for node in row}
    lefts = [across[node] - half[node] for node in row]
    rights = [across[node] + half[node] for node in row]
    return min(lefts, default=0.0), max(rights, default=0.0)


def _cuts(graph: Ranked, parts: int) -> list[int]:
    """The ranks that begin a column, near equal parts, where the fewest edges are cut."""
    count = len(graph.ranks)
    rank_of = {node: rank for rank, row in enumerate(graph.ranks) for node in row}
    cut: list[set[int]] = [set() for _ in range(count + 1)]  # one line for each upper end
    for upper, lower in graph.links:
        for rank in range(rank_of[upper] + 1, rank_of[lower] + 1):
            cut[rank].add(upper)
    found: list[int] = []
    reach = count // (parts * 5)
    for part in range(1, parts):
        ideal = round(part * count / parts)
        least = (found[-1] if found else 0) + 1
        near = [rank for rank in range(ideal - reach, ideal + reach + 1) if least <= rank < count]
        if near:
            found.append(min(near, key=lambda rank: (len(cut[rank]), abs(rank - ideal))))
    return found


class _Lines:
    """Puts columns side by side, and draws the edges."""

    def __init__(
        self,
        graph: Ranked,
        across: Sequence[float],
        columns: Sequence[_Column],
        sizes: Sizes,
    ) -> None:
        self._graph, self._sizes = graph, sizes
        self._column_of: dict[int, int] = {}
        for place, column in enumerate(columns):
            for rank in column.ranks:
                self._column_of |= dict.fromkeys(graph.ranks[rank], place)
        self._lanes = self._count_lanes(len(columns))
        over = max((len(lanes) for lanes in self._lanes), default=0) * _LANE
        self._gutters: list[float] = []
        self._x, self._y = [0.0] * len(across), [0.0] * len(across)
        left, lowest = _BEND, 0.0
        for column, lanes in zip(columns, self._lanes, strict=True):
            for place, rank in enumerate(column.ranks):
                y = over + _BEND + place * (sizes.height + sizes.down)
                lowest = max(lowest, y + sizes.height)
                for node in graph.ranks[rank]:
                    self._x[node] = left + across[node] - column.left
                    self._y[node] = y
            left += column.width + sizes.gutter / 2
            self._gutters.append(left)
            left += len(lanes) * _LANE + sizes.gutter / 2
        last = sizes.gutter + len(self._lanes[-1]) * _LANE if self._lanes else 0.0
        self.width = left - last + _BEND
        self.height = lowest + over + _BEND
        self._columns = len(columns)

    def _count_lanes(self, columns: int) -> list[dict[int, int]]:
        """For the gutter behind each column, the lanes of what passes through it.

        Links from the same upper end share a lane.
        """
        found: list[dict[int, int]] = [{} for _ in range(columns)]
        for upper, lower in self._graph.links:
            column = self._column_of[upper]
            if self._column_of[lower] == column + 1:
                found[column].setdefault(upper, len(found[column]))
        return found

    def drawing(self) -> Drawing:
        """The nodes and paths."""
        half = self._sizes.width / 2
        nodes = range(self._graph.count)
        return Drawing(
            tuple((round(self._x[node] - half, 1), round(self._y[node], 1)) for node in nodes),
            tuple(self._path(chain) for chain in self._graph.chains),
            round(self.width, 1),
            round(self.height, 1),
            self._columns,
        )

    def _path(self, chain: Sequence[int]) -> str:
        """A line from the lower edge of the first node to the upper edge of the last."""
        x, y = self._x[chain[0]], self._y[chain[0]] + self._sizes.height
        parts = [f"M{x:.1f} {y:.1f}"]
        for upper, lower in pairwise(chain):
            turns = self._column_of[lower] == self._column_of[upper] + 1
            parts.append(self._turn(upper, lower) if turns else self._curve(upper, lower))
            if lower >= self._graph.count:  # past the nodes of its rank
                parts.append(f"v{self._sizes.height:.1f}")
        return "".join(parts)

    def _curve(self, upper: int, lower: int) -> str:
        """Down to another rank."""
        bottom, top = self._y[upper] + self._sizes.height, self._y[lower]
        x, to = self._x[upper], self._x[lower]
        if abs(x - to) < 0.1 and top > bottom:
            return f"V{top:.1f}"
        middle = (bottom + top) / 2
        return f"C{x:.1f} {middle:.1f} {to:.1f} {middle:.1f} {to:.1f} {top:.1f}"

    def _turn(self, upper: int, lower: int) -> str:
        """To the next column: down, right, up through the gutter, right, down."""
        column = self._column_of[upper]
        lane = self._lanes[column][upper]
        below = self._y[upper] + self._sizes.height + _BEND + lane * _LANE
        above = self._y[lower] - _BEND - lane * _LANE
        x, to = self._x[upper], self._x[lower]
        gutter = self._gutters[column] + lane * _LANE
        corners = [(x, below), (gutter, below), (gutter, above), (to, above), (to, self._y[lower])]
        return _rounded((x, below - _BEND), corners)


def _rounded(start: tuple[float, float], corners: Sequence[tuple[float, float]]) -> str:
    """Straight lines through corners, each turn a quarter of a circle or less."""
    parts = []
    before = start
    for corner, after in pairwise(corners):
        into = min(_BEND, _distance(before, corner) / 2)
        out = min(_BEND, _distance(corner, after) / 2)
        a, b = _towards(corner, before, into), _towards(corner, after, out)
        parts.append(
            f"L{a[0]:.1f} {a[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
        )
        before = corner
    parts.append(f"L{corners[-1][0]:.1f} {corners[-1][1]:.1f}")
    return "".join(parts)


def _distance(one: tuple[float, float], other: tuple[float, float]) -> float:
    return math.hypot(one[0] - other[0], one[1] - other[1])


def _towards(
    start: tuple[float, float], end: tuple[float, float], by: float
) -> tuple[float, float]:
    """A place on the way from one to the other."""
    whole = _distance(start, end) or 1.0
    return (
        start[0] + (end[0] - start[0]) * by / whole,
        start[1] + (end[1] - start[1]) * by / whole,
    )

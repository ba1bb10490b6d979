"""A directed graph drawn in ranks: which rank a node stands in, and in what order.

    ranks       the longest path from a source, so that every edge leads down
    long edges  pass through a point of their own in every rank between their ends
    order       each node near the mean of its neighbours, above and below in turns; what crosses
                least is kept

Source: Sugiyama, Tagawa, Toda 1981, "Methods for visual understanding of hierarchical system
structures"; the count of crossings: Barth, Mutzel, Juenger 2004.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 12
_SWAP_ROUNDS = 6
_MOST_SWAPPED = 4000  # nodes and points
_MOST_POINTS = 20_000

Link = tuple[int, int]


@dataclass(frozen=True)
class Ranked:
    """A graph in ranks.

    Attributes:
        count: nodes, 0 to count - 1; numbers from `count` on are points of long edges.
        ranks: the nodes and points of each rank, from the left.
        chains: of each edge all that it passes through, its ends included.
    """

    count: int
    ranks: tuple[tuple[int, ...], ...]
    chains: tuple[tuple[int, ...], ...]

    @property
    def links(self) -> list[Link]:
        """Upper and lower end; in neighbouring ranks, where an edge is not too long for points."""
        return list(_links(self.chains))


def _links(chains: Sequence[tuple[int, ...]]) -> dict[Link, None]:
    """Each once: edges may share some."""
    return dict.fromkeys(link for c in chains for link in pairwise(c))


def ranked(count: int, edges: Sequence[Link]) -> Ranked:
    """Puts a graph in ranks, few edges crossing.

    Args:
        count: nodes.
        edges: source and target of each, all different, each source less than its target.
    """
    rank = _ranks(count, edges)
    chains, rank = _chains(count, edges, rank)
    rows: list[list[int]] = [[] for _ in range(max(rank, default=-1) + 1)]
    for node in _by_depth(len(rank), chains):
        rows[rank[node]].append(node)
    order = _Order(rows, chains, rank)
    order.improve()
    return Ranked(count, tuple(tuple(row) for row in order.best), tuple(chains))


def _ranks(count: int, edges: Sequence[Link]) -> list[int]:
    """The longest path; what has more readers than sources stands close to its readers."""
    rank = [0] * count
    before: list[list[int]] = [[] for _ in range(count)]
    after: list[list[int]] = [[] for _ in range(count)]
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    for node in range(count):
        rank[node] = max((rank[source] + 1 for source in before[node]), default=0)
    for node in reversed(range(count)):
        if len(after[node]) > len(before[node]):
            rank[node] = min(rank[target] for target in after[node]) - 1
    least = min(rank, default=0)
    return [each - least for each in rank]


def _chains(
    count: int, edges: Sequence[Link], rank: list[int]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The edges with their points, and the ranks of nodes and points.

    Edges that leave the same node share their points: they are one line that branches.
    """
    spans: dict[int, int] = {}
    for source, target in edges:
        spans[source] = max(spans.get(source, 0), rank[target] - rank[source] - 1)
    longest = _longest(sorted(spans.values()))
    ranks, chains = list(rank), []
    points: dict[Link, int] = {}
    for source, target in edges:
        between = range(rank[source] + 1, rank[target])
        chain = [source]
        for place in between if len(between) <= longest else ():
            if (source, place) not in points:
                points[source, place] = len(ranks)
                ranks.append(place)
            chain.append(points[source, place])
        chains.append((*chain, target))
    return chains, ranks


def _longest(spans: Sequence[int]) -> int:
    """Up to which length edges get points, so that there are not too many; `spans` are sorted."""
    total = longest = 0
    for span in spans:
        total += span
        if total > _MOST_POINTS:
            break
        longest = span
    return longest


def _by_depth(count: int, chains: Sequence[tuple[int, ...]]) -> list[int]:
    """All nodes as a walk from the first on meets them: what belongs together stays together."""
    after: list[list[int]] = [[] for _ in range(count)]
    entered = [False] * count
    for upper, lower in _links(chains):
        after[upper].append(lower)
        entered[lower] = True
    seen = [False] * count
    found = []
    for start in sorted(range(count), key=lambda node: entered[node]):
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if not seen[node]:
                seen[node] = True
                found.append(node)
                waiting += reversed(after[node])
    return found


class _Order:
    """The order within ranks, improved step by step."""

    def __init__(
        self, rows: list[list[int]], chains: Sequence[tuple[int, ...]], rank: Sequence[int]
    ) -> None:
        self.rows = rows
        self.best = [list(row) for row in rows]
        self._above: list[list[int]] = [[] for _ in rank]
        self._below: list[list[int]] = [[] for _ in rank]
        for upper, lower in _links(chains):
            if rank[lower] == rank[upper] + 1:
                self._above[lower].append(upper)
                self._below[upper].append(lower)
        self._place = [0] * len(rank)
        for row in rows:
            self._number(row)

    def improve(self) -> None:
        """Sweeps, and keeps what crosses least."""
        least = self._crossings()
        swaps = len(self._place) <= _MOST_SWAPPED
        for sweep in range(_SWEEPS):
            if not least:
                return
            self._sweep(down=sweep % 2 == 0)
            if swaps:
                self._swap()
            found = self._crossings()
            if found < least:
                least, self.best = found, [list(row) for row in self.rows]

    def _number(self, row: Sequence[int]) -> None:
        for place, node in enumerate(row):
            self._place[node] = place

    def _sweep(self, *, down: bool) -> None:
        """Each rank by the mean place of the neighbours in the rank before."""
        near = self._above if down else self._below
        for row in self.rows if down else reversed(self.rows):
            means = {
                node: sum(self._place[other] for other in near[node]) / len(near[node])
                for node in row
                if near[node]
            }
            free = iter(sorted(means, key=lambda node: (means[node], self._place[node])))
            row[:] = [next(free) if node in means else node for node in row]
            self._number(row)

    def _swap(self) -> None:
        """Exchanges neighbours where that takes crossings away."""
        for _ in range(_SWAP_ROUNDS):
            changed = False
            for row in self.rows:
                for left in range(len(row) - 1):
                    one, other = row[left], row[left + 1]
                    if self._between(one, other) > self._between(other, one):
                        row[left], row[left + 1] = other, one
                        self._place[one], self._place[other] = left + 1, left
                        changed = True
            if not changed:
                return

    def _between(self, one: int, other: int) -> int:
        """Crossings of the links of two neighbours where `one` stands left of `other`."""
        found = 0
        for near in (self._above, self._below):
            places = sorted(self._place[node] for node in near[other])
            found += sum(bisect_right(places, self._place[node] - 1) for node in near[one])
        return found

    def _crossings(self) -> int:
        """Of all links: pairs whose upper ends and lower ends are in other orders."""
        found = 0
        for row in self.rows:
            seen: list[int] = []
            for node in row:
                lower = sorted(self._place[other] for other in self._below[node])
                found += sum(len(seen) - bisect_right(seen, place) for place in lower)
                for place in lower:
                    insort(seen, place)
        return found

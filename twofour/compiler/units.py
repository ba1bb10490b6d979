"""Which nodes must run in one step: those that hand each other what an engine does not pass on.

Sequences, optional values, texts and the small types have no place between steps. So the nodes on
both ends of such a value are one unit; and as a step runs at once, so is every node that needs one
of them and that another one needs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import onnx_ir as ir

from twofour.compiler.native import kind_of
from twofour.engine import DTYPES
from twofour.onnx_tools.edit import reads

Unit = tuple[ir.Node, ...]


def units(graph: ir.Graph, is_native: Callable[[ir.Node], bool]) -> list[Unit]:
    """All nodes of a graph in units, most of one node, each after those that it reads from.

    Args:
        graph: the graph.
        is_native: whether kernels run a node: they pass on all that they read.
    """
    nodes = list(graph)
    inside = set(nodes)
    producers = {node: [p for p in map(ir.Value.producer, reads(node)) if p in inside]
                 for node in nodes}  # fmt: skip
    joined = _Joined(nodes)
    for node in nodes:
        for value in reads(node):
            producer = value.producer()
            if producer in inside and not is_native(producer) and kind_of(value) not in DTYPES:
                joined.join(node, producer)
    if joined.changed:
        _join_cycles(nodes, producers, joined)
    return _sorted(nodes, producers, joined)


class _Joined:
    """Nodes, each with the one that stands for its unit."""

    def __init__(self, nodes: list[ir.Node]) -> None:
        self._head = {node: node for node in nodes}
        self.changed = False

    def head(self, node: ir.Node) -> ir.Node:
        while self._head[node] is not node:
            self._head[node] = node = self._head[self._head[node]]
        return node

    def join(self, a: ir.Node, b: ir.Node) -> None:
        self._head[self.head(a)] = self.head(b)
        self.changed = True


def _join_cycles(
    nodes: list[ir.Node], producers: dict[ir.Node, list[ir.Node]], joined: _Joined
) -> None:
    """Joins units that need each other."""
    needs: dict[ir.Node, set[ir.Node]] = {joined.head(node): set() for node in nodes}
    for node in nodes:
        needs[joined.head(node)].update(joined.head(p) for p in producers[node])
    behind = {head: _reached(head, needs) for head in needs}
    for head, others in behind.items():
        for other in others:
            if head in behind[other]:
                joined.join(head, other)


def _reached(start: ir.Node, needs: dict[ir.Node, set[ir.Node]]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = [start]
    while waiting:
        for node in needs[waiting.pop()] - found:
            found.add(node)
            waiting.append(node)
    return found - {start}


def _sorted(
    nodes: list[ir.Node], producers: dict[ir.Node, list[ir.Node]], joined: _Joined
) -> list[Unit]:
    """The units in an order in which they can run; that of the graph where it can."""
    members: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        members.setdefault(joined.head(node), []).append(node)
    place = {head: index for index, head in enumerate(members)}
    needs = {head: {joined.head(p) for node in part for p in producers[node]} - {head}
             for head, part in members.items()}  # fmt: skip
    readers: dict[ir.Node, list[ir.Node]] = {head: [] for head in members}
    for head, needed in needs.items():
        for other in needed:
            readers[other].append(head)
    heads = list(members)
    ready = [place[head] for head in heads if not needs[head]]
    found: list[Unit] = []
    while ready:
        head = heads[heapq.heappop(ready)]
        found.append(tuple(members[head]))
        for reader in readers[head]:
            needs[reader].discard(head)
            if not needs[reader]:
                heapq.heappush(ready, place[reader])
    return found

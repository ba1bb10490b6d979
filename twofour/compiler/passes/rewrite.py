"""How a rule changes a graph: the rule looks and answers, the driver here does the rest.

A rule is a function of one node. It answers None (not my pattern), `Refused` (my pattern, but a
condition does not hold, and which), or `Replacement` (what to put in its place). It never changes
the graph itself, so whether something changed is known by doing it, not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from twofour.compiler.passes import lineage
from twofour.core.errors import Error


@dataclass(frozen=True)
class Refusal:
    """Why a pass left a node as it was.

    Attributes:
        node: the source model's name of it.
        rule: the pass.
        reason: in words.
    """

    node: str
    rule: str
    reason: str


@dataclass(frozen=True)
class Refused:
    """A rule's answer: the pattern is there, a condition does not hold."""

    reason: str


@dataclass(frozen=True)
class Replacement:
    """A rule's answer: whoever reads `old` shall read `new`.

    Attributes:
        old: a result in the graph. It lends `new` its name and shape.
        new: an existing value, a new constant, or a result of one of `nodes`.
        nodes: new nodes, in order; they are put where `old` is computed. New constants among their
            inputs become initializers. Values without a name are named after `old`.
        note: what was left undone all the same, and why; kept as a refusal.
        more: further pairs of old and new, of the same `nodes`; `old` is computed first of all.
    """

    old: ir.Value
    new: ir.Value
    nodes: tuple[ir.Node, ...] = ()
    note: str = ""
    more: tuple[tuple[ir.Value, ir.Value], ...] = ()


Rule = Callable[[ir.Node], Replacement | Refused | None]


def apply(name: str, rule: Rule, graph: ir.Graph) -> list[Refusal]:
    """Applies the rule to every node until it finds nothing more to replace.

    Args:
        name: of the rule, for messages.
        rule: looks at one node.
        graph: changed in place.

    Returns:
        What was refused in the last sweep, and the notes.

    Raises:
        Error: the rule does not come to rest.
    """
    bound = 64 + 8 * len(graph)
    count = 0
    notes: list[Refusal] = []
    while True:
        refused: list[Refusal] = []
        before = count
        for node in list(graph):
            if node.graph is not graph:
                continue  # removed by an earlier replacement of this sweep
            answer = rule(node)
            if isinstance(answer, Refused):
                refused.append(Refusal(node.name or "", name, answer.reason))
            elif answer is not None:
                if answer.note:
                    notes.append(Refusal(node.name or "", name, answer.note))
                replace(graph, answer)
                count += 1
            if count > bound:
                raise Error(
                    f"pass {name} does not come to rest: {count} rewrites, the last at"
                    f" {node.op_type} {node.name!r}",
                    fix="this is a defect of the compiler; report it with the model",
                )
        if count == before:
            return notes + refused


def replace(graph: ir.Graph, replacement: Replacement) -> None:
    """Puts the new nodes in place and removes what nobody reads any more."""
    nodes = replacement.nodes
    place = replacement.old.producer()
    pairs = []
    for old, new in ((replacement.old, replacement.new), *replacement.more):
        if old.producer() is None or old is new:
            raise ValueError(f"{old.name!r} cannot be replaced: it is not another node's result")
        if old.is_graph_output() and new.producer() not in nodes and not _may_be_output(new):
            alias = ir.node("Identity", [new], name=_producer(old).name)
            nodes, new = (*nodes, alias), alias.outputs[0]
        pairs.append((old, new))
    stem = replacement.old.name or ""
    for old, new in pairs:
        new.shape = new.shape if new.shape is not None else old.shape
        new.type = new.type if new.type is not None else old.type
        if new.producer() in nodes or old.is_graph_output():
            old.name, new.name = None, old.name
    _name(graph, nodes, stem)
    given = [value for node in nodes for value in node.inputs]
    _register_constants(graph, [*given, *(new for _, new in pairs)])
    assert place is not None
    graph.insert_before(place, nodes)
    for old, new in pairs:
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    removed: list[ir.Node] = []
    for producer in dict.fromkeys(_producer(old) for old, _ in pairs):
        if producer.graph is graph:
            _remove_unread(graph, producer, removed)
    lineage.inherit(pairs, nodes, removed)


def _producer(value: ir.Value) -> ir.Node:
    """The node that computes the value."""
    producer = value.producer()
    assert producer is not None
    return producer


def _may_be_output(value: ir.Value) -> bool:
    """Whether a value can take over the name of a graph output."""
    return value.producer() is not None and not value.is_graph_output()


def _name(graph: ir.Graph, nodes: tuple[ir.Node, ...], stem: str) -> None:
    """Names the unnamed values after `stem`, and the unnamed nodes after their first output."""
    unnamed = [value for node in nodes for value in node.outputs if value.name is None]
    taken = {value.name for value in _values(graph)} if unnamed else set()
    for value in unnamed:
        value.name = _unique(f"{stem}_{_producer_type(value)}", taken)
    for node in nodes:
        node.name = node.name or f"{node.op_type}:{node.outputs[0].name}"


def _producer_type(value: ir.Value) -> str:
    """The operator type of the node that computes the value."""
    producer = value.producer()
    return producer.op_type if producer is not None else ""


def _register_constants(graph: ir.Graph, values: list[ir.Value | None]) -> None:
    """Makes the constants that are not yet in the graph initializers with unique names."""
    new = [
        value
        for value in dict.fromkeys(values)
        if value is not None and value.const_value is not None and not value.is_initializer()
    ]
    taken = {value.name for value in _values(graph)} if new else set()
    for value in new:
        value.name = _unique(value.name or "constant", taken)
        graph.register_initializer(value)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of the graph, inner graphs included: they share the outer names."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def _unique(name: str, taken: set[str | None]) -> str:
    """The name, or with a number appended; taken afterwards."""
    number, result = 1, name
    while result in taken:
        number, result = number + 1, f"{name}_{number}"
    taken.add(result)
    return result


def _remove_unread(graph: ir.Graph, node: ir.Node, removed: list[ir.Node]) -> None:
    """Removes the node, its constants and what fed it, as far as nobody else reads them.

    The removed nodes are added to a list.
    """
    if any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    sources = [value for value in dict.fromkeys(node.inputs) if value is not None]
    graph.remove(node, safe=True)
    removed.append(node)
    for value in sources:
        producer = value.producer()
        if producer is not None and producer.graph is graph:
            _remove_unread(graph, producer, removed)
        elif value.is_initializer() and not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name or ""]

"""What the values and nodes of a graph stand for in the imported one, kept while passes rewrite it.

A value stands for the value of the imported graph that it is, or that it is rounded from: Q(v) and
DQ(Q(v)) stand for v, so does v held in bfloat16. A node computes one or several of the imported
graph's nodes, each known by the name of its first result.

    mark(graph)                       every value stands for itself, every node computes itself
    inherit(replacement, removed)     what was removed lives on in what took its place

A node that goes with its type lives on in the new nodes of that type (a MaxPool that changes places
with a quantizer stays that MaxPool), any other in the node that computes the new result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

_STANDS_FOR, _COMPUTES = "twofour.stands_for", "twofour.computes"
_ROUNDED = frozenset({ir.DataType.FLOAT, ir.DataType.BFLOAT16})


def mark(graph: ir.Graph) -> None:
    """Notes every value and node of an imported graph."""
    for value in graph.inputs:
        value.meta[_STANDS_FOR] = value.name or ""
    for node in graph:
        node.meta[_COMPUTES] = (node.outputs[0].name or "",)
        for value in node.outputs:
            value.meta[_STANDS_FOR] = value.name or ""
        _forward(node)


def stands_for(value: ir.Value) -> str:
    """The imported graph's value that this one is, or is rounded from; "" for none."""
    name: str = value.meta.get(_STANDS_FOR, "")
    return name


def computes(node: ir.Node) -> tuple[str, ...]:
    """The imported graph's nodes that this one computes, by the names of their first results."""
    names: tuple[str, ...] = node.meta.get(_COMPUTES, ())
    return names


def inherit(
    pairs: Iterable[tuple[ir.Value, ir.Value]],
    nodes: Sequence[ir.Node],
    removed: Sequence[ir.Node],
) -> None:
    """Hands on what a replacement removed.

    Args:
        pairs: each old value with the new one.
        nodes: the new nodes, in order.
        removed: nodes that are gone.
    """
    heir: ir.Node | None = None
    for old, new in pairs:
        heir = heir or new.producer()
        if new.producer() in nodes and stands_for(old):
            new.meta[_STANDS_FOR] = stands_for(old)
    for node in reversed(nodes):
        _backward(node)
    for node in nodes:
        _forward(node)
    heir = _behind_rounding(heir, nodes)
    for gone in removed:
        same = [node for node in nodes if node.op_identifier() == gone.op_identifier()]
        for node in same or ([heir] if heir is not None else []):
            node.meta[_COMPUTES] = tuple(dict.fromkeys((*computes(node), *computes(gone))))


def _behind_rounding(heir: ir.Node | None, nodes: Sequence[ir.Node]) -> ir.Node | None:
    """The new node whose result is only rounded by this one, and so on."""
    while heir is not None and _rounds(heir) and heir.inputs[0] is not None:
        before = heir.inputs[0].producer()
        if before not in nodes:
            break
        heir = before
    return heir


def _forward(node: ir.Node) -> None:
    """A rounded value stands for what its origin stands for."""
    if _rounds(node) and node.inputs[0] is not None:
        origin = stands_for(node.inputs[0])
        if origin:
            node.outputs[0].meta[_STANDS_FOR] = origin


def _backward(node: ir.Node) -> None:
    """A new value that is only rounded to give a known one stands for that one."""
    source = node.inputs[0] if _rounds(node) else None
    if source is not None and not stands_for(source) and source.const_value is None:
        source.meta[_STANDS_FOR] = stands_for(node.outputs[0])


def _rounds(node: ir.Node) -> bool:
    """Whether the result is the operand in fewer or more bits."""
    if node.domain != "":
        return False
    if node.op_type == "Cast" and node.inputs[0] is not None:
        return {node.inputs[0].dtype, node.outputs[0].dtype} == _ROUNDED
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")

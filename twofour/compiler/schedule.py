"""The order of execution, and which stretches run natively.

Nodes are taken in an order that keeps native operators together: all native ones that are ready,
then all others that are ready, and so on. A native stretch without a convolution or matrix product
is not worth the change of layout and joins the fallback around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from twofour.compiler import (
    native_fused,
    native_nd,
    native_nd_moves,
    native_rows,
    native_standard,
)
from twofour.compiler.native import ConvOp, NativeOp, NotNative
from twofour.compiler.ops import is_fused, parse_op

Reader = Callable[[ir.Node], NativeOp | str]
_FUSED = {**native_fused.READERS, **native_rows.FUSED}
# What each has a kernel of its own for, and what is left to the small operators.
_STANDARD = ({**native_standard.READERS, **native_rows.STANDARD},
             {**native_nd.READERS, **native_nd_moves.READERS})  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """Consecutive nodes of one kind.

    Attributes:
        native: whether kernels run it.
        nodes: in order.
    """

    native: bool
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Schedule:
    """The stretches in order; each native node read, each other one with its reason."""

    stretches: tuple[Stretch, ...]
    ops: Mapping[ir.Node, NativeOp]
    reasons: Mapping[ir.Node, str]


def schedule(graph: ir.Graph, reader: Reader | None = None) -> Schedule:
    """Orders the nodes of a graph after the passes.

    Args:
        graph: the graph.
        reader: reads a node as a native operator, or says why it is none; by default `read`.
    """
    ops: dict[ir.Node, NativeOp] = {}
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        found = (reader or read)(node)
        if isinstance(found, str):
            reasons[node] = found
        else:
            ops[node] = found
    while True:
        stretches = _order(graph, lambda node: node in ops)
        idle = [s for s in stretches if s.native and all(_is_idle(ops[n], n) for n in s.nodes)]
        if not idle:
            return Schedule(tuple(stretches), ops, reasons)
        for node in (n for s in idle for n in s.nodes):
            del ops[node]
            reasons[node] = "no convolution or matrix product beside it runs natively"


def _is_idle(op: NativeOp, node: ir.Node) -> bool:
    """Whether an operator is no reason to run natively: plain arrays can hold its results."""
    return op.kind != "conv" and all(v.dtype != ir.DataType.BFLOAT16 for v in node.outputs)


def weight_bytes(order: Schedule) -> int:
    """Bytes of all weights that native convolutions and matrix products read, not packed."""
    return sum(op.w.nbytes for op in order.ops.values() if isinstance(op, ConvOp))


def read(node: ir.Node) -> NativeOp | str:
    """The node as a native operator, or why it is none."""
    return read_twins((node,), lambda ops: ops[0])


def read_twins(
    nodes: Sequence[ir.Node], join: Callable[[Sequence[NativeOp]], NativeOp]
) -> NativeOp | str:
    """A node as a native operator, or why it is none.

    Args:
        nodes: the node in the graph for each of several shapes.
        join: the operator for all shapes, from that for each; raises NotNative where there is none.
    """
    node = nodes[0]
    reason = f"no native kernel for {node.domain + '.' if node.domain else ''}{node.op_type}"
    for reader in _readers(node):
        try:
            return join([reader(twin) for twin in nodes])
        except NotNative as e:
            reason = str(e)
    return reason


def _readers(node: ir.Node) -> list[Callable[[ir.Node], NativeOp]]:
    """What may read the node, the best kernels first."""
    if is_fused(node):
        return [lambda twin: _FUSED[parse_op(twin).base](parse_op(twin))]
    found = [table.get(node.op_type) for table in _STANDARD] if node.domain == "" else []
    return [reader for reader in found if reader is not None]


def _order(graph: ir.Graph, native: Callable[[ir.Node], bool]) -> list[Stretch]:
    """Ready nodes of one kind, as many as there are, then of the other kind."""
    waiting = list(graph)
    done: set[ir.Node] = set()
    stretches: list[Stretch] = []
    kind = native(waiting[0]) if waiting else True
    while waiting:
        taken: list[ir.Node] = []
        for node in waiting:  # in topological order, so one sweep takes whole chains
            ready = all(p is None or p in done for p in _producers(node))
            if native(node) is kind and ready:
                taken.append(node)
                done.add(node)
        if taken:
            stretches.append(Stretch(kind, tuple(taken)))
            waiting = [n for n in waiting if n not in done]
        kind = not kind
    return stretches


def _producers(node: ir.Node) -> list[ir.Node | None]:
    """The nodes whose results it reads, in subgraphs too."""
    return [v.producer() for v in reads(node)]


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads from its graph, in its subgraphs too, however deep."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            found += [v for n in inner for v in reads(n) if v.graph is not inner]
    return found

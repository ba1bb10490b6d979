"""The order of execution, and which stretches run natively.

Nodes are taken in an order that keeps native operators together: all native ones that are ready,
then all others that are ready, and so on, or the other way round if those are fewer stretches. What
must run in one step stays together (units.py). A native stretch without a convolution or matrix
product is not worth the change of layout and joins the fallback around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import onnx_ir as ir

from twofour.compiler import (
    native_fused,
    native_nd,
    native_nd_moves,
    native_nms,
    native_rows,
    native_standard,
)
from twofour.compiler.native import ConvOp, NativeOp, NotNative
from twofour.compiler.native_plugin import read_plugin, runs_in_python
from twofour.compiler.native_resize import read_repeat
from twofour.compiler.ops import FusedOp, is_fused, parse_op
from twofour.compiler.units import Unit, units
from twofour.onnx_tools.edit import reads
from twofour.onnx_tools.plugins import plugin_of

Reader = Callable[[ir.Node], NativeOp | str]
_FUSED: Mapping[str, Callable[[FusedOp], NativeOp]] = {
    **native_fused.READERS,
    **native_rows.FUSED,
    "BRepeat": read_repeat,
}
# What each has a kernel of its own for, and what is left to the small operators.
_STANDARD = ({**native_standard.READERS, **native_rows.STANDARD},
             {**native_nd.READERS, **native_nd_moves.READERS, **native_nms.READERS})  # fmt: skip


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
    found_units = units(graph, lambda node: node in ops)
    for node in (n for unit in found_units if len(unit) > 1 for n in unit):
        if ops.pop(node, None) is not None:
            reasons[node] = "it lies between nodes whose values no engine passes on"
    while True:
        orders = [_order(found_units, lambda node: node in ops, kind) for kind in (True, False)]
        stretches = min(orders, key=len)
        idle = [s for s in stretches if s.native and all(_is_idle(ops[n], n) for n in s.nodes)]
        if not idle:
            return Schedule(tuple(stretches), ops, reasons)
        for node in (n for s in idle for n in s.nodes):
            del ops[node]
            reasons[node] = "no convolution or matrix product beside it runs natively"


def _is_idle(op: NativeOp, node: ir.Node) -> bool:
    """Whether an operator is no reason to run natively: plain arrays can hold its results."""
    product = op.kind in ("conv", "plugin")
    return not product and all(v.dtype != ir.DataType.BFLOAT16 for v in node.outputs)


def apart(stretch: Stretch) -> list[Stretch]:
    """A stretch without kernels, cut where a node runs in Python."""
    if stretch.native or not any(map(runs_in_python, stretch.nodes)):
        return [stretch]
    runs = groupby(stretch.nodes, runs_in_python)
    parts = [(python, tuple(nodes)) for python, nodes in runs]
    single = [[(n,) for n in nodes] if python else [nodes] for python, nodes in parts]
    return [Stretch(False, nodes) for part in single for nodes in part]


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
    if plugin_of(node) is not None:
        return [read_plugin]
    found = [table.get(node.op_type) for table in _STANDARD] if node.domain == "" else []
    return [reader for reader in found if reader is not None]


def _order(found: Sequence[Unit], native: Callable[[ir.Node], bool], kind: bool) -> list[Stretch]:
    """Ready units of one kind, as many as there are, then of the other kind.

    Args:
        found: the units, each after those that it reads from.
        native: whether kernels run a node.
        kind: what to begin with.
    """
    waiting = list(found)
    done: set[ir.Node] = set()
    stretches: list[Stretch] = []
    while waiting:
        taken: list[ir.Node] = []
        left: list[Unit] = []
        for unit in waiting:  # in topological order, so one sweep takes whole chains
            if native(unit[0]) is kind and _is_ready(unit, done):
                taken += unit
                done.update(unit)
            else:
                left.append(unit)
        if taken:
            stretches.append(Stretch(kind, tuple(taken)))
        waiting, kind = left, not kind
    return stretches


def _is_ready(unit: Unit, done: set[ir.Node]) -> bool:
    """Whether all that the unit reads from other ones is computed."""
    sources = [value.producer() for node in unit for value in reads(node)]
    return all(p is None or p in done or p in unit for p in sources)

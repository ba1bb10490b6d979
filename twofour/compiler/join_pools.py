"""Maxima of maxima as one operator: y1 = MaxPool(x), y2 = MaxPool(y1), ...  =>  y1, y2, ... of x.

A pyramid pooling (SPPF) pools three times in a row, and joins all results. One kernel goes through
a block of channels from the first maximum to the last (kernels/cpu/pool_chain.py).

Legal where

1. all have the same window, with steps of one pixel and padding that keeps the size;
2. each reads the result of the one before; whoever else reads that finds it written as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from twofour.compiler.native import NativeOp, PoolOp
from twofour.compiler.schedule import Schedule, Stretch
from twofour.kernels.cpu.pool_chain import can_chain


def join_pools(order: Schedule) -> Schedule:
    """The schedule with each chain of maxima as one operator."""
    ops: dict[ir.Node, NativeOp] = dict(order.ops)
    stretches = tuple(
        Stretch(True, _joined(stretch.nodes, ops)) if stretch.native else stretch
        for stretch in order.stretches
    )
    return order if ops.keys() == order.ops.keys() else replace(order, stretches=stretches, ops=ops)


def _joined(nodes: tuple[ir.Node, ...], ops: dict[ir.Node, NativeOp]) -> tuple[ir.Node, ...]:
    """The nodes that are left; `ops` changes likewise."""
    ends: dict[str, ir.Node] = {}
    left: list[ir.Node] = []
    for node in nodes:
        op = ops[node]
        first = _first(op, ends, ops)
        if first is None:
            left.append(node)
            ends |= {op.y: node} if isinstance(op, PoolOp) else {}
            continue
        before = ops[first]
        name = before.op_type.removesuffix("Chain")
        ops[first] = replace(before, op_type=f"{name}Chain", also=(*before.also, op.y))
        ends[op.y] = first
        del ops[node]
    return tuple(left)


def _first(
    op: NativeOp, ends: Mapping[str, ir.Node], ops: Mapping[ir.Node, NativeOp]
) -> ir.Node | None:
    """The node whose operator can take in a further maximum; None where there is none."""
    if not isinstance(op, PoolOp) or op.op != "max" or not can_chain(op.window):
        return None
    node = ends.get(op.x)
    before = None if node is None else ops[node]
    if not isinstance(before, PoolOp) or (before.op, before.window) != (op.op, op.window):
        return None
    return node if before.writes[-1] == op.x else None

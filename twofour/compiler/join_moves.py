"""Moves that follow each other as one: y = move(x), z = move(y)   =>   z = move(x).

A move copies elements and computes nothing: Reshape, Transpose, Slice, Gather of one index, Tile
and so on. Exporters write a channel shuffle, a patch embedding or a pixel shuffle as three to five
of them; a walk with enough axes does the same in one pass over memory.

Legal where

1. y is written by one walk of copies, and z reads it by walks of copies;
2. all dimensions are fixed;
3. z is no Concat of channels: what computes y may write it in place (parts.py);
4. along each axis of z's walk, cut in pieces where need be, one axis of x moves at even steps.

A move that nobody reads any more is dropped.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import NativeOp
from twofour.compiler.native_nd import NdOp
from twofour.compiler.parts import is_join
from twofour.compiler.schedule import Schedule
from twofour.compiler.walks import refined, small, walked, without_unread


def join_moves(order: Schedule, graph: ir.Graph) -> Schedule:
    """The schedule with each chain of moves as one, where it can be.

    Args:
        order: of the graph.
        graph: static, after the passes.
    """
    ops: dict[ir.Node, NativeOp] = dict(order.ops)
    written: dict[str, NdOp] = {}
    for stretch in order.stretches:
        for node in stretch.nodes if stretch.native else ():
            op = ops[node]
            if isinstance(op, NdOp):
                op = ops[node] = _behind(op, written)
                written |= dict.fromkeys(op.writes, op)
    if all(ops[node] is order.ops[node] for node in ops):
        return order
    return without_unread(replace(order, ops=ops), graph)


def _behind(op: NdOp, written: dict[str, NdOp]) -> NdOp:
    """The operator reading what the moves before it read."""
    if is_join(op) or not all(part.op == "copy" for part in op.parts):
        return op
    for name in op.reads:
        before = written.get(name)
        if before is not None and (joined := _joined(before, name, op)) is not None:
            op = joined
    return op


def _joined(before: NdOp, name: str, op: NdOp) -> NdOp | None:
    """`op` reading what `before` reads in the place of the value `name`; None where it cannot."""
    writing = [part for part in before.parts if before.values[part.y.value].name == name]
    if len(writing) != 1 or writing[0].op != "copy":
        return None
    (first,) = writing
    x, y = before.values[first.inputs[0].value], before.values[first.y.value]
    if not x.name or not small(first, x, y) or not all(small(part, y) for part in op.parts):
        return None
    places = np.empty(math.prod(y.shape), np.int64)
    places[walked(first.y, first, y)] = walked(first.inputs[0], first, x)
    values = [x if value.name == name else value for value in op.values]
    parts = []
    for part in op.parts:
        if op.values[part.inputs[0].value].name == name:
            found = refined(places[walked(part.inputs[0], part, y)], x.shape)
            if found is None:
                return None
            look = replace(part.inputs[0], axes=found.axes, start=found.start)
            part = replace(found.part(part), inputs=(look,))
        parts.append(part)
    sources = [x.name if read == name else read for read in op.reads]
    return replace(
        op,
        op_type=before.op_type + op.op_type,
        x=sources[0],
        more=tuple(sources[1:]),
        values=tuple(values),
        parts=tuple(parts),
    )

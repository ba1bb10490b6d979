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
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.compiler.native import NativeOp
from twofour.compiler.native_nd import BROADCAST, Look, NdOp, NdValue, Part
from twofour.compiler.parts import is_join
from twofour.compiler.schedule import Schedule, Stretch
from twofour.core.sizes import most
from twofour.onnx_tools.edit import reads

Index = NDArray[np.int64]
Step = tuple[int, int]
_MOST_ELEMENTS = 1 << 22
"""Of a walk: what is looked at one by one. Larger tensors keep their moves."""


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
    return _without_unread(replace(order, ops=ops), graph)


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
    if not x.name or not _small(first, x, y) or not all(_small(part, y) for part in op.parts):
        return None
    places = np.empty(math.prod(y.shape), np.int64)
    places[_walked(first.y, first, y)] = _walked(first.inputs[0], first, x)
    values = [x if value.name == name else value for value in op.values]
    parts = []
    for part in op.parts:
        if op.values[part.inputs[0].value].name == name:
            moved = _through(part, places[_walked(part.inputs[0], part, y)], x.shape)
            if moved is None:
                return None
            part = moved
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


def _small(part: Part, *values: NdValue) -> bool:
    """Whether all its numbers are known, and few enough to look at."""
    looks = (part.y, *part.inputs)
    steps = [n for look in looks for n in (*look.start, *(step for _, step in look.axes))]
    numbers = [*part.dims, *steps, *(dim for value in values for dim in value.dims)]
    sizes = [math.prod(part.dims), *(math.prod(value.shape) for value in values)]
    return all(isinstance(n, int) for n in numbers) and max(map(most, sizes)) <= _MOST_ELEMENTS


def _walked(look: Look, part: Part, value: NdValue) -> Index:
    """For each turn of a walk the element that it touches, counted in the value's own order."""
    strides = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
    start = sum(most(n) * stride for n, stride in zip(look.start, strides, strict=True))
    found = np.full((1,) * len(part.dims), start, np.int64)
    for i, (axis, step) in enumerate(look.axes):
        if step:
            found = found + _along(
                np.arange(most(part.dims[i])) * most(step) * strides[axis], i, len(part.dims)
            )
    return np.broadcast_to(found, tuple(most(dim) for dim in part.dims))


def _along(steps: Index, axis: int, rank: int) -> Index:
    return steps.reshape([-1 if i == axis else 1 for i in range(rank)])


def _through(part: Part, places: Index, shape: Sequence[int]) -> Part | None:
    """The part, reading elements `places` of a value of that shape; None where they are uneven."""
    if not places.size or not shape:
        return None
    rank, first = places.ndim, places[(0,) * places.ndim]
    lines = [places[tuple(slice(None) if i == a else 0 for i in range(rank))] for a in range(rank)]
    apart = sum(_along(line - first, a, rank) for a, line in enumerate(lines))
    if not (places == first + apart).all():
        return None
    dims: list[int] = []
    source: list[Step] = []
    to: list[Step] = []
    for line, (axis, step) in zip(lines, part.y.axes, strict=True):
        loops = _loops(np.stack(np.unravel_index(line, shape), -1))
        if loops is None or any(np.count_nonzero(along) > 1 for _, _, along in loops):
            return None
        dims += [turns for turns, _, _ in loops]
        source += [_step(along) for _, _, along in loops]
        to += [(axis, most(step) * inner) for _, inner, _ in loops]
    start = tuple(int(n) for n in np.unravel_index(first, shape))
    if not _inside(start, dims, source, shape):
        return None
    look = replace(part.inputs[0], axes=tuple(source), start=start)
    return replace(part, dims=tuple(dims), y=replace(part.y, axes=tuple(to)), inputs=(look,))


def _step(along: Index) -> Step:
    """A step along one axis, or none."""
    moving = np.flatnonzero(along)
    return (int(moving[0]), int(along[moving[0]])) if moving.size else BROADCAST


def _loops(moved: Index) -> list[tuple[int, int, Index]] | None:
    """A walk over places [n, rank] as loops of even steps, the outermost first.

    Returns:
        For each loop its turns, the turns of the walk that one of them is, and its step [rank];
        None where no cut makes the steps even.
    """
    count = len(moved)
    if count == 1:
        return [(1, 1, np.zeros_like(moved[0]))]
    away = moved - moved[0]
    run = next((n for n in range(count, 1, -1) if count % n == 0 and _even(away, n)), 0)
    if not run:
        return None
    inner = (run, 1, away[1])
    if run == count:
        return [inner]
    outer = _loops(moved[::run])
    return outer and [*((turns, each * run, step) for turns, each, step in outer), inner]


def _even(away: Index, run: int) -> bool:
    """Whether all runs of so many turns go on at the same even steps."""
    inner = np.arange(run)[:, None] * away[1]
    return bool((away.reshape(-1, run, away.shape[1]) == away[::run, None] + inner).all())


def _inside(
    start: Sequence[int], dims: Sequence[int], steps: Sequence[Step], shape: Sequence[int]
) -> bool:
    """Whether no index of the walk leaves its axis, so that none was carried over to the next."""
    low, high = list(start), list(start)
    for count, (axis, step) in zip(dims, steps, strict=True):
        if step:
            low[axis] += min(0, (count - 1) * step)
            high[axis] += max(0, (count - 1) * step)
    return all(0 <= a and b < n for a, b, n in zip(low, high, shape, strict=True))


def _without_unread(order: Schedule, graph: ir.Graph) -> Schedule:
    """The schedule without moves whose results nobody reads."""
    wanted = {value.name for value in graph.outputs}
    stretches = []
    for stretch in reversed(order.stretches):
        kept = []
        for node in reversed(stretch.nodes):
            op = order.ops.get(node) if stretch.native else None
            if isinstance(op, NdOp) and wanted.isdisjoint(op.writes):
                continue
            wanted.update([v.name for v in reads(node)] if op is None else op.reads)
            kept.append(node)
        if kept:
            stretches.append(Stretch(stretch.native, tuple(reversed(kept))))
    return replace(order, stretches=tuple(reversed(stretches)))

"""Where walks over tensors come by (native_nd.py), element by element, and how they can be cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.compiler.native import MapOp
from twofour.compiler.native_nd import BROADCAST, Look, NdOp, NdValue, Part
from twofour.compiler.schedule import Schedule, Stretch
from twofour.core.sizes import most
from twofour.onnx_tools.edit import reads

Index = NDArray[np.int64]
Step = tuple[int, int]
_MOST_ELEMENTS = 1 << 22
"""Of a walk: what is looked at one by one. Larger tensors keep their moves."""


def small(part: Part, *values: NdValue) -> bool:
    """Whether all its numbers are known, and few enough to look at."""
    looks = (part.y, *part.inputs)
    steps = [n for look in looks for n in (*look.start, *(step for _, step in look.axes))]
    numbers = [*part.dims, *steps, *(dim for value in values for dim in value.dims)]
    sizes = [math.prod(part.dims), *(math.prod(value.shape) for value in values)]
    return all(isinstance(n, int) for n in numbers) and max(map(most, sizes)) <= _MOST_ELEMENTS


def walked(look: Look, part: Part, value: NdValue) -> Index:
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


@dataclass(frozen=True)
class Refined:
    """A walk whose axes are cut such that one more operand moves at even steps.

    Attributes:
        loops: for each axis of the walk, the loops it becomes: turns, and turns of the walk that
            one of them is.
        axes: of the look on the operand.
        start: of it.
    """

    loops: tuple[tuple[tuple[int, int], ...], ...]
    axes: tuple[Step, ...]
    start: tuple[int, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """Turns along each axis."""
        return tuple(turns for loops in self.loops for turns, _ in loops)

    def look(self, look: Look) -> Look:
        """A look of the walk on another operand, along the new axes."""
        axes = tuple(
            (axis, most(step) * inner) if step else BROADCAST
            for (axis, step), loops in zip(look.axes, self.loops, strict=True)
            for _, inner in loops
        )
        return replace(look, axes=axes)

    def part(self, part: Part) -> Part:
        """The walk along the new axes."""
        inputs = tuple(map(self.look, part.inputs))
        return replace(part, dims=self.dims, y=self.look(part.y), inputs=inputs)


def refined(places: Index, shape: Sequence[int]) -> Refined | None:
    """How a walk that reads elements `places` of a value is cut; None where they are uneven.

    Args:
        places: for each turn of the walk.
        shape: of the value.
    """
    if not places.size or not shape:
        return None
    rank, first = places.ndim, places[(0,) * places.ndim]
    lines = [places[tuple(slice(None) if i == a else 0 for i in range(rank))] for a in range(rank)]
    apart = sum(_along(line - first, a, rank) for a, line in enumerate(lines))
    if not (places == first + apart).all():
        return None
    cut: list[tuple[tuple[int, int], ...]] = []
    axes: list[Step] = []
    for line in lines:
        loops = _loops(np.stack(np.unravel_index(line, shape), -1))
        if loops is None or any(np.count_nonzero(along) > 1 for _, _, along in loops):
            return None
        cut.append(tuple((turns, inner) for turns, inner, _ in loops))
        axes += [_step(along) for _, _, along in loops]
    start = tuple(int(n) for n in np.unravel_index(first, shape))
    found = Refined(tuple(cut), tuple(axes), start)
    return found if _inside(start, found.dims, axes, shape) else None


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


def without_unread(order: Schedule, graph: ir.Graph) -> Schedule:
    """The schedule without walks whose results nobody reads."""
    wanted = {value.name for value in graph.outputs}
    stretches = []
    for stretch in reversed(order.stretches):
        kept = []
        for node in reversed(stretch.nodes):
            op = order.ops.get(node) if stretch.native else None
            if isinstance(op, (NdOp, MapOp)) and wanted.isdisjoint(op.writes):
                continue
            wanted.update([v.name for v in reads(node)] if op is None else op.reads)
            kept.append(node)
        if kept:
            stretches.append(Stretch(stretch.native, tuple(reversed(kept))))
    return replace(order, stretches=tuple(reversed(stretches)))

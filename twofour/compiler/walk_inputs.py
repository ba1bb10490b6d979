"""A walk with one of its inputs computed by itself: what join_walks.py is made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from twofour.compiler.native_nd import BROADCAST, Look, NdOp, NdValue, Part
from twofour.compiler.walks import Index, refined, small, walked
from twofour.core.sizes import most
from twofour.kernels.cpu.nd_scalar import ELEMENTWISE, Expression

ROWS = ("softmax", "expect")
"""Walks over whole rows, which may read through copies."""
TAKING = frozenset((*ROWS, "copy", "chain", *ELEMENTWISE))
"""Walks that may compute what they read."""
MOST_STEPS = 24
"""Of a walk."""
_MOST_RUNS = 8


def without(
    part: Part, name: str, values: list[NdValue], before: NdOp, writing: Sequence[Part]
) -> list[Part] | None:
    """A walk in pieces that compute an input themselves; None where that cannot be.

    Args:
        part: the walk.
        name: of the input.
        values: operands of the walk; those that are new to it are added.
        before: writes the input.
        writing: the walks of it that do.
    """
    which = next((i for i, k in enumerate(part.inputs) if values[k.value].name == name), None)
    if which is None:
        return [part]
    allowed = ("copy",) if part.op in ROWS else TAKING.difference(ROWS)
    if part.op not in TAKING or any(each.op not in allowed for each in writing):
        return None
    value = values[part.inputs[which].value]
    sources = [before.values[look.value] for each in writing for look in each.inputs]
    if not small(part, value) or not all(small(each, *sources, value) for each in writing):
        return None
    owners = np.full(math.prod(value.shape), -1, np.int64)
    for index, each in enumerate(writing):
        owners[walked(each.y, each, value)] = index
    pieces = _cut(part, owners[walked(part.inputs[which], part, value)])
    found: list[Part] = []
    for owner, piece in pieces or ():
        one = _computing(piece, which, values, before, writing[owner])
        again = None if one is None else without(one, name, values, before, writing)
        if again is None:
            return None
        found += again
    return found or None


def _cut(part: Part, owners: Index) -> list[tuple[int, Part]] | None:
    """The walk in runs along one axis, each of elements that one walk writes; None if uneven."""
    first = owners[(0,) * owners.ndim]
    if (owners == first).all():
        return None if first < 0 else [(int(first), part)]
    for axis in range(owners.ndim):
        line = owners[tuple(slice(None) if i == axis else slice(0, 1) for i in range(owners.ndim))]
        if not (owners == line).all():
            continue
        flat = line.reshape(-1)
        edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
        if (
            (flat < 0).any()
            or len(edges) > _MOST_RUNS + 1
            or (part.op in ROWS and axis == owners.ndim - 1)
        ):
            return None
        runs = pairwise(edges)
        return [(int(flat[a]), _range(part, axis, a, b)) for a, b in runs]
    return None


def _range(part: Part, axis: int, begin: int, end: int) -> Part:
    """The turns begin..end along an axis of a walk."""

    def moved(look: Look) -> Look:
        along, step = look.axes[axis]
        start = list(look.start)
        if step:
            start[along] = most(start[along]) + begin * most(step)
        return replace(look, start=tuple(start))

    dims = (*part.dims[:axis], end - begin, *part.dims[axis + 1 :])
    return replace(part, dims=dims, y=moved(part.y), inputs=tuple(map(moved, part.inputs)))


def _computing(
    part: Part, which: int, values: list[NdValue], before: NdOp, producer: Part
) -> Part | None:
    """The walk with one input computed from what `producer` computes it from."""
    held = values[part.inputs[which].value]
    looks: list[Look] = []
    for look in producer.inputs:
        source = before.values[look.value]
        index = _index(values, source)
        if not source.shape:
            looks.append(Look(index, (BROADCAST,) * len(part.dims), ()))
            continue
        places = np.full(math.prod(held.shape), -1, np.int64)
        places[walked(producer.y, producer, held)] = walked(look, producer, source)
        found = refined(places[walked(part.inputs[which], part, held)], source.shape)
        if found is None or (part.op in ROWS and found.dims[-1] != part.dims[-1]):
            return None
        looks = [found.look(each) for each in looks]
        part = found.part(part)
        looks.append(Look(index, found.axes, found.start))
    steps = substituted(part, which, producer, held.kind)
    if len(steps) > MOST_STEPS:
        return None
    inputs = (*part.inputs[:which], *looks, *part.inputs[which + 1 :])
    if part.op in ROWS or (part.op == "copy" and producer.op == "copy"):
        return replace(part, inputs=inputs)
    return replace(part, op="chain", inputs=inputs, steps=steps, scalars=())


def _index(values: list[NdValue], value: NdValue) -> int:
    """Of an operand; added where it is new."""
    for index, each in enumerate(values):
        if each is value or (value.name and each.name == value.name):
            return index
    values.append(value)
    return len(values) - 1


class Computed(Protocol):
    """What of a walk says what it computes, whatever it reads and wherever."""

    @property
    def op(self) -> str:
        """Of `Part`."""

    @property
    def inputs(self) -> Sized:
        """Of `Part`."""

    @property
    def scalars(self) -> tuple[float, ...]:
        """Of `Part`."""

    @property
    def steps(self) -> tuple[Expression, ...]:
        """Of `Part`."""


def computed(part: Computed, kind: str) -> tuple[Expression, ...]:
    """What a walk computes of its inputs; nothing for a copy."""
    if part.op == "copy":
        return ()
    if part.op == "chain":
        return part.steps
    return (Expression(part.op, tuple(range(len(part.inputs))), kind, part.scalars),)


def substituted(
    part: Computed, which: int, producer: Computed, kind: str
) -> tuple[Expression, ...]:
    """The steps of a walk with those of a producer in the place of one input.

    Args:
        part: the walk.
        which: its input.
        producer: computes the input.
        kind: of the input.
    """
    own = computed(part, "")
    theirs = computed(producer, kind)
    count, theirs_inputs = len(part.inputs), len(producer.inputs)
    total = count - 1 + theirs_inputs

    def of_producer(index: int) -> int:
        inside = index < theirs_inputs
        return which + index if inside else total + index - theirs_inputs

    def of_part(index: int) -> int:
        if index == which:
            return of_producer(theirs_inputs + len(theirs) - 1 if theirs else 0)
        if index < count:
            return index if index < which else index - 1 + theirs_inputs
        return total + len(theirs) + index - count

    return (
        *(replace(step, args=tuple(map(of_producer, step.args))) for step in theirs),
        *(replace(step, args=tuple(map(of_part, step.args))) for step in own),
    )


def with_parts(op: NdOp, values: list[NdValue], parts: list[Part], gone: str) -> NdOp:
    """The operator with other walks; operands nobody looks at are dropped, results come last."""
    used = Counter(look.value for part in parts for look in (part.y, *part.inputs))
    computed = [values[i].name for i in used if values[i].name not in op.writes]
    if gone in computed or not any(computed):
        return op
    written = set(op.writes)
    keep = [i for i in range(len(values)) if i in used and values[i].name not in written]
    keep += [next(i for i, v in enumerate(values) if v.name == name) for name in op.writes]
    place = {old: new for new, old in enumerate(keep)}

    def at(look: Look) -> Look:
        return replace(look, value=place[look.value])

    kinds = {i: values[i].kind for i in used}
    moved = []
    for part in parts:
        kind = kinds[part.y.value]
        steps = tuple(step if step.kind else replace(step, kind=kind) for step in part.steps)
        moved.append(replace(part, y=at(part.y), inputs=tuple(map(at, part.inputs)), steps=steps))
    reads = [values[i].name for i in keep if values[i].name and values[i].name not in written]
    return replace(
        op,
        op_type=op.op_type if op.op_type.startswith("Joined") else f"Joined{op.op_type}",
        x=reads[0],
        more=tuple(dict.fromkeys(reads[1:])),
        values=tuple(values[i] for i in keep),
        parts=tuple(moved),
    )

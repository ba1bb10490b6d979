"""Turns that need not be: what only moves or rounds what the one before wrote to nobody else.

    x, w -> mul -> v,  v -> quantize -> q      =>      x, w -> mul, quantize -> q
    conv -> v,         v -> copy -> out:v      =>      conv -> out:v

Each would read and write all of its elements, and be started, for next to nothing. Walks of the
model's own operators were joined before (join_walks.py); what stands here are those that the
passes made, and those that only a GPU needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twofour.compiler.cuda.lower import Turn, input_buffer, output_buffer
from twofour.compiler.walk_inputs import MOST_STEPS, computed, substituted
from twofour.kernels.cpu.nd_scalar import ELEMENTWISE, Expression
from twofour.kernels.cuda.problem import REAL, Walk

_REAL = "float32"
_OF_THE_HOST = (input_buffer(""), output_buffer(""))


def without_waste(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with those joined that can be.

    A value that is written for the host alone is written where the host takes it from, if it is of
    that type and form.
    """
    kept = list(turns)
    for index, turn in enumerate(kept):
        if turn.op.op_type != "Copy" or not turn.operands["y"].buffer.startswith(output_buffer("")):
            continue
        x, y = turn.operands["in0"], turn.operands["y"]
        readers = [t for t in kept if t is not turn and _touches(t, x.buffer)]
        writer = readers[0] if len(readers) == 1 else None
        if writer is None or x.dtype != y.dtype or not x.is_plain or x.offset:
            continue
        if x.span_bytes != y.span_bytes:
            continue
        at = kept.index(writer)
        moved = {
            role: replace(tensor, buffer=y.buffer) if tensor.buffer == x.buffer else tensor
            for role, tensor in writer.operands.items()
        }
        kept[at] = replace(writer, operands=moved)
        kept[index] = replace(turn, operands={})
    return _chained([turn for turn in kept if turn.operands])


def _chained(turns: Sequence[Turn]) -> list[Turn]:
    """The turns; a walk along the elements that the one before wrote to it alone goes on there."""
    kept = list(turns)
    for index, turn in enumerate(kept):
        if not _goes_on(turn):
            continue
        held = turn.operands["in0"]
        touching = [i for i, each in enumerate(kept) if _touches(each, held.buffer)]
        if len(touching) != 2 or held.buffer.startswith(_OF_THE_HOST):
            continue
        before = kept[touching[0]]
        walk = _both(before, turn)
        if touching[0] < index and walk is not None:
            operands = {**before.operands, "y": turn.operands["y"]}
            op = replace(turn.op, op_type=f"Joined{turn.op.op_type.removeprefix('Joined')}")
            also = (*before.also, before.op)
            kept[index] = Turn(op, walk, operands, ("y",), before.constants, also)
            kept[touching[0]] = replace(before, operands={})
    return [turn for turn in kept if turn.operands]


def _goes_on(turn: Turn) -> bool:
    """Whether it computes each element from one element, and nothing else."""
    walk = turn.problem
    return isinstance(walk, Walk) and walk.op == "chain" and tuple(turn.operands) == ("in0", "y")


def _both(before: Turn, turn: Turn) -> Walk | None:
    """What a walk and the one that goes on with its results compute; None if that is not one."""
    first, last = before.problem, turn.problem
    if not isinstance(first, Walk) or before.operands.get("y") != turn.operands["in0"]:
        return None
    same = (first.dims, first.y) == (last.dims, last.inputs[0])
    steps = _steps(first)
    if not same or steps is None or len(steps) + len(last.steps) > MOST_STEPS:
        return None
    both = substituted(last, 0, replace(first, op="chain", steps=steps), _REAL)
    return Walk("chain", last.dims, last.y, first.inputs, steps=both)


def _steps(walk: Walk) -> tuple[Expression, ...] | None:
    """What a walk computes of each element; None where it does more, or rounds to whole steps.

    The type that its result would be held in is left out.
    """
    if walk.y.dtype not in REAL or (walk.op not in ELEMENTWISE and walk.op != "chain"):
        return None
    steps = computed(walk, _REAL)
    if steps and steps[-1].op == "cast":
        before = len(walk.inputs) + len(steps) - 2
        real = len(steps) > 1 or walk.inputs[0].dtype in REAL
        return steps[:-1] if real and steps[-1].args == (before,) else None
    return steps or None


def _touches(turn: Turn, buffer: str) -> bool:
    return any(tensor.buffer == buffer for tensor in turn.operands.values())

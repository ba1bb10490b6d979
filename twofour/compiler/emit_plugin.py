"""Operators of plugins, placed: each kernel of the chosen tactic becomes a call and a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from twofour.compiler.emit_nd import nd_shape, places_of, strides_of
from twofour.compiler.layers import precision_of
from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Place, Placed
from twofour.compiler.native_plugin import PluginOp
from twofour.compiler.plugin_code import COPY, Entry, Part
from twofour.compiler.plugin_tune import PluginChoice, choose
from twofour.compiler.tune import Tuner, rounded
from twofour.compiler.work import moved_bytes
from twofour.core.abi import ARENA, WEIGHTS
from twofour.core.plugins import Operand, Problem
from twofour.engine import Layer, Work
from twofour.kernels.cpu.llvm import Source
from twofour.kernels.cpu.program import Call
from twofour.kernels.cpu.program import Operand as Pointer

Array = NDArray[Any]


@dataclass(frozen=True)
class Room:
    """What an engine has for a plugin's kernels.

    Attributes:
        kernel: keeps a kernel's code, and returns its symbol.
        keep: puts a constant beside the weights, and returns its offset.
        workspace: where in the arena a workspace of so many bytes lies.
        bindings: plain tensor -> its index in the step's table of pointers.
    """

    kernel: Callable[[Source], str]
    keep: Callable[[Array], int]
    workspace: Callable[[str, int], int]
    bindings: dict[str, int]


def emit_plugin(
    op: PluginOp, placed: Placed, tuner: Tuner, room: Room
) -> tuple[list[Call], list[Layer]]:
    """The calls of an operator, with a layer each; the last layer is the operator's.

    Raises:
        UnsupportedError: no tactic takes the operands as they lie, or the plugin fails.
        WrongResult: a candidate differs from the meaning.
    """
    places = places_of(op, placed)
    problem = _laid(op.problem, places)
    choice = choose(op, problem, tuner)
    planned = choice.planned
    workspace = room.workspace(op.name, planned.workspace_bytes)

    constants = Pointer(WEIGHTS, room.keep(planned.constants))

    def pointer(entry: Entry) -> Pointer:
        if entry.operand is None:
            return Pointer(ARENA, workspace + entry.offset)
        if entry.operand in planned.unread:
            return constants
        value, place = op.values[entry.operand], places[entry.operand]
        if value.constant is not None:
            return Pointer(WEIGHTS, room.keep(value.constant) + entry.offset)
        if isinstance(place, Tensor):
            return Pointer(ARENA, place.at() + entry.offset)
        return Pointer(room.bindings[value.name], entry.offset)

    symbols = [room.kernel(part.source) for part in planned.parts]
    calls = planned.calls(symbols, pointer, constants)
    return calls, _layers(op, placed, choice)


def _laid(problem: Problem, places: list[Place | None]) -> Problem:
    """The problem with its operands as they lie in the engine."""
    rest = iter(places)
    inputs = tuple(None if o is None else _placed(o, next(rest)) for o in problem.inputs)
    return replace(
        problem, inputs=inputs, outputs=tuple(_placed(o, next(rest)) for o in problem.outputs)
    )


def _placed(operand: Operand, place: Place | None) -> Operand:
    """An operand as it lies."""
    if not isinstance(place, Tensor):
        return operand
    steps = strides_of(operand.shape, place)
    # Along an axis of one element any stride is right.
    strides = tuple(
        own if dim == 1 else int(step)  # type: ignore[arg-type]
        for dim, own, step in zip(operand.shape, operand.strides, steps, strict=True)
    )
    return replace(operand, strides=strides, biased=operand.dtype == "int8")


def _layers(op: PluginOp, placed: Placed, choice: PluginChoice) -> list[Layer]:
    """One for each kernel."""
    planned, parts = choice.planned, choice.planned.parts
    times = [rounded(t) for t in choice.times_us] or [None] * len(parts)
    last = len(parts) - 1
    layers = []
    for index, (part, time_us) in enumerate(zip(parts, times, strict=True)):
        config = planned.config
        layer = Layer(
            op.name if index == last else f"{op.name}/{_stage_name(part, index)}",
            op.op_type,
            planned.tactic.name,
            config,
            time_us,
            nd_shape(op),
            planned.precision or precision_of(placed.y),
        )
        if index == last:
            read = [v for i, v in enumerate(op.values) if i not in planned.unread]
            weight = sum(v.constant.nbytes for v in read if v.constant is not None)
            layer = replace(
                layer,
                weight_bytes=weight + planned.constants.nbytes,
                candidates=choice.candidates,
                notes=_notes(choice),
                work=Work(moved_bytes(placed)),
            )
        layers.append(layer)
    return layers


def _stage_name(part: Part, index: int) -> str:
    return part.stage.name or f"stage {index}"


def _notes(choice: PluginChoice) -> tuple[str, ...]:
    """What a single layer of several does not show."""
    count = len(choice.planned.parts)
    copies = sum(part.stage.name.startswith(COPY) for part in choice.planned.parts)
    if count == 1:
        return ()
    time_us = choice.candidates[0].time_us
    whole = "" if time_us is None else f", {time_us:.2f} us together"
    copied = f", {copies} of them copies" if copies else ""
    return (f"the last of {count} kernels{copied}{whole}",)

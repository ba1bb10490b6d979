"""Times of the layers that were not tuned: pointwise and pooling kernels, and fallback steps.

There is nothing to choose there, but a table of times that leaves layers out hides where the time
goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from twofour.core.abi import ARENA, BINDINGS, SLACK_BYTES, SYMBOL_BYTES, WEIGHTS
from twofour.core.errors import InputError
from twofour.core.sizes import usual
from twofour.engine import Engine, Layer, Profile, TensorInfo
from twofour.kernels.cpu.program import Call, Operand
from twofour.runtime.cpu import Bytes, Code, address, allocate
from twofour.runtime.session import Session

_ROUNDS = 5
_ROUND_US = 200.0


@dataclass(frozen=True)
class Placement:
    """A call of an engine's program.

    Attributes:
        layer: index of its layer.
        call: the call.
        bindings: the plain tensors of its step, in the order of the table of pointers.
        symbols: usual values of the open dimensions.
    """

    layer: int
    call: Call
    bindings: tuple[TensorInfo, ...]
    symbols: tuple[int, ...] = ()


def with_times(engine: Engine, placements: Sequence[Placement]) -> Engine:
    """The engine with a time on every layer; a fallback step's time stands on its first layer."""
    layers = list(engine.plan.layers)
    arena = allocate(engine.plan.arena_bytes + SLACK_BYTES)
    weights = allocate(engine.weights.nbytes + SLACK_BYTES)
    weights[: engine.weights.nbytes] = engine.weights
    code = Code([engine.code[name].tobytes() for name in engine.plan.code])
    for placed in placements:
        if layers[placed.layer].time_us is None:
            time_us = _time_call(code, placed, (arena, weights))
            layers[placed.layer] = replace(layers[placed.layer], time_us=round(time_us, 3))
    _time_fallbacks(engine, layers)
    return replace(engine, plan=replace(engine.plan, layers=tuple(layers)))


def _time_call(code: Code, placed: Placement, memory: tuple[Bytes, Bytes]) -> float:
    """Microseconds of one kernel on memory of its own."""
    call = placed.call
    memory[0][: SYMBOL_BYTES * len(placed.symbols)].view(np.int64)[:] = placed.symbols
    plain = [np.zeros(info.usual_shape, info.dtype) for info in placed.bindings]
    bases = {ARENA: address(memory[0]), WEIGHTS: address(memory[1])}
    bases |= {BINDINGS + i: address(array) for i, array in enumerate(plain)}

    def pointer(operand: Operand) -> int:
        return bases[operand.index] + operand.offset

    pointers = [pointer(operand) for operand in (call.x, call.w, call.y, call.r)]
    table = np.array([pointer(operand) for operand in call.table], np.int64)
    if call.table:
        pointers[0] = address(table)
    repeat, kernel, pieces = code.repeat(), code.address(call.symbol), usual(call.pieces)

    def run(count: int) -> None:
        repeat(kernel, *pointers, 0, pieces, 0, call.panels, count, 0, 1)

    run(1)
    count = max(1, int(_ROUND_US / max(_microseconds(lambda: run(2)) / 2, 0.05)))
    return float(np.median([_microseconds(lambda: run(count)) / count for _ in range(_ROUNDS)]))


def _time_fallbacks(engine: Engine, layers: list[Layer]) -> None:
    """Times the steps on ONNX Runtime within whole runs on ones; zeros could be divisors."""
    for profile in engine.plan.profiles:
        _time_profile(engine, profile, layers)


def _time_profile(engine: Engine, profile: Profile, layers: list[Layer]) -> None:
    """The fallback steps of one profile."""
    fallbacks = [(i, s) for i, s in enumerate(profile.steps) if s.kind == "onnxruntime"]
    if not fallbacks:
        return
    inputs = {t.name: np.ones(t.usual_shape, t.dtype) for t in profile.inputs}
    engine = replace(engine, plan=replace(engine.plan, profiles=(profile,)))
    try:
        with Session(engine) as session:
            times_us = session.step_times_us(inputs, _ROUNDS)
    except InputError as error:  # the model needs inputs of a certain kind
        for _, step in fallbacks:
            first = step.layers[0]
            note = f"not timed, it does not take ones: {'; '.join(error.reasons)}"
            layers[first] = replace(layers[first], notes=(*layers[first].notes, note))
        return
    for index, step in fallbacks:
        first, count = step.layers[0], len(step.layers)
        note = f"the time is that of the step's {count} operators together" if count > 1 else ""
        notes = (*layers[first].notes, *([note] if note else []))
        layers[first] = replace(layers[first], time_us=round(times_us[index], 3), notes=notes)


def _microseconds(work: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1e3

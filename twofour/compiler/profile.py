"""Times of the layers that were not tuned: pointwise and pooling kernels, and fallback steps.

There is nothing to choose there, but a table of times that leaves layers out hides where the time
goes. They too are kept in the timing cache, so that a second build gives the same engine.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np

from twofour.compiler.timing_cache import TimingCache
from twofour.core.abi import ARENA, BINDINGS, SLACK_BYTES, SYMBOL_BYTES, WEIGHTS
from twofour.core.errors import InputError
from twofour.core.memory import Bytes, address, allocate, with_slack
from twofour.core.sizes import usual
from twofour.engine import Engine, Layer, Profile, Step, TensorInfo
from twofour.kernels.cpu.llvm import TOOLS
from twofour.kernels.cpu.program import Call, Operand
from twofour.runtime.cpu import Code
from twofour.runtime.session import Session

LONGEST_S = 60.0
"""A model that runs for longer is not timed; some never end."""
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


def with_times(engine: Engine, placements: Sequence[Placement], cache: TimingCache) -> Engine:
    """The engine with a time on every layer; a fallback step's time stands on its first layer.

    Args:
        engine: the engine.
        placements: its native calls.
        cache: times that are known already; the others are added.
    """
    layers = list(engine.plan.layers)
    arena = allocate(engine.plan.arena_bytes + SLACK_BYTES)
    weights = with_slack(engine.weights, SLACK_BYTES)
    code = Code([engine.code[name].tobytes() for name in engine.plan.code])
    for placed in placements:
        if layers[placed.layer].time_us is None:
            key = _call_key(engine, placed)
            if key not in cache.times_us:
                cache.times_us[key] = _time_call(code, placed, (arena, weights))
            time_us = round(cache.times_us[key], 3)
            layers[placed.layer] = replace(layers[placed.layer], time_us=time_us)
    _time_fallbacks(engine, layers, cache)
    return replace(engine, plan=replace(engine.plan, layers=tuple(layers)))


def _call_key(engine: Engine, placed: Placement) -> str:
    """All that the time of a call depends on; the symbol of a kernel is a hash of its text."""
    call = placed.call
    return _hashed(engine, [call.symbol, usual(call.pieces), call.panels, placed.symbols])


def _hashed(engine: Engine, parts: list[object]) -> str:
    """A key on this machine."""
    text = json.dumps([*parts, engine.plan.target.to_json(), TOOLS])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
        repeat(kernel, *pointers, 0, pieces, 0, call.panels, count, 0, 0, 1)

    run(1)
    count = max(1, int(_ROUND_US / max(_microseconds(lambda: run(2)) / 2, 0.05)))
    return min(_microseconds(lambda: run(count)) / count for _ in range(_ROUNDS))


def _time_fallbacks(engine: Engine, layers: list[Layer], cache: TimingCache) -> None:
    """Times the steps on ONNX Runtime within whole runs on ones; zeros could be divisors."""
    for profile in engine.plan.profiles:
        steps = [step for step in profile.steps if step.kind != "native"]
        keys = [_step_key(engine, profile, step) for step in steps]
        if any(key not in cache.times_us for key in keys):
            try:
                cache.times_us |= _measured(engine, profile)
            except InputError as error:  # the model needs inputs of a certain kind
                why = (
                    f"not timed, it does not take ones or runs too long: {'; '.join(error.reasons)}"
                )
                for step in steps:
                    _note(layers, step.layers[0], why)
                continue
        for step, key in zip(steps, keys, strict=True):
            first, count = step.layers[0], len(step.layers)
            layers[first] = replace(layers[first], time_us=round(cache.times_us[key], 3))
            if count > 1:
                _note(layers, first, f"the time is that of the step's {count} operators together")


def _measured(engine: Engine, profile: Profile) -> dict[str, float]:
    """Microseconds of the fallback steps of one profile, by their keys."""
    inputs = {t.name: np.ones(t.usual_shape, t.dtype) for t in profile.inputs}
    alone = replace(engine, plan=replace(engine.plan, profiles=(profile,)))
    with Session(alone) as session, session.within(LONGEST_S):
        times_us = session.step_times_us(inputs, _ROUNDS)
    return {
        _step_key(engine, profile, step): time_us
        for step, time_us in zip(profile.steps, times_us, strict=True)
        if step.kind != "native"
    }


def _step_key(engine: Engine, profile: Profile, step: Step) -> str:
    """All that the time of a fallback step depends on."""
    graph = hashlib.sha256(engine.subgraphs[step.symbol].tobytes()).hexdigest()
    shapes = [list(t.usual_shape) for t in profile.inputs]
    return _hashed(engine, [graph, shapes, engine.plan.threads, version("onnxruntime")])


def _note(layers: list[Layer], index: int, text: str) -> None:
    """Adds a note to a layer."""
    layers[index] = replace(layers[index], notes=(*layers[index].notes, text))


def _microseconds(work: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1e3

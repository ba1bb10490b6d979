"""Kernels that are started before those in front of them have ended, where that pays.

From Hopper on a kernel may lie in wait while the one in front of it still runs: its blocks are
placed as room comes free, they find their numbers and fetch what does not depend on anything, and
then wait for the memory that others write (programmatic dependent launch, CUDA Programming Guide).
A program runs both ways here, its results are compared byte by byte, and the faster way is kept;
the plan says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.choose import random_operand
from twofour.core.cuda_program import CudaProgram
from twofour.core.errors import UnsupportedError
from twofour.engine import Engine, Profile, Step
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.network import CudaNetwork, CudaStep
from twofour.runtime.cuda.prepared import time_us
from twofour.runtime.shapes import Bound

Array = NDArray[Any]
_TIMES = 3
"""Each way runs so often, in turns: to be compared, and to be timed."""
_LEAST_GAIN = 0.005
_EARLY = " early"


def started_early(engine: Engine, device: Device, waiting: Collection[str], rounds: int) -> Engine:
    """The engine with the faster way for each of its programs, and a note of each that was tried.

    Args:
        engine: whose kernels start one after the other.
        device: the GPU that it is for.
        waiting: names of the objects whose kernels wait for those in front of them.
        rounds: how often a graph of a program is replayed each time it is timed.
    """
    found = {step.symbol: _early(engine, step, waiting) for _, step in _steps(engine)}
    early = {name: each for name, each in found.items() if _early_count(each)}
    if not early or not device.starts_early:
        return engine
    both = engine.subgraphs | {name + _EARLY: _bytes(program) for name, program in early.items()}
    taken: dict[str, NDArray[np.uint8]] = {}
    notes = []
    try:
        with closing(CudaNetwork(replace(engine, subgraphs=both), device.gpu.index)) as network:
            for profile, step in _steps(engine):
                if step.symbol in early:
                    pays, said = _tried(network, profile, step, rounds)
                    count = _early_count(early[step.symbol])
                    notes.append(f"{step.symbol}: {count} kernels started early {said}")
                    taken |= {step.symbol: both[step.symbol + _EARLY]} if pays else {}
    except UnsupportedError as error:  # there may be room for each layer, and not for all
        notes.append(f"kernels were not started early to try it: {_said(error)}")
    plan = replace(engine.plan, notes=(*engine.plan.notes, *notes))
    return replace(engine, plan=plan, subgraphs=engine.subgraphs | taken)


def _steps(engine: Engine) -> Iterator[tuple[Profile, Step]]:
    """Those on the GPU."""
    for profile in engine.plan.profiles:
        for step in profile.steps:
            if step.kind == "cuda":
                yield profile, step


def _early(engine: Engine, step: Step, waiting: Collection[str]) -> CudaProgram:
    return CudaProgram.from_bytes(engine.subgraphs[step.symbol].tobytes()).early(waiting)


def _early_count(program: CudaProgram) -> int:
    return sum(launch.early for launch in program.launches)


def _bytes(program: CudaProgram) -> NDArray[np.uint8]:
    return np.frombuffer(program.to_bytes(), np.uint8)


def _tried(network: CudaNetwork, profile: Profile, step: Step, rounds: int) -> tuple[bool, str]:
    """Whether to start kernels of a step early, and what came of it in words."""
    infos = {info.name: info for info in profile.tensors}
    inputs = {
        name: random_operand(info.dtype, math.prod(info.shape), seed).reshape(info.shape)
        for seed, (name, info) in enumerate((name, infos[name]) for name in step.inputs)
    }
    try:
        ways = [
            network.step(replace(step, symbol=step.symbol + end), profile) for end in ("", _EARLY)
        ]
        times: list[list[float]] = [[], []]
        for _ in range(_TIMES):
            wanted, got = (_outputs(network, profile, way, inputs) for way in ways)
            if wanted != got:
                return False, "give other results, and are not: this is a defect, report it"
            for way, found in zip(ways, times, strict=True):
                found.append(time_us(network.device, way.prepared, rounds))
    except UnsupportedError as error:
        return False, f"are refused: {_said(error)}"
    plain_us, early_us = map(median, times)
    pays = early_us < plain_us * (1 - _LEAST_GAIN)
    said = f"{early_us:.1f} us instead of {plain_us:.1f} us"
    return pays, f"take {said}" if pays else f"would take {said}, and are not"


def _said(error: UnsupportedError) -> str:
    return "; ".join([error.what, *error.reasons])


def _outputs(
    network: CudaNetwork, profile: Profile, way: CudaStep, inputs: Mapping[str, Array]
) -> dict[str, bytes]:
    """What a run writes. What one before it left, the same values, would hide that none waited."""
    network.wipe()
    network.enter(profile)
    tensors = dict(inputs)
    way.run(tensors, Bound(0, (), {}))
    return {name: array.tobytes() for name, array in tensors.items() if name not in inputs}

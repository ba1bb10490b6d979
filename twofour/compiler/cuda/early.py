"""Kernels that are started before those in front of them have ended, where that pays.

From Hopper on a kernel may lie in wait while the one in front of it still runs: its blocks are
placed as room comes free, they find their numbers and fetch what does not depend on anything, and
then wait for the memory that others write (programmatic dependent launch, CUDA Programming Guide).

Blocks that come early crowd where room came free first: two share a multiprocessor while another
has none, and the kernel takes twice as long. With an even share of the shared memory asked for, no
more of them fit one multiprocessor than each would get, and the others wait for their place.

A program runs each way here, with all kernels and then kernel by kernel; its results are compared
byte by byte, and the fastest way is kept; the plan says so.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.choose import random_operand
from twofour.core.cuda_program import CudaProgram, Launch
from twofour.core.errors import Error, UnsupportedError
from twofour.engine import Engine, Profile, Step
from twofour.runtime.cuda.device import Device, Room
from twofour.runtime.cuda.network import CudaNetwork, CudaStep
from twofour.runtime.cuda.prepared import time_us
from twofour.runtime.shapes import Bound

Array = NDArray[Any]
EARLY, EVEN = "early", "early, evenly"
"""How the kernels of an object start; those that stand in no table begin one after the other."""
EARLY_SECONDS = (0.0, 2.0, 6.0, 20.0)
"""For each tuning effort: how long ways are tried kernel by kernel."""
Ways = dict[str, str]
_TIMES = 3
"""Ways are timed so often, in turns; and compared."""
_LEAST_GAIN = 0.005
_LEAST_KERNEL_GAIN = 0.001
_GRAIN_BYTES, _MOST_SHARES = 128, 16


def started_early(
    engine: Engine, device: Device, waiting: Collection[str], rounds: int, seconds: float = 0.0
) -> Engine:
    """The engine with the fastest way for each of its programs, and a note of each that was tried.

    Args:
        engine: whose kernels start one after the other.
        device: the GPU that it is for.
        waiting: names of the objects whose kernels wait for those in front of them.
        rounds: how often a graph of a program is replayed each time it is timed.
        seconds: for trying kernel by kernel, for each program; what was begun is ended.
    """
    found = [(profile, step, _program(engine, step)) for profile, step in _steps(engine)]
    tried = [each for each in found if _count(each[2].early(waiting))]
    if not tried or not device.starts_early:
        return engine
    taken: dict[str, NDArray[np.uint8]] = {}
    notes = []
    try:
        with closing(CudaNetwork(engine, device.gpu.index)) as network:
            for profile, step, program in tried:
                trial = _Trial(network, profile, step, program, rounds)
                fastest, said = trial.result(waiting, seconds)
                notes.append(f"{step.symbol}: {said}")
                if fastest is not None:
                    taken[step.symbol] = np.frombuffer(fastest.to_bytes(), np.uint8)
    except UnsupportedError as error:  # there may be room for each layer, and not for all
        notes.append(f"kernels were not started early to try it: {_said(error)}")
    plan = replace(engine.plan, notes=(*engine.plan.notes, *notes))
    return replace(engine, plan=plan, subgraphs=engine.subgraphs | taken)


def with_ways(program: CudaProgram, ways: Ways, room: Room) -> CudaProgram:
    """A program whose kernels start so, where they stand behind another.

    Args:
        program: which of its kernels start early now does not matter.
        ways: name of an object -> how its kernels start.
        room: of the GPU.
    """
    early = program.early(ways)
    launches = tuple(
        replace(launch, shared_bytes=even_shared_bytes(launch, room))
        if launch.early and ways[launch.code] == EVEN
        else launch
        for launch in early.launches
    )
    return replace(early, launches=launches)


def even_shared_bytes(launch: Launch, room: Room) -> int:
    """With so much shared memory no more blocks fit a multiprocessor than an even share of them."""
    share = -(-math.prod(launch.grid) // room.multiprocessors)
    if share > _MOST_SHARES:
        return launch.shared_bytes
    too_much = room.shared_bytes // (share + 1) - room.reserved_bytes + 1
    return max(launch.shared_bytes, -(-too_much // _GRAIN_BYTES) * _GRAIN_BYTES)


@dataclass
class _Trial:
    """Ways of a program of one step."""

    network: CudaNetwork
    profile: Profile
    step: Step
    program: CudaProgram
    rounds: int
    refused: list[Error] = field(default_factory=list)

    def result(self, waiting: Collection[str], seconds: float) -> tuple[CudaProgram | None, str]:
        """The fastest that is right, None for one kernel after the other; and what to say."""
        early = [launch.code for launch in self.program.early(waiting).launches if launch.early]
        codes, best = Counter(early), dict[str, str]()
        try:
            plain = self.network.step(self.step, self.profile, self.program)
            wanted = self._outputs(plain)  # all that is timed runs on what this left
            for way in (EARLY, EVEN):
                best = self._faster(best, dict.fromkeys(codes, way), _LEAST_GAIN)
            best = self._by_kernels(best, codes, seconds)
            ways = best or dict.fromkeys(codes, EVEN)
            made = self._made(ways)
            step = self.network.step(self.step, self.profile, made)
            if any(self._outputs(step) != wanted for _ in range(_TIMES)):
                lost = "start early and give other results, and do not: a defect, report it"
                return None, f"{_count(made)} kernels {lost}"
            plain_us, early_us = self._times_us(self.program, made)
        except Error as error:
            return None, f"kernels that start early are refused: {_said(error)}"
        times = f"{early_us:.1f} us instead of {plain_us:.1f} us"
        if self.refused:
            times += f" ({len(self.refused)} ways to start are refused: {_said(self.refused[0])})"
        if not best or early_us > plain_us * (1 - _LEAST_GAIN):
            return None, f"{_count(made)} kernels started early would take {times}, and are not"
        return made, f"{_count(made)} kernels started early take {times}"

    def _by_kernels(self, best: Ways, codes: Counter[str], seconds: float) -> Ways:
        """Each object's kernels in the other ways, those that stand most often first."""
        end = time.monotonic() + seconds
        for code, _ in codes.most_common():
            rest = {each: way for each, way in best.items() if each != code}
            for other in (rest, rest | {code: EARLY}, rest | {code: EVEN}):
                if time.monotonic() > end:
                    return best
                best = self._faster(best, other, _LEAST_KERNEL_GAIN)
        return best

    def _faster(self, best: Ways, other: Ways, least_gain: float) -> Ways:
        made = self._made(best), self._made(other)
        if made[0] == made[1]:
            return best
        try:
            best_us, other_us = self._times_us(*made)
        except Error as error:  # other ways may go
            self.refused.append(error)
            return best
        return other if other_us < best_us * (1 - least_gain) else best

    def _made(self, ways: Ways) -> CudaProgram:
        return with_ways(self.program, ways, self.network.device.room)

    def _times_us(self, *programs: CudaProgram) -> list[float]:
        """Medians of some, timed in turns."""
        device, times = self.network.device, [[0.0] * _TIMES for _ in programs]
        ready = []
        try:
            for program in programs:
                ready.append(self.network.prepared(program))
            for turn in range(_TIMES):
                for prepared, found in zip(ready, times, strict=True):
                    found[turn] = time_us(device, prepared.enqueue, self.rounds)
        finally:
            for prepared in ready:
                prepared.close()
        return [median(found) for found in times]

    def _outputs(self, way: CudaStep) -> dict[str, bytes]:
        """What a run writes; what one before left, the same, would hide that none waited."""
        infos = {info.name: info for info in self.profile.tensors}
        tensors: dict[str, Array] = {
            name: random_operand(infos[name].dtype, math.prod(infos[name].shape), seed)
            for seed, name in enumerate(self.step.inputs)
        }
        for name, array in tensors.items():
            tensors[name] = array.reshape(infos[name].shape)
        self.network.wipe()
        self.network.enter(self.profile)
        way.run(tensors, Bound(0, (), {}))
        return {name: tensors[name].tobytes() for name in self.step.outputs}


def _steps(engine: Engine) -> Iterator[tuple[Profile, Step]]:
    """Those on the GPU."""
    for profile in engine.plan.profiles:
        for step in profile.steps:
            if step.kind == "cuda":
                yield profile, step


def _program(engine: Engine, step: Step) -> CudaProgram:
    return CudaProgram.from_bytes(engine.subgraphs[step.symbol].tobytes())


def _count(program: CudaProgram) -> int:
    return sum(launch.early for launch in program.launches)


def _said(error: Error) -> str:
    return "; ".join([error.what, *error.reasons])

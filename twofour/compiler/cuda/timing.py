"""Ways of doing a turn, compared with the definition and timed on the GPU.

What is read is random, never zeros. Products are compared at some pixels of the result, all
channels of each: the definition in numpy is too slow for whole layers. What a plugin computes is
compared with its meaning, on its own samples. A way that is wrong is an error of the build, never a
slow candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.arena import place, rounded
from twofour.compiler.cuda.assemble import (
    Constants,
    calls_of,
    code_of,
    lives_of,
    places_of,
    scratch_buffer,
)
from twofour.compiler.cuda.check import compare, sample_of
from twofour.compiler.cuda.choose import Way, key_of, random_operand
from twofour.compiler.cuda.lower import Stretch, Turn
from twofour.compiler.cuda.plugin_check import Sampled
from twofour.compiler.native_plugin import PluginOp
from twofour.compiler.timing_cache import TimingCache
from twofour.core.cuda_program import ARENA, WEIGHTS, CudaProgram, Place
from twofour.core.version import __version__
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.prepared import Objects, Prepared, time_us

Array = NDArray[Any]
_ROUNDS = (5, 9, 15, 31)
"""Samples for each tuning effort."""
_GARBAGE = 0x5A
_SCRATCH = 64 << 20
"""Bytes that are taken at once for what ways need beside their operands."""


def keyed_by(device: Device) -> str:
    """What a time depends on beside the turn."""
    return f"{device.gpu.name}|{device.driver.version}|{__version__}"


@dataclass
class Bench:
    """Times ways on one GPU.

    Attributes:
        device: the GPU.
        effort: how many samples are taken.
        cache: times already known.
        keyed: what a time depends on beside the turn: GPU, driver, versions.
    """

    device: Device
    effort: int
    cache: TimingCache
    keyed: str
    _stand: _Stand | None = None

    def __call__(self, turn: Turn, way: Way) -> float:
        """Microseconds of one run; see `choose.Timer`."""
        tried = f"{way.recipe.tactic}|{way.recipe.config}"
        key = f"{self.keyed}|{key_of(turn)}|{tried}"
        known = self.cache.times_us.get(key)
        if known is not None:
            return known
        if self._stand is None or self._stand.turn is not turn:
            self.close()
            self._stand = _Stand(self.device, turn)
        found = self._stand.time_us(way, _ROUNDS[self.effort])
        self.cache.times_us[key] = found
        return found

    def close(self) -> None:
        """Gives all memory back."""
        if self._stand is not None:
            self._stand.close()
            self._stand = None


class _Stand:
    """The operands of one turn on the GPU, for all ways of doing it.

    Attributes:
        turn: the turn.
    """

    def __init__(self, device: Device, turn: Turn) -> None:
        """Makes up what it reads."""
        self.turn, self._device = turn, device
        self._room: _Room | None = None
        self._plugin = Sampled(turn, turn.op) if isinstance(turn.op, PluginOp) else None
        if self._plugin is not None:
            self._inputs, self._sample = self._plugin.inputs, None
            return
        self._inputs = {
            role: random_operand(tensor.dtype, tensor.span_bytes // tensor.item_bytes, seed)
            for seed, (role, tensor) in enumerate(turn.operands.items())
            if role not in turn.writes
        }
        self._sample = sample_of(turn, self._inputs)

    def time_us(self, way: Way, rounds: int) -> float:
        """Runs a way, compares its results, and times it."""
        lives = lives_of(Stretch([self.turn], (), ()), [way])
        operands = {name: life for name, life in lives.items() if not _is_scratch(name)}
        offsets, size = place(operands)
        for name in sorted(lives.keys() - operands.keys()):
            offsets[name] = size
            size += rounded(lives[name].size_bytes)
        constants = Constants()
        places = places_of(self.turn, way, offsets, scratch_buffer(0), constants)
        program = CudaProgram.of(calls_of(way, places, 0), (), ())
        room = self._with_room(size, places)
        room.put_weights(constants.block())
        objects = Objects(self._device, code_of([way]))
        try:
            return self._timed(way, room, program, objects, rounds)
        finally:
            objects.close()

    def _with_room(self, size: int, places: Mapping[str, Place]) -> _Room:
        """Memory of that size, with what is read in its place."""
        if self._room is None or self._room.size_bytes < size:
            self.close()
            self._room = _Room(self._device, max(size + _SCRATCH, 1))
            for role, array in self._inputs.items():
                self._room.put(places[role], array)
        self._room.places = places
        return self._room

    def _timed(
        self, way: Way, room: _Room, program: CudaProgram, objects: Objects, rounds: int
    ) -> float:
        prepared = Prepared(self._device, program, objects, room.blocks)
        try:
            prepared.enqueue(room.stream)
            if self._plugin is not None:
                self._plugin.compare(way.recipe, room.read)
            if self._sample is not None:
                compare(self.turn, way.recipe, self._sample, room.read_y)
            found: float = time_us(self._device, prepared, rounds)
            return found
        finally:
            self._device.wait(room.stream)
            prepared.close()

    def close(self) -> None:
        """Gives its memory back."""
        if self._room is not None:
            self._room.close()
            self._room = None


def _is_scratch(name: str) -> bool:
    return name.startswith(scratch_buffer(0))


class _Room:
    """Memory on the GPU for the ways of doing a turn.

    Attributes:
        size_bytes: of the arena.
        stream: what is copied and run is put there.
        blocks: addresses of the arena and of the weights.
        places: of the way at hand, by role.
    """

    def __init__(self, device: Device, size_bytes: int) -> None:
        """Takes it, and fills it with garbage."""
        self._device, self.size_bytes = device, size_bytes
        self.stream = device.stream()
        self.blocks: dict[str, int] = {}
        self.places: Mapping[str, Place] = {}
        try:
            self.blocks[ARENA] = device.take(size_bytes, "operands to time a kernel with")
            device.fill(self.blocks[ARENA], _GARBAGE, size_bytes, self.stream)
            device.wait(self.stream)
        except BaseException:
            self.close()
            raise

    def put_weights(self, weights: Array) -> None:
        """The constants of the next way."""
        if WEIGHTS in self.blocks:
            self._device.give_back(self.blocks.pop(WEIGHTS))
        size = max(weights.nbytes, 1)
        self.blocks[WEIGHTS] = self._device.take(size, "weights to time a kernel with")
        self._device.to_gpu(self.blocks[WEIGHTS], weights, self.stream)
        self._device.wait(self.stream)

    def put(self, where: Place, array: Array) -> None:
        """Puts what is read in its place."""
        at = self.blocks[where.block] + where.offset
        self._device.to_gpu(at, np.ascontiguousarray(array), self.stream)
        self._device.wait(self.stream)

    def read_y(self, begin: int, size_bytes: int) -> Array:
        """Some bytes of the result."""
        return self._read(self.places["y"], begin, size_bytes)

    def read(self, role: str) -> Array:
        """All bytes of a result."""
        return self._read(self.places[role], 0, self.places[role].size_bytes)

    def _read(self, where: Place, begin: int, size_bytes: int) -> Array:
        found = np.empty(size_bytes, np.uint8)
        at = self.blocks[where.block] + where.offset + begin
        self._device.from_gpu(found, at, self.stream)
        self._device.wait(self.stream)
        return found

    def close(self) -> None:
        """Gives all back."""
        for address in self.blocks.values():
            self._device.give_back(address)
        self.blocks = {}
        self._device.drop_stream(self.stream)

"""Ways of doing a turn, compared with the definition and timed on the GPU.

What is read is random, never zeros. Products are compared at some pixels of the result, all
channels of each: the definition in numpy is too slow for whole layers. A way that is wrong is an
error of the build, never a slow candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.arena import place
from twofour.compiler.cuda.assemble import (
    Constants,
    calls_of,
    code_of,
    lives_of,
    places_of,
    scratch_buffer,
)
from twofour.compiler.cuda.check import compare_product
from twofour.compiler.cuda.choose import Way, key_of, random_operand
from twofour.compiler.cuda.lower import Stretch, Turn
from twofour.compiler.timing_cache import TimingCache
from twofour.core.cuda_program import ARENA, WEIGHTS, CudaProgram, Place
from twofour.core.version import __version__
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.prepared import Objects, Prepared, time_us

Array = NDArray[Any]
_ROUNDS = (5, 9, 15, 31)
"""Samples for each tuning effort."""
_GARBAGE = 0x5A


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
    _held: dict[Any, dict[str, Array]] = field(default_factory=dict)

    def __call__(self, turn: Turn, way: Way) -> float:
        """Microseconds of one run; see `choose.Timer`."""
        tried = f"{way.recipe.tactic}|{way.recipe.config}"
        key = f"{self.keyed}|{key_of(turn)}|{tried}"
        known = self.cache.times_us.get(key)
        if known is not None:
            return known
        lives = lives_of(Stretch([turn], (), ()), [way])
        offsets, size = place(lives)
        constants = Constants()
        places = places_of(turn, way, offsets, scratch_buffer(0), constants)
        program = CudaProgram.of(calls_of(way, places, 0), (), ())
        room = _Room(self.device, size, constants.block())
        objects = Objects(self.device, code_of([way]))
        try:
            room.fill(places, self._inputs(turn))
            found = self._timed(turn, way, room, program, objects)
        finally:
            objects.close()
            room.close()
        self.cache.times_us[key] = found
        return found

    def _timed(
        self, turn: Turn, way: Way, room: _Room, program: CudaProgram, objects: Objects
    ) -> float:
        prepared = Prepared(self.device, program, objects, room.blocks)
        try:
            prepared.enqueue(room.stream)
            if "y" in room.places:
                y = room.read(room.places["y"])
                compare_product(turn, way.recipe, self._inputs(turn), y)
            found: float = time_us(self.device, prepared, _ROUNDS[self.effort])
            return found
        finally:
            self.device.wait(room.stream)
            prepared.close()

    def _inputs(self, turn: Turn) -> Mapping[str, Array]:
        """Random bytes for all that a turn reads."""
        key = key_of(turn)
        if key not in self._held:
            self._held.clear()
            self._held[key] = {
                role: random_operand(tensor.dtype, tensor.span_bytes // tensor.item_bytes, seed)
                for seed, (role, tensor) in enumerate(turn.operands.items())
                if role not in turn.writes
            }
        return self._held[key]


class _Room:
    """Memory on the GPU for one way of doing a turn."""

    def __init__(self, device: Device, size_bytes: int, weights: Array) -> None:
        """Takes it, and copies the constants."""
        self._device = device
        self.stream = device.stream()
        self.blocks: dict[str, int] = {}
        self.places: Mapping[str, Place] = {}
        try:
            self.blocks[ARENA] = device.take(max(size_bytes, 1), "operands to time a kernel with")
            self.blocks[WEIGHTS] = device.take(max(weights.nbytes, 1), "weights to time it with")
            device.fill(self.blocks[ARENA], _GARBAGE, size_bytes, self.stream)
            device.to_gpu(self.blocks[WEIGHTS], weights, self.stream)
            device.wait(self.stream)
        except BaseException:
            self.close()
            raise

    def fill(self, places: Mapping[str, Place], inputs: Mapping[str, Array]) -> None:
        """Puts what is read in its place."""
        self.places = places
        for role, array in inputs.items():
            where = places[role]
            at = self.blocks[where.block] + where.offset
            self._device.to_gpu(at, np.ascontiguousarray(array), self.stream)
        self._device.wait(self.stream)

    def read(self, where: Place) -> Array:
        """The bytes that lie in a place."""
        found = np.empty(where.size_bytes, np.uint8)
        self._device.from_gpu(found, self.blocks[where.block] + where.offset, self.stream)
        self._device.wait(self.stream)
        return found

    def close(self) -> None:
        """Gives all back."""
        for address in self.blocks.values():
            self._device.give_back(address)
        self.blocks = {}
        self._device.drop_stream(self.stream)

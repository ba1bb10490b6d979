"""Ways of doing a turn, compared with the definition and timed on the GPU.

What is read is random, never zeros. Products are compared at some pixels of the result, all
channels of each: the definition in numpy is too slow for whole layers. What a plugin computes is
compared with its meaning, on its own samples. A way that is wrong is an error of the build, never a
slow candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle
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
from twofour.kernels.cuda.kernel import divided
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.prepared import Objects, Prepared, time_us

Array = NDArray[Any]
ROUNDS = (5, 9, 15, 31)
"""Samples for each tuning effort."""
_GARBAGE = 0x5A
_HELD = 1 << 30
"""Bytes of constants that stay on the GPU for further ways of the same turn."""
_SCRATCH = 64 << 20
"""Bytes that are taken at once for what ways need beside their operands."""
_CACHE_SHARE, _CACHES = 8, 2
"""Constants of more than 1/8 of the L2 cache are not in it when a network comes to them again: runs
take turns with copies of them, which fill the cache twice."""
_TIMED = "large constants from memory"
"""Times that were taken another way are not compared with these."""


def made_up(turn: Turn) -> dict[str, Array]:
    """Random operands by role, bytes of each; those that lie in one buffer hold the same there.

    A residual may be what the convolution itself reads, or another part of its buffer.
    """
    read = {role: t for role, t in turn.operands.items() if role not in turn.writes}
    ends: dict[str, int] = {}
    for tensor in read.values():
        end = tensor.offset_bytes + tensor.span_bytes
        ends[tensor.buffer] = max(ends.get(tensor.buffer, 0), end)
    types = {tensor.buffer: tensor for tensor in reversed(read.values())}
    held = {
        name: random_operand(types[name].dtype, end // types[name].item_bytes, seed).view(np.uint8)
        for seed, (name, end) in enumerate(ends.items())
    }
    return {
        role: held[t.buffer][t.offset_bytes : t.offset_bytes + t.span_bytes]
        for role, t in read.items()
    }


def keyed_by(device: Device) -> str:
    """What a time depends on beside the turn."""
    return f"{device.gpu.name}|{device.driver.version}|{__version__}|{_TIMED}"


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
        found = self._stand.time_us(way, ROUNDS[self.effort])
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
        self._digests: dict[int, tuple[Array, bytes]] = {}
        self._plugin = Sampled(turn, turn.op) if isinstance(turn.op, PluginOp) else None
        if self._plugin is not None:
            self._inputs, self._sample = self._plugin.inputs, None
            return
        self._inputs = made_up(turn)
        self._sample = sample_of(turn, self._inputs)

    def time_us(self, way: Way, rounds: int) -> float:
        """Runs a way, compares its results, and times it."""
        lives = lives_of(Stretch([self.turn], (), ()), [way])
        operands = {name: life for name, life in lives.items() if not _is_scratch(name)}
        offsets, size = place(operands)
        for name in sorted(lives.keys() - operands.keys()):
            offsets[name] = size
            size += rounded(lives[name].size_bytes)
        constants = Constants(self._digests)
        places = places_of(self.turn, way, offsets, scratch_buffer(0), constants)
        program = CudaProgram.of(calls_of(way, places, 0), (), ())
        room = self._with_room(size, places)
        room.put_weights(constants)
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
        with ExitStack() as stack:
            prepared = [
                stack.enter_context(closing(Prepared(self._device, program, objects, blocks)))
                for blocks in room.copies
            ]
            stack.callback(self._device.wait, room.stream)  # before they are closed
            prepared[0].enqueue(room.stream)
            if self._plugin is not None:
                self._plugin.compare(way.recipe, room.read)
            if self._sample is not None:
                compare(self.turn, way.recipe, self._sample, room.read_y)
            turns = cycle(prepared)
            return time_us(self._device, lambda stream: next(turns).enqueue(stream), rounds)

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
        self._weights: dict[tuple[bytes, ...], range] = {}  # addresses of copies
        self._copies = range(0)
        self.places: Mapping[str, Place] = {}
        try:
            self.blocks[ARENA] = device.take(size_bytes, "operands to time a kernel with")
            device.fill(self.blocks[ARENA], _GARBAGE, size_bytes, self.stream)
            device.wait(self.stream)
        except BaseException:
            self.close()
            raise

    def put_weights(self, constants: Constants) -> None:
        """The constants of the next way; those that many ways have stay where they are."""
        found = self._weights.get(constants.contents)
        if found is None:
            block = constants.block()
            step = max(block.nbytes, 1)
            taken = step * self._count(step)
            self._forget(taken)
            address = self._device.take(taken, "weights to time a kernel with")
            found = self._weights[constants.contents] = range(address, address + taken, step)
            for copy in found:
                self._device.to_gpu(copy, block, self.stream)
            self._device.wait(self.stream)
        self._copies = found
        self.blocks[WEIGHTS] = found[0]

    @property
    def copies(self) -> list[dict[str, int]]:
        """The blocks for each copy of the constants."""
        return [self.blocks | {WEIGHTS: address} for address in self._copies]

    def _count(self, size_bytes: int) -> int:
        """How many copies of constants leave none of them in the cache."""
        cache = self._device.cache_bytes
        return divided(_CACHES * cache, size_bytes) if size_bytes * _CACHE_SHARE > cache else 1

    def _forget(self, more_bytes: int) -> None:
        """Gives the oldest constants back, as far as more of them leave too little room."""
        while (
            self._weights
            and more_bytes + sum(c.stop - c[0] for c in self._weights.values()) > _HELD
        ):
            copies = self._weights.pop(next(iter(self._weights)))
            self._device.give_back(copies[0])

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
        self.blocks.pop(WEIGHTS, None)
        for address in (*self.blocks.values(), *(copies[0] for copies in self._weights.values())):
            self._device.give_back(address)
        self.blocks, self._weights = {}, {}
        self._device.drop_stream(self.stream)

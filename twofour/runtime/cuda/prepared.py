"""A program of a GPU with its kernels loaded: put into a stream, timed.

objects = Objects(device, engine.code)
prepared = Prepared(device, program, objects, {"arena": arena, "weights": weights})
prepared.enqueue(stream)
time_us(device, prepared.enqueue, rounds=5)
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Protocol

from twofour.core.cuda_program import CudaProgram, Launch, LibraryCall
from twofour.core.errors import EngineError
from twofour.core.memory import Bytes
from twofour.runtime.cuda import cublaslt, cusparselt
from twofour.runtime.cuda.device import Device

_LEAST_US = 300.0  # of a replay that is timed: events have a grain of half a microsecond
_MOST_REPEATS = 200


class Product(Protocol):
    """What a library is ready to compute.

    Attributes:
        sizes: bytes of each operand that it touches.
    """

    sizes: tuple[int, ...]

    def run(self, stream: int, addresses: tuple[int, ...]) -> None:
        """Puts it into a stream."""

    def close(self) -> None:
        """Frees what it holds."""


Prepare = Callable[[str, int, int], Product]
LIBRARIES: dict[str, Prepare] = {
    "cublaslt": cublaslt.prepare,
    "cusparselt": cusparselt.prepare,
}
"""Library -> what makes a call of it ready: settings, capability and number of the GPU."""


class Objects:
    """Machine code on a GPU: each object is loaded when a kernel of it is first asked for."""

    def __init__(self, device: Device, code: Mapping[str, Bytes]) -> None:
        """Loads nothing yet.

        Args:
            device: the GPU.
            code: objects by name.
        """
        self._device, self._code = device, code
        self._modules: dict[str, int] = {}
        self._kernels: dict[tuple[str, str], tuple[int, int]] = {}
        self._lock = threading.Lock()

    def kernel(self, code: str, symbol: str, shared_bytes: int) -> int:
        """A kernel, for starts with so much dynamic shared memory, or less.

        Raises:
            EngineError: there is no such object or kernel, or it does not fit the GPU.
        """
        with self._lock:
            if code not in self._modules:
                if code not in self._code:
                    raise EngineError(f"the engine has no object {code!r}", [f"for {symbol}"])
                self._modules[code] = self._device.load(self._code[code])
            found, most = self._kernels.get((code, symbol), (0, -1))
            if shared_bytes > most:
                found = self._device.kernel(self._modules[code], symbol, shared_bytes)
                self._kernels[code, symbol] = found, shared_bytes
            return found

    def close(self) -> None:
        """Unloads all; safe to call twice."""
        with self._lock:
            self._kernels.clear()
            while self._modules:
                self._device.unload(self._modules.popitem()[1])


@dataclass(frozen=True)
class _Turn:
    """A kernel or a library call, ready to be put into a stream."""

    layer: int
    enqueue: Callable[[int, bool], None]


class Prepared:
    """One program, ready to run any number of times.

    Attributes:
        program: the program.
        layers: indices of what it runs, in order; one that comes back stands here again.
    """

    def __init__(
        self,
        device: Device,
        program: CudaProgram,
        objects: Objects,
        blocks: Mapping[str, int],
        libraries: Mapping[str, Prepare] = LIBRARIES,
    ) -> None:
        """Loads kernels and makes library calls ready; nothing runs.

        Args:
            device: the GPU.
            program: known to be sound, see core/cuda_check.py.
            objects: have its kernels.
            blocks: addresses of "arena" and "weights".
            libraries: see `LIBRARIES`.

        Raises:
            EngineError: a kernel cannot be loaded, or a library call is malformed.
            UnsupportedError: a library is missing or refuses.
        """
        self.program = program
        self._device, self._blocks = device, blocks
        self._products: list[Product] = []
        try:
            self._turns = [
                self._launch(turn, objects)
                if isinstance(turn, Launch)
                else self._call(turn, libraries)
                for turn in program.turns
            ]
        except BaseException:
            self.close()
            raise
        self._groups: list[tuple[int, list[_Turn]]] = []
        for turn in self._turns:
            if not self._groups or self._groups[-1][0] != turn.layer:
                self._groups.append((turn.layer, []))
            self._groups[-1][1].append(turn)
        self.layers = tuple(layer for layer, _ in self._groups)

    def enqueue(self, stream: int) -> None:
        """Puts all of it into a stream."""
        with self._device.current():
            for turn in self._turns:
                turn.enqueue(stream, True)

    def enqueue_group(self, index: int, stream: int) -> None:
        """Puts the calls of `layers[index]` into a stream, each behind what is there."""
        with self._device.current():
            for turn in self._groups[index][1]:
                turn.enqueue(stream, False)

    def close(self) -> None:
        """Frees what library calls hold; the kernels are the objects'. Safe to call twice."""
        with self._device.current():
            while self._products:
                self._products.pop().close()

    def _addresses(self, turn: Launch | LibraryCall) -> tuple[int, ...]:
        return tuple(self._blocks[place.block] + place.offset for place in turn.places)

    def _launch(self, turn: Launch, objects: Objects) -> _Turn:
        kernel = objects.kernel(turn.code, turn.symbol, turn.shared_bytes)
        parameters = (*self._addresses(turn), *(0,) * turn.nulls)
        start = partial(self._device.launch, kernel, turn.grid, turn.threads, turn.shared_bytes)

        def enqueue(stream: int, may_be_early: bool) -> None:
            start(parameters, stream, early=turn.early and may_be_early)

        return _Turn(turn.layer, enqueue)

    def _call(self, turn: LibraryCall, libraries: Mapping[str, Prepare]) -> _Turn:
        device, addresses = self._device, self._addresses(turn)
        with device.current():
            made = libraries[turn.library](turn.settings, device.capability, device.gpu.index)
        self._products.append(made)
        places = [place.size_bytes for place in turn.places]
        if len(places) != len(made.sizes) or any(map(operator.lt, places, made.sizes)):
            raise EngineError(
                f"a call of {turn.library} has other places than its operands",
                [f"expected {made.sizes} bytes, got {places}", turn.settings[:400]],
                "build the engine again on this machine",
            )
        return _Turn(turn.layer, lambda stream, _: made.run(stream, addresses))


def time_us(device: Device, enqueue: Callable[[int], None], rounds: int) -> float:
    """Median time of one run on the GPU in microseconds, as one of many in a graph.

    Many runs follow each other within a graph, so that no gap between starts counts.

    Args:
        device: the GPU.
        enqueue: puts what is timed into a stream; it runs on whatever lies in its memory, which
            must be valid.
        rounds: how often such a graph is replayed.

    Raises:
        UnsupportedError: CUDA refuses it.
    """
    stream = device.stream()
    try:
        enqueue(stream)  # what is loaded at first use is no part of it
        device.wait(stream)
        once = _replayed_us(device, stream, enqueue, 1, 2)
        repeats = min(_MOST_REPEATS, max(1, round(_LEAST_US / max(once, 0.5))))
        return _replayed_us(device, stream, enqueue, repeats, rounds) / repeats
    finally:
        device.drop_stream(stream)


def _replayed_us(
    device: Device, stream: int, work: Callable[[int], None], repeats: int, rounds: int
) -> float:
    """Median time of a graph of so many runs."""

    def fill() -> None:
        for _ in range(repeats):
            work(stream)

    graph = device.capture(stream, fill)
    marks = [device.event(), device.event()]
    try:
        device.replay(graph, stream)
        times = []
        for _ in range(rounds):
            device.record(marks[0], stream)
            device.replay(graph, stream)
            device.record(marks[1], stream)
            device.wait(stream)
            times.append(device.elapsed_us(*marks))
        return median(times)
    finally:
        device.drop_graph(graph)
        for mark in marks:
            device.drop_event(mark)

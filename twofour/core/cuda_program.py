"""The program of a step on a GPU, as plain data: kernels and library calls in order.

It stands in the engine as JSON under the step's symbol. Everything it touches lies in two blocks of
the GPU's memory: the arena, whose contents change with every run, and the weights, which do not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from twofour.core.errors import EngineError
from twofour.core.records import from_plain, to_plain

ARENA, WEIGHTS = "arena", "weights"
"""The two blocks of memory."""
ALIGNMENT = 256
"""Bytes: what every tensor and constant on the GPU begins at a multiple of."""
DTYPES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8e4m3fn": 1,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "int32": 4,
    "int64": 8,
}
"""Types of elements on the GPU, and their bytes. int8 is held as such, nothing is added to it."""
_REBUILD = "build the engine again: twofour build MODEL.onnx -o E.engine --target cuda"


@dataclass(frozen=True)
class Place:
    """A run of bytes.

    Attributes:
        block: "arena" or "weights".
        offset: of its first byte in the block.
        size_bytes: how many of them may be touched.
    """

    block: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Launch:
    """One start of a kernel; its parameters are the addresses of `places`, then two null pointers.

    Attributes:
        code: name of the object, a cubin, in `Engine.code`.
        symbol: of the kernel in it.
        grid: blocks along x, y and z.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        places: what its pointers point to.
        layer: index into `Plan.layers` of what it belongs to.
        nulls: null pointers after the others, 2 for kernels of Triton.
        early: it may be started before the kernel in front of it has ended, for which it waits
            itself.
    """

    code: str
    symbol: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    places: tuple[Place, ...]
    layer: int
    nulls: int = 2
    early: bool = False


@dataclass(frozen=True)
class LibraryCall:
    """One call of a library of NVIDIA.

    Attributes:
        library: "cublaslt" or "cusparselt".
        settings: what is computed and how, JSON, see runtime/cuda/.
        places: what its operands are, in the order that the library's file names them.
        layer: as of `Launch`.
    """

    library: str
    settings: str
    places: tuple[Place, ...]
    layer: int


@dataclass(frozen=True)
class Transfer:
    """A plain tensor that is copied to or from the arena.

    Attributes:
        name: of the tensor.
        place: where its elements lie, in C order and of the tensor's own type.
    """

    name: str
    place: Place


@dataclass(frozen=True)
class CudaProgram:
    """What one step does.

    Attributes:
        launches: kernels, each with its place in the order.
        calls: library calls, likewise.
        order: for each turn the index into `launches`, or -1 - the index into `calls`.
        inputs: copied to the GPU before.
        outputs: copied from it after.
    """

    launches: tuple[Launch, ...]
    calls: tuple[LibraryCall, ...]
    order: tuple[int, ...]
    inputs: tuple[Transfer, ...]
    outputs: tuple[Transfer, ...]

    @staticmethod
    def of(
        turns: list[Launch | LibraryCall],
        inputs: tuple[Transfer, ...],
        outputs: tuple[Transfer, ...],
    ) -> CudaProgram:
        """The program that does these turns in order."""
        launches = [turn for turn in turns if isinstance(turn, Launch)]
        calls = [turn for turn in turns if isinstance(turn, LibraryCall)]
        order, seen = [], [0, 0]
        for turn in turns:
            kind = isinstance(turn, LibraryCall)
            order.append(-1 - seen[1] if kind else seen[0])
            seen[kind] += 1
        return CudaProgram(tuple(launches), tuple(calls), tuple(order), inputs, outputs)

    @property
    def turns(self) -> Iterator[Launch | LibraryCall]:
        """Kernels and library calls in order."""
        for index in self.order:
            yield self.launches[index] if index >= 0 else self.calls[-1 - index]

    def early(self, waiting: Collection[str]) -> CudaProgram:
        """The same, every kernel that waits and stands behind another one started early.

        Args:
            waiting: names of the objects whose kernels wait for those in front of them.
        """
        found: list[Launch | LibraryCall] = []
        for turn in self.turns:
            behind = bool(found) and isinstance(found[-1], Launch)
            if isinstance(turn, Launch):
                turn = replace(turn, early=behind and turn.code in waiting)
            found.append(turn)
        return CudaProgram.of(found, self.inputs, self.outputs)

    def to_bytes(self) -> bytes:
        """JSON, as the engine holds it."""
        plain: dict[str, Any] = to_plain(self)
        return json.dumps(plain, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(content: bytes) -> CudaProgram:
        """The inverse of `to_bytes`.

        Raises:
            EngineError: it is no program.
        """
        try:
            return from_plain(CudaProgram, json.loads(content), "program")
        except (ValueError, RecursionError) as error:
            what = "the engine's program for the GPU is malformed"
            raise EngineError(what, [str(error)], _REBUILD) from error

    def wrong(self, sizes: dict[str, int], layers: int) -> Iterator[str]:
        """What a hostile or damaged program asks for that is not there.

        Args:
            sizes: bytes of the arena and of the weights.
            layers: how many the plan has.
        """
        touched = [place for turn in self.turns_checked() for place in turn.places]
        touched += [transfer.place for transfer in (*self.inputs, *self.outputs)]
        for place in touched:
            end = place.offset + place.size_bytes
            if place.block not in sizes or min(place.offset, place.size_bytes) < 0:
                yield f"{place} is no place"
            elif end > sizes[place.block]:
                yield f"{place} lies outside {place.block}, which has {sizes[place.block]} bytes"
        for turn in self.turns_checked():
            if not 0 <= turn.layer < layers:
                yield f"a call belongs to layer {turn.layer} of {layers}"
        for launch in self.launches:
            well = len(launch.grid) == 3 and min(launch.grid) >= 1 and launch.shared_bytes >= 0
            if not well or not 1 <= launch.threads <= 1024:
                yield f"{launch.symbol} cannot be started so: {launch.grid}, {launch.threads}"
            if not 0 <= launch.nulls <= 4:
                yield f"{launch.symbol} takes {launch.nulls} null pointers"
        yield from self._wrong_order()

    def _wrong_order(self) -> Iterator[str]:
        if sorted(self.order) != list(range(-len(self.calls), len(self.launches))):
            yield "the order of the calls names some twice, or not at all"
            return
        before: Launch | LibraryCall | None = None
        for turn in self.turns:
            if isinstance(turn, Launch) and turn.early and not isinstance(before, Launch):
                yield f"{turn.symbol} is to begin early, but not behind a kernel"
            before = turn

    def turns_checked(self) -> Iterator[Launch | LibraryCall]:
        """Every call, whatever the order says."""
        yield from self.launches
        yield from self.calls

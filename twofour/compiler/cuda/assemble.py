"""Chosen recipes -> program, weights and layers of an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.arena import Life, place, rounded
from twofour.compiler.cuda.choose import Choice, Way
from twofour.compiler.cuda.lower import Stretch, Turn, input_buffer, output_buffer
from twofour.core.cuda_program import (
    ARENA,
    WEIGHTS,
    CudaProgram,
    Launch,
    LibraryCall,
    Place,
    Transfer,
)
from twofour.kernels.cuda.kernel import LibraryKernel, as_bytes

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


@dataclass
class Constants:
    """All constants of an engine in one block; equal ones lie there once."""

    digests: dict[int, tuple[Array, bytes]] = field(default_factory=dict)
    """Arrays that were seen, by identity: large ones are read once, whoever keeps them."""
    _parts: list[Bytes] = field(default_factory=list)
    _known: dict[bytes, Place] = field(default_factory=dict)
    _size: int = 0

    def keep(self, array: Array) -> Place:
        """Where an array lies."""
        content = as_bytes(array)
        digest = self._digest(array, content)
        if digest not in self._known:
            self._known[digest] = Place(WEIGHTS, self._size, content.size)
            self._parts.append(content)
            self._size += rounded(content.size)
        return self._known[digest]

    @property
    def contents(self) -> tuple[bytes, ...]:
        """What tells one block from another."""
        return tuple(self._known)

    def block(self) -> Bytes:
        """All of them."""
        found = np.zeros(self._size, np.uint8)
        for where, content in zip(self._known.values(), self._parts, strict=True):
            found[where.offset : where.offset + where.size_bytes] = content
        return found

    def _digest(self, array: Array, content: Bytes) -> bytes:
        seen = self.digests.get(id(array))
        if seen is None:
            digest = hashlib.sha256(content.data).digest() + str(content.size).encode()
            seen = self.digests[id(array)] = (array, digest)
        return seen[1]


def program_of(
    stretch: Stretch, choices: Sequence[Choice], first: int, constants: Constants
) -> tuple[CudaProgram, dict[str, int], int]:
    """The program of a step, the offset of each buffer, and the bytes of the arena it needs.

    Args:
        stretch: what it computes.
        choices: for each turn.
        first: index of the first turn's layer.
        constants: of the engine.
    """
    lives = lives_of(stretch, [choice.way for choice in choices])
    offsets, size = place(lives)
    calls: list[Launch | LibraryCall] = []
    for index, (turn, choice) in enumerate(zip(stretch.turns, choices, strict=True)):
        prefix = scratch_buffer(index)
        places = places_of(turn, choice.way, offsets, prefix, constants)
        calls += calls_of(choice.way, places, first + index)

    def transfers(names: Sequence[str], buffer: Any) -> tuple[Transfer, ...]:
        return tuple(
            Transfer(name, Place(ARENA, offsets[buffer(name)], lives[buffer(name)].size_bytes))
            for name in names
        )

    ends = transfers(stretch.inputs, input_buffer), transfers(stretch.outputs, output_buffer)
    return CudaProgram.of(calls, *ends), offsets, size


def scratch_buffer(index: int) -> str:
    """What the names of a turn's scratch buffers begin with."""
    return f"scratch:{index}:"


def lives_of(stretch: Stretch, ways: Sequence[Way]) -> dict[str, Life]:
    """When each buffer is in use; those of the host from before the first turn, or to the end."""
    sizes: dict[str, int] = {}
    spans: dict[str, tuple[int, int]] = {}

    def touch(name: str, size: int, index: int) -> None:
        sizes[name] = max(sizes.get(name, 0), size)
        first, last = spans.get(name, (index, index))
        spans[name] = min(first, index), max(last, index)

    for index, (turn, way) in enumerate(zip(stretch.turns, ways, strict=True)):
        for tensor in turn.operands.values():
            touch(tensor.buffer, tensor.offset_bytes + tensor.span_bytes, index)
        for role, size in way.recipe.scratch.items():
            touch(scratch_buffer(index) + role, size, index)
    for name in stretch.inputs:
        touch(input_buffer(name), 0, -1)
    for name in stretch.outputs:
        touch(output_buffer(name), 0, len(stretch.turns))
    return {name: Life(sizes[name], *spans[name]) for name in sizes}


def places_of(
    turn: Turn, way: Way, offsets: Mapping[str, int], prefix: str, constants: Constants
) -> dict[str, Place]:
    """Where each role of a turn lies."""
    found = {
        role: Place(ARENA, offsets[t.buffer] + t.offset_bytes, t.span_bytes)
        for role, t in turn.operands.items()
    }
    recipe = way.recipe
    found |= {
        role: Place(ARENA, offsets[prefix + role], size) for role, size in recipe.scratch.items()
    }
    wanted = {role for call in recipe.calls for role in call.roles} - set(found)
    for role in sorted(wanted):
        array = recipe.constants[role] if role in recipe.constants else turn.constants[role]
        found[role] = constants.keep(array)
    return found


def calls_of(way: Way, places: Mapping[str, Place], layer: int) -> list[Launch | LibraryCall]:
    """A turn's kernels and library calls."""
    found: list[Launch | LibraryCall] = []
    for call, code in zip(way.recipe.calls, way.code, strict=True):
        where = tuple(places[role] for role in call.roles)
        if isinstance(call, LibraryKernel):
            found.append(LibraryCall(call.library, call.settings, where, layer))
            continue
        assert code is not None
        found.append(
            Launch(
                code.name,
                code.symbol,
                call.grid,
                code.threads,
                code.shared_bytes,
                where,
                layer,
                code.nulls,
            )
        )
    return found


def code_of(ways: Sequence[Way]) -> dict[str, Bytes]:
    """The objects of an engine by name."""
    return {
        code.name: np.frombuffer(code.cubin, np.uint8)
        for way in ways
        for code in way.code
        if code is not None
    }

"""What a tactic of a plugin makes, as kernels with their tables of pointers.

A tactic that is not `strided` gets all operands in C order. What lies otherwise is copied: a kernel
before those of the tactic for each input, one behind for each output, through the workspace.

    operand i          where the placed operator has it
    workspace          of all kernels together: copies, then the tactic's own
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.layout import ALIGNMENT
from twofour.core.plugins import Code, CpuTactic, Operand, Problem, Stage, c_strides
from twofour.core.target import Target
from twofour.kernels.cpu.llvm import Source
from twofour.kernels.cpu.nd import Nest, Ref, emit_nd, nd_pieces
from twofour.kernels.cpu.nd_scalar import BYTES
from twofour.kernels.cpu.program import Call
from twofour.kernels.cpu.program import Operand as Place

COPY = "copy"
"""How the name of a kernel begins that only changes how an operand lies."""


@dataclass(frozen=True)
class Entry:
    """An entry of a table of pointers.

    Attributes:
        operand: its index in `Problem.operands`; None for the workspace.
        offset: bytes behind the begin of either.
    """

    operand: int | None
    offset: int = 0


@dataclass(frozen=True)
class Part:
    """One kernel of a tactic, or a copy for it."""

    stage: Stage
    table: tuple[Entry, ...]

    @property
    def source(self) -> Source:
        """Its code."""
        return Source(self.stage.text, self.stage.vectorize)


@dataclass(frozen=True)
class Planned:
    """All kernels of a candidate, in order.

    Attributes:
        tactic: the tactic.
        config: its configuration.
        parts: its kernels.
        constants: what its own kernels read beside their operands.
        workspace_bytes: of all together.
        unread: operands that none of them reads.
        precision: of its products; "" for that of its first result.
    """

    tactic: CpuTactic
    config: str
    parts: tuple[Part, ...]
    constants: NDArray[np.uint8]
    workspace_bytes: int
    unread: tuple[int, ...] = ()
    precision: str = ""

    def calls(
        self, symbols: Sequence[str], place: Callable[[Entry], Place], constants: Place
    ) -> list[Call]:
        """The calls of its kernels.

        Args:
            symbols: of the parts.
            place: where an entry lies.
            constants: where its constants lie.
        """
        return [
            Call(
                symbol,
                place(part.table[0]),
                constants,
                place(part.table[-1]),
                place(part.table[-1]),
                part.stage.pieces,
                1,
                tuple(map(place, part.table)),
            )
            for symbol, part in zip(symbols, self.parts, strict=True)
        ]


def plan_code(tactic: CpuTactic, problem: Problem, target: Target, config: str) -> Planned:
    """The kernels of a tactic for operands as they lie.

    Args:
        tactic: takes the problem.
        problem: operands with their strides.
        target: to build for.
        config: one of the tactic's.
    """
    before: list[Part] = []
    after: list[Part] = []
    entries, given = [], []
    room, inputs = 0, len(problem.operands) - len(problem.outputs)
    for index, operand in enumerate(problem.operands):
        plain = _in_order(operand)
        entries.append(Entry(index))
        given.append(operand if tactic.strided else plain)
        if not tactic.strided and plain != operand:
            entries[-1] = Entry(None, room)
            room += _aligned(_size_bytes(plain))
            if index < inputs:
                before.append(_copy(operand, plain, Entry(index), entries[-1]))
            else:
                after.append(_copy(plain, operand, entries[-1], Entry(index)))
    code: Code = tactic.emit(_with(problem, given), target, config)
    table = (*entries, Entry(None, room))
    parts = (*before, *(Part(stage, table) for stage in code.stages), *after)
    copied = {entry.operand for part in (*before, *after) for entry in part.table}
    unread = tuple(index for index in code.unread if index not in copied)
    whole = room + code.workspace_bytes
    return Planned(tactic, config, parts, code.constants, whole, unread, code.precision)


def _in_order(operand: Operand) -> Operand:
    """The operand in C order, int8 as such."""
    return replace(operand, strides=c_strides(operand.shape, operand.dtype), biased=False)


def _with(problem: Problem, operands: Sequence[Operand]) -> Problem:
    """The problem with other operands in the place of its own."""
    rest = iter(operands)
    inputs = tuple(None if each is None else next(rest) for each in problem.inputs)
    return replace(problem, inputs=inputs, outputs=tuple(rest))


def _copy(x: Operand, y: Operand, source: Entry, into: Entry) -> Part:
    """A kernel that writes x to y, which lies otherwise."""
    dims, refs = x.shape, [Ref(i, _stored(each), each.strides) for i, each in enumerate((x, y))]
    if refs[0].kind not in BYTES:  # a type that small operators do not know moves as bytes
        dims = (*dims, element_bytes(x.dtype))
        refs = [Ref(i, "uint8", (*each.strides, 1)) for i, each in enumerate((x, y))]
    nest = Nest("copy", dims, refs[1], (refs[0],))
    stage = Stage(
        emit_nd("kernel", (nest,), 2), nd_pieces((nest,)), f"{COPY} {x.name}", vectorize=True
    )
    return Part(stage, (source, into))


def _stored(operand: Operand) -> str:
    """The type of its elements as small operators call it."""
    return "s8" if operand.biased else operand.dtype


def element_bytes(dtype: str) -> int:
    """Of one element."""
    return c_strides((1,), dtype)[0]


def _size_bytes(operand: Operand) -> int:
    return math.prod(operand.shape) * element_bytes(operand.dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

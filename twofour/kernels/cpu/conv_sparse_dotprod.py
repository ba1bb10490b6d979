"""2:4 convolution and matrix product on AArch64: `tbl` gathers, `sdot` multiplies.

Of 8 consecutive inputs a channel keeps 4. A register holds 16 inputs of a position, so two `tbl`
give four channels the bytes they keep of it, for two `sdot` where the dense kernel has four. Both
run on the same two pipes of most cores: picking for each channel by itself takes as many
instructions as it saves. It pays where channels share what is picked:

    tbl     each channel by itself: 2 tbl + 2 sdot for 4 sdot: as long as dense; fewer bytes
    pair    channels n and n + 16 share a mask: 2 tbl + 4 sdot for 8 sdot: 1.33x
    quad    channels 4 j to 4 j + 3, the lanes of a register, share a mask: the picked bytes are the
            same for all lanes, so one tbl serves 8 channels, by element: 1 tbl + 4 sdot for 8: 1.6x

Layout of a panel, two steps of 8 inputs a group, and how it is read back; `index` counts bytes of
the 16:

    tbl     for block: for lane in 16: for j in 4: byte = index(step 0, j) | index(step 1, j) << 4
    pair    for step in 2: for every second block: for lane in 16: for j in 4: byte = index(step, j)
    quad    for block: for half in 2: for quarter in 2: for step in 2: for j in 4:
                byte = index(step, j) of the channels 8 half + 4 quarter to 8 half + 4 quarter + 3
    all     for step in 2: for block in blocks:
                for lane in 16: for j in 4: w[block, lane][run][8 step + index(step, j) % 8]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.patterns import why_not
from twofour.kernels.cpu import neon
from twofour.kernels.cpu.conv_dense_dotprod import DOTPROD
from twofour.kernels.cpu.conv_sparse import compress, refuse_pair
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import LANES, ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights
from twofour.kernels.cpu.vector import Vector

_LOW = "<" + ", ".join(["i8 15"] * 16) + ">"
_FOUR = "<" + ", ".join(["i8 4"] * 16) + ">"
_QUAD = 4


@dataclass(frozen=True)
class Picked:
    """Formats tbl and pair: each lane has the bytes that its channel keeps.

    Attributes:
        share: blocks that share their indices, 1 (tbl: two indices a byte) or 2 (pair).
    """

    share: int = 1
    k_per_step: int = 8
    steps_per_group: int = 2
    overlaps: bool = False

    @property
    def name(self) -> str:
        """As reports show it."""
        return "2:4 tbl" if self.share == 1 else "2:4 pair tbl"

    def _index_bytes(self, blocks: int, steps: int) -> int:
        return 64 * blocks if self.share == 1 else 64 * (blocks // self.share) * steps

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of `steps` steps of a panel."""
        return self._index_bytes(blocks, steps) + 64 * steps * blocks

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps <= 2, 8] to [panels, group_bytes]."""
        index, values = compress(w, self.share)
        index = index + np.uint8(8) * np.arange(w.shape[3], dtype=np.uint8)[:, None]
        if self.share == 1:
            meta = index[..., 0, :].copy()
            if w.shape[3] == 2:
                meta |= index[..., 1, :] << 4
        else:
            meta = np.ascontiguousarray(index.transpose(0, 3, 1, 2, 4))
        kept = values.transpose(0, 3, 1, 2, 4).reshape(w.shape[0], -1).view(np.uint8)
        return np.concatenate([meta.reshape(w.shape[0], -1), kept], axis=1)

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """sums[row, block] += x[row][index[block, step]] . values[block, step]."""
        f, blocks = v.f, len(sums) // len(rows)
        tables = [neon.flipped(f, f.load(neon.BYTES, x, offset)) for offset in rows]
        parts = [neon.quarters(f, total) for total in sums]
        values = self._index_bytes(blocks, steps)
        for first in range(0, blocks, self.share):
            for q in range(neon.QUARTERS):
                for step, index in enumerate(self._indices(f, w, (first, q, blocks), steps)):
                    weights = [
                        f.load(neon.BYTES, w, values + 64 * (step * blocks + block) + 16 * q, 16)
                        for block in range(first, first + self.share)
                    ]
                    for row, table in enumerate(tables):
                        inputs = neon.pick(f, table, index)
                        for block, kept in enumerate(weights, first):
                            own = parts[row * blocks + block]
                            own[q] = neon.sdot(f, own[q], inputs, kept)
        return [neon.joined(f, own) for own in parts]

    def _indices(self, f: Function, w: Value, at: tuple[int, int, int], steps: int) -> list[Value]:
        """Of each step, for a quarter of a block; `at`: block, quarter and number of blocks."""
        block, q, blocks = at
        if self.share > 1:
            shared = blocks // self.share
            places = [64 * (step * shared + block // self.share) + 16 * q for step in range(steps)]
            return [f.load(neon.BYTES, w, place, 16) for place in places]
        both = f.load(neon.BYTES, w, 64 * block + 16 * q, 16)
        low = f.let(f"and {neon.BYTES} {both}, {_LOW}")
        return [low, f.let(f"lshr {neon.BYTES} {both}, {_FOUR}")][:steps]


@dataclass(frozen=True)
class Quads:
    """Format quad: the four lanes of a register share the bytes they keep."""

    name: str = "2:4 quad tbl"
    k_per_step: int = 8
    steps_per_group: int = 2
    overlaps: bool = False

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of `steps` steps of a panel; the indices are those of two steps in any case."""
        return 32 * blocks + 64 * steps * blocks

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps <= 2, 8] to [panels, group_bytes]."""
        panels, blocks, _, steps, _ = w.shape
        fours = w.reshape(panels, blocks * LANES // _QUAD, _QUAD, steps, 8).swapaxes(1, 2)
        index, values = compress(fours.reshape(panels, _QUAD, -1, steps, 8), _QUAD)
        index = index[:, 0] + np.uint8(8) * np.arange(steps, dtype=np.uint8)[:, None]
        meta = np.zeros((panels, blocks * LANES // _QUAD, 2, 4), np.uint8)
        meta[:, :, :steps] = index
        kept = values.swapaxes(1, 2).reshape(panels, blocks, LANES, steps, 4)
        kept = np.ascontiguousarray(kept.transpose(0, 3, 1, 2, 4)).reshape(panels, -1)
        return np.concatenate([meta.reshape(panels, -1), kept.view(np.uint8)], axis=1)

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """sums[row, block] += x[row][index[block, step]] . values[block, step]."""
        f, blocks = v.f, len(sums) // len(rows)
        tables = [neon.flipped(f, f.load(neon.BYTES, x, offset)) for offset in rows]
        parts = [neon.quarters(f, total) for total in sums]
        for block in range(blocks):
            for half in range(2):
                index = f.load(neon.BYTES, w, 32 * block + 16 * half, 16)
                picked = [neon.pick(f, table, index) for table in tables]
                for within in range(2):
                    q = 2 * half + within
                    for step in range(steps):
                        place = 32 * blocks + 64 * (step * blocks + block) + 16 * q
                        weights = f.load(neon.BYTES, w, place, 16)
                        for row, inputs in enumerate(picked):
                            own = parts[row * blocks + block]
                            one = neon.element(f, inputs, 2 * within + step)
                            own[q] = neon.sdot(f, own[q], weights, one)
        return [neon.joined(f, own) for own in parts]


def _refuse_free(problem: ConvProblem, w: Weights, isa: str) -> str:
    return (why_not(w, "2:4") or "") if why_not(w, "4:8") else ""


def _refuse_quad(problem: ConvProblem, w: Weights, isa: str) -> str:
    if problem.n % _QUAD:
        return f"needs whole groups of {_QUAD} output channels: this layer has {problem.n}"
    union = (w != 0).reshape(-1, _QUAD, *w.shape[1:]).any(1)
    found = why_not(union, "2:4")
    text = f"{_QUAD} neighbouring output channels must share a mask; of such unions, {found}"
    return text if found else ""


TACTICS = (
    Tactic(
        "2:4 tbl",
        "int8",
        "2:4",
        Tiled(Picked(1), centre=neon.CENTRE),
        _refuse_free,
        lambda p, isa: tiles_for(p, isa, blocks=(1,), count=2, spare=3),
        only=DOTPROD,
    ),
    Tactic(
        "2:4 pair tbl",
        "int8",
        "2:4/pair",
        Tiled(Picked(2), centre=neon.CENTRE),
        refuse_pair,
        lambda p, isa: tiles_for(p, isa, blocks=(2,), count=2, spare=2),
        only=DOTPROD,
    ),
    Tactic(
        "2:4 quad tbl",
        "int8",
        "2:4",
        Tiled(Quads(), centre=neon.CENTRE),
        _refuse_quad,
        lambda p, isa: tiles_for(p, isa, blocks=(1,), count=2, spare=2),
        only=DOTPROD,
    ),
)

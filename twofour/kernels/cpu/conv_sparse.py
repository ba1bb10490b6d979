"""2:4 convolution and matrix product on integers: one shuffle and one dot product per 8 inputs.

Of 8 consecutive inputs a channel keeps 4. Per position and 8 inputs: broadcast the 8 bytes to every
lane, `vpshufb` with the channels' indices picks each lane's 4, one `vpdpbusd` with 64 kept weights.
The shuffle shares one of three ports with the dot product, so half the products at 4/3 the price:
up to 1.5x dense. Indices and weights are held in registers for every position of the tile. Three
formats of the indices (docs/architecture.md has measured sizes):

    H     one byte holds the 4-bit indices of two steps: 0.75x the dense bytes. Takes 4:8 as well.
    C     one byte holds the 2-bit indices of four steps: 0.625x. Strictly 2:4.
    pair  as H, but channels n and n + 16 share their indices: one shuffle feeds two dot products,
          up to 2x dense.

Layout of a panel in format H (two steps a group), and how it is read back:

    for run in runs: for group in groups:
        for block in blocks:                                        # pair: for every second block
            for lane in 16: for j in 4: byte = index(step 0, j) | index(step 1, j) << 4
        for step in 2: for block in blocks:
            for lane in 16: for j in 4: w[block, lane][run][8 step + index(step, j)]

In bfloat16 a channel keeps 2 of 4 inputs of two bytes, so its indices are 2 i, 2 i + 1, 2 j and
2 j + 1, and all else is the same (conv_sparse_bf16.py).

Source: the index trick (vpshufb ignores bits 4-6 of an index) is measured in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.patterns import PAIR_BLOCK, why_not
from twofour.kernels.cpu.llvm import Value
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ELEMENT_BYTES, ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import WIDE, Tactic, Weights
from twofour.kernels.cpu.vector import I32S, Vector, every

_KEPT = 4  # bytes of 8 consecutive ones
_FEW = 8  # positions that share indices: more of them, and reading indices is not what takes time


def compress(w: NDArray[Any], share: int = 1) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """The kept half of the inputs in each 8 bytes.

    Args:
        w: [panels, blocks, 16, ..., 8] int8 or [..., 4] uint16, bits of bfloat16; at most half of
            the last axis nonzero (jointly over `share` blocks).
        share: neighbouring blocks that share their indices, 1 or 2.

    Returns:
        indices of bytes, uint8 [panels, blocks / share, 16, ..., 4]; values [panels, blocks, 16,
        ..., 4 or 2].

    Raises:
        ValueError: more than half are nonzero.
    """
    width = w.shape[-1]
    grouped = w.reshape(w.shape[0], w.shape[1] // share, share, *w.shape[2:])
    used = (grouped != 0).any(axis=2)
    if (used.sum(-1) > width // 2).any():
        raise ValueError(f"more than {width // 2} of {width} consecutive weights are nonzero")
    index = _first_kept(used)
    spread = np.broadcast_to(index[:, :, None], (*grouped.shape[:-1], width // 2))
    values = np.take_along_axis(grouped, spread, axis=-1)
    size = w.itemsize
    in_bytes = (index[..., None] * size + np.arange(size)).reshape(*index.shape[:-1], _KEPT)
    return in_bytes.astype(np.uint8), values.reshape(*w.shape[:-1], width // 2)


def _first_kept(used: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Positions of the nonzeros, filled up with positions of zeros.

    Of 8, two are taken from each half where two fit, as format C needs.
    """
    codes = np.packbits(used, axis=-1, bitorder="little")[..., 0]
    present = np.flatnonzero(np.bincount(codes.reshape(-1), minlength=256)).tolist()
    parts = [_places(code, first, first + 4) for code in present for first in (0, 4)]
    by_halves = all(len(part) <= _KEPT // 2 for part in parts)
    return _kept_table(by_halves)[codes][..., : used.shape[-1] // 2]


def _places(code: int, first: int, end: int) -> list[int]:
    """Which of the bits first ... end - 1 are set."""
    return [bit for bit in range(first, end) if code >> bit & 1]


@cache
def _kept_table(by_halves: bool) -> NDArray[np.intp]:
    """[256, 4]: for each set of nonzeros, as bits, the positions that are kept."""
    rows = []
    for code in range(256):
        parts = [(0, 4, 2), (4, 8, 2)] if by_halves else [(0, 8, _KEPT)]
        row: list[int] = []
        for first, end, count in parts:
            used = _places(code, first, end)
            row += sorted([*used, *_places(~code, first, end)][:count])
        rows.append(row)
    return np.array(rows, np.intp)


@dataclass(frozen=True)
class Sparse:
    """Formats H and pair.

    Attributes:
        share: blocks that share indices: 1 (H) or 2 (pair).
        dtype: of the inputs, "int8" or "bfloat16".
    """

    share: int = 1
    dtype: str = "int8"
    steps_per_group: int = 2
    overlaps: bool = False

    @property
    def k_per_step(self) -> int:
        """Inputs in 8 bytes."""
        return 8 // ELEMENT_BYTES[self.dtype]

    @property
    def name(self) -> str:
        """As reports show it."""
        return "2:4 H" if self.share == 1 else "2:4 pair"

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of `steps` steps of a panel."""
        return 64 * (blocks // self.share + steps * blocks)

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps <= 2, k_per_step] to [panels, group_bytes]."""
        index, values = compress(w, self.share)
        meta = index[..., 0, :].copy()
        if w.shape[3] == 2:
            meta |= index[..., 1, :] << 4
        kept = values.transpose(0, 3, 1, 2, 4).reshape(w.shape[0], -1).view(np.uint8)
        return np.concatenate([meta.reshape(w.shape[0], -1), kept], axis=1)

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """sums[row, block] += x[row, step][index[block, step]] . values[block, step]."""
        blocks = len(sums) // len(rows)
        shared = blocks // self.share
        metas = [v.f.load(I32S, w, 64 * block, 64) for block in range(shared)]
        picks = [metas, [v.shift_right_words(meta, 4) for meta in metas] if steps == 2 else []]
        return _steps(v, self.dtype, rows, (x, w, 64 * shared), sums, picks[:steps])


@dataclass(frozen=True)
class SparseCompact:
    """Format C: less memory, one more instruction a step; for few positions."""

    name: str = "2:4 C"
    k_per_step: int = 8
    steps_per_group: int = 4
    overlaps: bool = False

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of `steps` steps of a panel."""
        return 64 * (blocks + steps * blocks)

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps <= 4, 8] to [panels, group_bytes]; strictly 2:4."""
        index, values = compress(w)
        meta = np.zeros(index[..., 0, :].shape, np.uint8)
        for step in range(w.shape[3]):
            meta |= (index[..., step, :] & 3) << (2 * step)
        kept = values.transpose(0, 3, 1, 2, 4).reshape(w.shape[0], -1).view(np.uint8)
        return np.concatenate([meta.reshape(w.shape[0], -1), kept], axis=1)

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """As format H; index = field & 3, plus 4 for the two bytes of the second half."""
        f, blocks = v.f, len(sums) // len(rows)
        metas = [f.load(I32S, w, 64 * block, 64) for block in range(blocks)]
        picks = []
        for step in range(steps):
            fields = [
                f.let(
                    f"and {I32S} {v.shift_right_words(m, 2 * step) if step else m}, "
                    f"{every('i32', 0x03030303)}"
                )
                for m in metas
            ]
            picks.append(
                [f.let(f"or {I32S} {field}, {every('i32', 0x04040000)}") for field in fields]
            )
        return _steps(v, "int8", rows, (x, w, 64 * blocks), sums, picks)


def _steps(
    v: Vector,
    dtype: str,
    rows: Sequence[int],
    at: tuple[Value, Value, int],
    sums: list[Value],
    picks: list[list[Value]],
) -> list[Value]:
    """The steps of a group.

    Args:
        v: emits the operations.
        dtype: of the inputs.
        rows: the positions, as byte offsets from the group's first input.
        at: pointers to that input and to the group's weights, and the offset of its values.
        sums: before the group.
        picks: `picks[step][block // share]` are its indices.

    Returns:
        The sums after the group.
    """
    (x, w, kept), blocks = at, len(sums) // len(rows)
    sums = list(sums)
    for step, indices in enumerate(picks):
        weights = [v.f.load(I32S, w, kept + 64 * (step * blocks + b), 64) for b in range(blocks)]
        for row, offset in enumerate(rows):
            eight = v.broadcast8(x, offset + 8 * step)
            here = slice(row * blocks, (row + 1) * blocks)
            sums[here] = _position(v, dtype, (eight, indices, weights), sums[here])
    return sums


def _position(
    v: Vector, dtype: str, step: tuple[Value, list[Value], list[Value]], sums: list[Value]
) -> list[Value]:
    """The sums of one position after a step of (8 bytes of inputs, indices, weights).

    Neighbouring blocks may share an index.
    """
    eight, indices, weights = step
    share = len(weights) // len(indices)
    after = []
    for group, index in enumerate(indices):
        inputs = v.select_bytes(eight, index)
        for block in range(group * share, (group + 1) * share):
            after.append(v.dot(dtype, sums[block], inputs, weights[block]))
    return after


def _refuse_free(problem: ConvProblem, w: Weights, isa: str) -> str:
    if not why_not(w, "4:8"):
        return ""
    return why_not(w, "2:4") or ""


def _refuse_compact(problem: ConvProblem, w: Weights, isa: str) -> str:
    return why_not(w, "2:4") or ""


def refuse_pair(problem: ConvProblem, w: Weights, isa: str) -> str:
    """Why the channels of a problem form no pairs; "" if they do."""
    if problem.n % PAIR_BLOCK:
        # The pattern leaves the channels of a last incomplete block of 32 unpaired.
        return f"needs whole blocks of {PAIR_BLOCK} output channels: this layer has {problem.n}"
    return why_not(w, "2:4/pair") or ""


TACTICS = (
    Tactic(
        "2:4 H",
        "int8",
        "2:4",
        Tiled(Sparse(1)),
        _refuse_free,
        lambda p, isa: tiles_for(p, isa, blocks=(1,), count=2),
        only=WIDE,
    ),
    Tactic(
        "2:4 C",
        "int8",
        "2:4",
        Tiled(SparseCompact()),
        _refuse_compact,
        lambda p, isa: tiles_for(p, isa, blocks=(1,), count=1, spare=2),
        most_positions=_FEW,
        only=WIDE,
    ),
    Tactic(
        "2:4 pair",
        "int8",
        "2:4/pair",
        Tiled(Sparse(2)),
        refuse_pair,
        lambda p, isa: tiles_for(p, isa, blocks=(2,), count=2),
        only=WIDE,
    ),
)

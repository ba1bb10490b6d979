"""2:4 float32 convolution and matrix product: one permute and one multiply-add per 2 inputs.

Takes 4:8 as well: a step keeps 8 of 16 inputs, wherever they lie.

A step takes 16 inputs of a position, of which each channel keeps 8. `vpermps` (AVX-512 only) picks
one kept input for every lane by 4-bit index (it ignores the higher bits, so eight indices sit in
one register and are shifted into place), then a fused multiply-add with 16 kept weights: 8 permutes
and 8 multiply-adds instead of 16 multiply-adds. Layout:

    for run in runs: for step in steps: for block in blocks:
        for lane in 16: u32 = sum over j in 8 of index(j) << 4 j
        for j in 8: for lane in 16: w[block, lane][run][16 step + index(j)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.patterns import why_not
from twofour.kernels.cpu.llvm import Value
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights
from twofour.kernels.cpu.vector import F32S, I32S, Vector

_KEPT = 8  # of 16 consecutive inputs


@dataclass(frozen=True)
class SparseFloat:
    """576 bytes a step of 16 inputs and block, instead of 1024."""

    name: str = "2:4"
    k_per_step: int = 16
    steps_per_group: int = 1
    overlaps: bool = False

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of `steps` steps of a panel."""
        return steps * blocks * 64 * (1 + _KEPT)

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, 1, 16] to [panels, group_bytes].

        Where fewer than 8 are nonzero, the rest is the first of them times zero: an input of this
        channel, never one beyond the run, where the bytes of a NaN may lie.

        Raises:
            ValueError: more than 8 of 16 are nonzero.
        """
        used = w[:, :, :, 0] != 0
        if (used.sum(-1) > _KEPT).any():
            raise ValueError("more than 8 of 16 consecutive weights are nonzero")
        index = np.argsort(~used, axis=-1, kind="stable")[..., :_KEPT]
        kept = np.take_along_axis(used, index, axis=-1)
        first = np.where(kept[..., :1], index[..., :1], 0)
        values = np.where(kept, np.take_along_axis(w[:, :, :, 0], index, axis=-1), np.float32(0))
        index = np.where(kept, index, first)
        meta = (index.astype(np.uint32) << (4 * np.arange(_KEPT, dtype=np.uint32))).sum(
            -1, dtype=np.uint32
        )
        both = np.concatenate(
            [meta[:, :, None].view(np.float32), values.transpose(0, 1, 3, 2)], axis=2
        )
        return np.ascontiguousarray(both.reshape(w.shape[0], -1)).view(np.uint8)

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """sums[row, block] += sum over j of x[row, index[block, j]] * values[block, j]."""
        blocks = len(sums) // len(rows)
        sums = list(sums)
        for block in range(blocks):
            base = block * 64 * (1 + _KEPT)
            meta = v.f.load(I32S, w, base, 64)
            for j in range(_KEPT):
                index = v.shift_right(meta, 4 * j)
                weights = v.f.load(F32S, w, base + 64 * (1 + j), 64)
                # Without this LLVM keeps every position's inputs in registers across j and spills
                # the sums.
                v.f.do('fence syncscope("singlethread") seq_cst')
                for row, offset in enumerate(rows):
                    at = row * blocks + block
                    picked = v.select_floats(v.f.load(F32S, x, offset), index)
                    sums[at] = v.fma(sums[at], picked, weights)
        return sums


def _refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    if isa != "avx512vnni":
        return f"needs AVX-512: picking one of 16 floats a lane has no instruction on {isa}"
    if not why_not(w, "4:8"):
        return ""
    return why_not(w, "2:4") or ""


TACTICS = (
    Tactic(
        "2:4",
        "float32",
        "2:4",
        Tiled(SparseFloat()),
        _refuse,
        lambda p, isa: tiles_for(p, isa, blocks=(1, 2), count=2, spare=6),
    ),
)

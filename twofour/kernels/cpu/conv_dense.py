"""Dense integer convolution and matrix product: one broadcast and one dot product per 4 inputs.

Lanes are 16 output channels; a tile is up to 28 positions by 1 block of channels, or 14 by 2. Per
position and 4 inputs: broadcast the 4 activation bytes to every lane (a load, free beside
arithmetic), `vpdpbusd` with 64 weight bytes: at the machine's peak where K is long. In bfloat16 the
4 bytes are 2 inputs (conv_dense_bf16.py). Layout of a panel:

    for run in runs: for step in steps:
        for block in blocks: for lane in 16: for k in 4: w[block, lane][run][4 step + k]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.kernels.cpu.llvm import Value
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ELEMENT_BYTES, ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import WIDE, Tactic, Weights
from twofour.kernels.cpu.vector import I32S, Vector


@dataclass(frozen=True)
class Dense:
    """64 bytes a step and block: 4 bytes of consecutive inputs of 16 channels.

    Attributes:
        dtype: of the inputs, "int8" or "bfloat16".
    """

    dtype: str = "int8"
    name: str = "dense"
    steps_per_group: int = 4

    @property
    def k_per_step(self) -> int:
        """Inputs in 4 bytes."""
        return 4 // ELEMENT_BYTES[self.dtype]

    @property
    def overlaps(self) -> bool:
        """What lies beyond a run may be a NaN, if it is read as a float."""
        return self.dtype != "int8"

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of `steps` steps of a panel."""
        return steps * blocks * 64

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps, k_per_step] to [panels, steps * blocks * 64]."""
        return w.transpose(0, 3, 1, 2, 4).reshape(w.shape[0], -1).view(np.uint8)

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """sums[row, block] += x[row, the step's inputs] . w[block, step]."""
        blocks = len(sums) // len(rows)
        sums = list(sums)
        for step in range(steps):
            weights = [
                v.f.load(I32S, w, (step * blocks + block) * 64, 64) for block in range(blocks)
            ]
            for row, offset in enumerate(rows):
                inputs = v.broadcast4(x, offset + 4 * step)
                for block in range(blocks):
                    at = row * blocks + block
                    sums[at] = v.dot(self.dtype, sums[at], inputs, weights[block])
        return sums


def _refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    return ""


TACTICS = (
    Tactic(
        "dense",
        "int8",
        "",
        Tiled(Dense()),
        _refuse,
        lambda p, isa: tiles_for(p, isa, blocks=(1, 2), count=2),
        only=WIDE,
    ),
)

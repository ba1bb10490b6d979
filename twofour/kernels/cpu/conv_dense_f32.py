"""Dense float32 convolution and matrix product: one fused multiply-add per input.

Lanes are 16 output channels. The activation comes from memory, an operand broadcast inside the
multiply-add, so a step of a tile is one weight load and one instruction a position. Layout of a
panel:

    for run in runs: for k in run: for block in blocks: for lane in 16: w[block, lane][run][k]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.kernels.cpu.llvm import Value
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights
from twofour.kernels.cpu.vector import F32S, Vector


@dataclass(frozen=True)
class DenseFloat:
    """64 bytes an input and block: the weights of 16 channels."""

    name: str = "dense"
    k_per_step: int = 1
    steps_per_group: int = 8
    overlaps: bool = False

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of `steps` steps of a panel."""
        return steps * blocks * 64

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps, 1] to [panels, steps * blocks * 64]."""
        return np.ascontiguousarray(w.transpose(0, 3, 1, 2, 4).reshape(w.shape[0], -1)).view(
            np.uint8
        )

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """sums[row, block] += x[row, step] * w[block, step]."""
        blocks = len(sums) // len(rows)
        sums = list(sums)
        for step in range(steps):
            weights = [
                v.f.load(F32S, w, (step * blocks + block) * 64, 64) for block in range(blocks)
            ]
            for row, offset in enumerate(rows):
                inputs = v.f.splat("float", v.f.load("float", x, offset + 4 * step))
                for block in range(blocks):
                    at = row * blocks + block
                    sums[at] = v.fma(sums[at], inputs, weights[block])
        return sums


def _refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    return ""


TACTICS = (
    Tactic(
        "dense",
        "float32",
        "",
        Tiled(DenseFloat()),
        _refuse,
        lambda p, isa: tiles_for(p, isa, blocks=(1, 2), count=2),
    ),
)

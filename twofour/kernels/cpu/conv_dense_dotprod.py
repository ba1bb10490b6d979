"""Dense integer convolution and matrix product on AArch64 with dot products: `sdot` by element.

Lanes are output channels, 16 of them four registers. 16 inputs of a position are one register; the
weights of a step of 4 inputs are multiplied by one of its elements, which `sdot` repeats for its
four lanes by itself:

    per position and 16 inputs    one load, one flip of the highest bits (neon.py)
    per step and 4 channels       one load of weights, and one `sdot` for each position

so 32 of 33 instructions that compute are products, where a tile has two blocks. Weights are laid
out as those of conv_dense.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twofour.kernels.cpu import neon
from twofour.kernels.cpu.conv_dense import Dense
from twofour.kernels.cpu.llvm import Value
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import Config, ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights
from twofour.kernels.cpu.vector import Vector

DOTPROD = ("dotprod",)


@dataclass(frozen=True)
class DenseElements(Dense):
    """As `Dense`, its steps taken from registers of 16 inputs."""

    name: str = "dense sdot"

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """sums[row, block] += x[row, the step's inputs] . w[block, step]."""
        f, blocks = v.f, len(sums) // len(rows)
        inputs = [neon.flipped(f, f.load(neon.BYTES, x, offset)) for offset in rows]
        parts = [neon.quarters(f, total) for total in sums]
        for step in range(steps):
            picked = [neon.element(f, sixteen, step) for sixteen in inputs]
            for block in range(blocks):
                for q in range(neon.QUARTERS):
                    at = (step * blocks + block) * 64 + 16 * q
                    weights = f.load(neon.BYTES, w, at, 16)
                    for row, one in enumerate(picked):
                        own = parts[row * blocks + block]
                        own[q] = neon.sdot(f, own[q], weights, one)
        return [neon.joined(f, own) for own in parts]


def _refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    return ""


def _configs(problem: ConvProblem, isa: str) -> list[Config]:
    """3 positions by 2 blocks, or 5 by 1: with 6 there the inputs leave no register for weights."""
    wide = tiles_for(problem, isa, blocks=(2,), count=2)
    return list(dict.fromkeys([*wide, *tiles_for(problem, isa, blocks=(1,), count=2, spare=1)]))


TACTICS = (
    Tactic(
        "dense sdot",
        "int8",
        "",
        Tiled(DenseElements(), centre=neon.CENTRE),
        _refuse,
        _configs,
        only=DOTPROD,
    ),
)

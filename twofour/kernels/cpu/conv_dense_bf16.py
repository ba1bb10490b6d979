"""Dense bfloat16 convolution and matrix product: the integer kernel, its bytes read in pairs.

`vdpbf16ps` multiplies 2 inputs of 4 bytes with 2 weights a lane, where `vpdpbusd` does 4: half the
integer peak and twice that of float32. Layout of a panel:

    for run in runs: for step in steps:
        for block in blocks: for lane in 16: for k in 2: bfloat16 w[block, lane][run][2 step + k]

Where a run has an odd number of inputs, its last step is the last two of them, the first of which
has been counted already: its weight is zero. So nothing beyond a run is read.
"""

from __future__ import annotations

from twofour.kernels.cpu.conv_dense import Dense
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights

MIN_RUN = 2
"""Inputs that a run must have at least."""


def refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    """Why no bfloat16 kernel takes a problem; "" if one does."""
    if isa != "avx512vnni":
        return f"needs AVX-512 with BF16, which {isa} does not have"
    if problem.segment_k < MIN_RUN:
        return "a single input channel has no pair"
    return ""


TACTICS = (
    Tactic(
        "dense",
        "bfloat16",
        "",
        Tiled(Dense("bfloat16")),
        refuse,
        lambda p, isa: tiles_for(p, isa, blocks=(1, 2), count=2),
    ),
)

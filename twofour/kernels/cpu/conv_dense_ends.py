"""Dense integer convolution of few input channels, whose filter rows 4 does not divide.

A filter row of 7 taps of 3 channels is 21 bytes: 6 steps of 4, the last one for one byte. Here a
row is 5 steps, and the ends of several rows, here 4, make a step of their own: 37 steps instead of
42. Their bytes are brought together by masked moves, which run on units that the dot products leave
idle: from each row the 4 bytes are broadcast that have its end in the place where it belongs.

    for run in runs: steps as in conv_dense.py, without the end of the run
    for step in ends: for block in blocks: for lane in 16: for run in the step's: w[...][run][end]
"""

from __future__ import annotations

from twofour.kernels.cpu.conv_dense import Dense
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights

_STEP = 4  # bytes


def _refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    if isa != "avx512vnni":
        return f"needs AVX-512: on {isa} bytes are not moved beside the dot products"
    end = problem.segment_k % _STEP
    if not problem.taps_joined:
        return "for filter rows whose inputs lie one after the other: here taps lie apart"
    if end in (1, 2) and problem.segment_k > _STEP and problem.segments > 1:
        return ""
    rows = f"{problem.segments} of {problem.segment_k} inputs"
    return f"for several filter rows of some fours of inputs and 1 or 2 more: this layer has {rows}"


TACTICS = (
    Tactic(
        "dense ends",
        "int8",
        "",
        Tiled(Dense(), ends=True),
        _refuse,
        lambda p, isa: tiles_for(p, isa, blocks=(1, 2), count=2),
    ),
)

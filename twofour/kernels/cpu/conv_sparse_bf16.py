"""Sparse bfloat16 convolution and matrix product: 2:4 H and pair of conv_sparse.py, and 4:8.

2:4: of 4 consecutive inputs, 8 bytes, a channel keeps 2, 4 bytes: the byte shuffle of the integer
kernels picks them, and `vdpbf16ps` multiplies them. As shuffle and dot product share their ports as
there, so is the gain: up to 1.5 times dense, with shared indices up to 2 times.

4:8: of 8 consecutive inputs, 16 bytes, a channel keeps 4, and bytes are shuffled within 16, but to
broadcast 16 costs as much as a shuffle (1.9 cycles a dot product in all, dense takes 2). So it is
the kernel of conv_sparse_f32.py, which picks words out of 64 bytes as they lie in memory: 1.33
cycles a dot product, 1.65 where they cross a line; 0.69 times the dense bytes. It takes 2:4 too.
"""

from __future__ import annotations

from twofour.core.patterns import why_not
from twofour.kernels.cpu.conv_dense_bf16 import refuse
from twofour.kernels.cpu.conv_sparse import Sparse, refuse_pair
from twofour.kernels.cpu.conv_sparse_f32 import Permuted
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights


def _refuse_free(problem: ConvProblem, w: Weights, isa: str) -> str:
    return refuse(problem, w, isa) or why_not(w, "2:4") or ""


def _refuse_wide(problem: ConvProblem, w: Weights, isa: str) -> str:
    if reason := refuse(problem, w, isa):
        return reason
    return (why_not(w, "2:4") and why_not(w, "4:8")) or ""


def _refuse_pair(problem: ConvProblem, w: Weights, isa: str) -> str:
    return refuse(problem, w, isa) or refuse_pair(problem, w, isa)


TACTICS = (
    Tactic(
        "2:4 H",
        "bfloat16",
        "2:4",
        Tiled(Sparse(1, "bfloat16")),
        _refuse_free,
        lambda p, isa: tiles_for(p, isa, blocks=(1,), count=2),
    ),
    Tactic(
        "2:4 pair",
        "bfloat16",
        "2:4/pair",
        Tiled(Sparse(2, "bfloat16")),
        _refuse_pair,
        lambda p, isa: tiles_for(p, isa, blocks=(2,), count=2),
    ),
    Tactic(
        "4:8",
        "bfloat16",
        "4:8",
        Tiled(Permuted("bfloat16")),
        _refuse_wide,
        lambda p, isa: tiles_for(p, isa, blocks=(1,), count=2),
    ),
)

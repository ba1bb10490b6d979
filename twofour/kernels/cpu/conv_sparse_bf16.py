"""2:4 bfloat16 convolution and matrix product: formats H and pair of conv_sparse.py.

Of 4 consecutive inputs, 8 bytes, a channel keeps 2, 4 bytes: the byte shuffle of the integer
kernels picks them, and `vdpbf16ps` multiplies them. As shuffle and dot product share their ports as
there, so is the gain: up to 1.5 times dense, with shared indices up to 2 times. A pattern of 4 of 8
would need indices that reach over 16 bytes: strictly 2:4.
"""

from __future__ import annotations

from twofour.core.patterns import why_not
from twofour.kernels.cpu.conv_dense_bf16 import refuse
from twofour.kernels.cpu.conv_sparse import Sparse, refuse_pair
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights


def _refuse_free(problem: ConvProblem, w: Weights, isa: str) -> str:
    return refuse(problem, w, isa) or why_not(w, "2:4") or ""


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
)

"""Who offers to do what: the tactic files of each problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from twofour.compiler.cuda import plugins
from twofour.kernels.cuda import (
    attention,
    conv,
    conv_depthwise,
    conv_first,
    conv_halo,
    conv_sparse,
    nms,
    norm,
    pool,
    product_descriptors,
    quantize_rows,
    resize,
    walk,
)
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import (
    AttentionProblem,
    ConvProblem,
    NormProblem,
    PoolProblem,
    RowsProblem,
    Walk,
)

Array = NDArray[Any]
Offer = Callable[..., tuple[Recipe, ...]]


def _alone(offer: Offer) -> Offer:
    """Of a problem without constants."""
    return lambda problem, constants, capability, effort: offer(problem, capability, effort=effort)


OFFERS: Mapping[type, tuple[Offer, ...]] = {
    ConvProblem: (
        conv.recipes,
        product_descriptors.recipes,
        conv_depthwise.recipes,
        conv_first.recipes,
        conv_sparse.recipes,
        conv_halo.dense_recipes,
        conv_halo.recipes,
    ),
    Walk: (walk.recipes,),
    PoolProblem: (_alone(pool.recipes),),
    NormProblem: (norm.recipes,),
    plugins.PluginProblem: (plugins.recipes,),
    AttentionProblem: (attention.recipes,),
    RowsProblem: (_alone(quantize_rows.recipes),),
    resize.ResizeProblem: (resize.recipes,),
    nms.NmsProblem: (_alone(nms.recipes),),
}
"""Those that need no GPU to say what they have; libraries are asked on the GPU (libraries.py)."""


def offered(
    problem: Any, constants: Mapping[str, Array], capability: int, effort: int
) -> tuple[Recipe, ...]:
    """Every way to do it, the best guess of each tactic first."""
    return tuple(
        recipe
        for offer in OFFERS[type(problem)]
        for recipe in offer(problem, constants, capability, effort=effort)
    )

"""Products and convolutions with a 2:4 weight on sparse tensor cores, by NVIDIA's cuSPARSELt.

Sparse tensor cores take half of w, and two bits an element that say which half: they do twice the
products in the same time, and read 5/8 (int8) or 9/16 (16 bits) of the weight.

    x [M, K] --(im2col, for windows)--> cols [M', K'] --cuSPARSELt--> y, or sums [M', N] --> y

The library takes K and N in multiples of 16 (of 32 for bytes), and M and the distances of rows in
multiples of 8 (of 16 for bytes). Where M, K or a distance is none, im2col copies x to rows that
are, and the sums are finished by a kernel, which leaves out the rows behind y's last. Weights of
several taps lie [N, KH, KW, C], so that groups of four run along the channels of a tap.

The constant "w" is [N, K'], not compressed yet: the library does that on the GPU, for which
compiler/cuda/libraries.py asks; it also puts each of the library's algorithms into a recipe of its
own. float32 is not offered: there the tensor cores round to 10 bits, and want 1:2.

Refused: groups; N no multiple of 16 (32 for bytes); channels no multiple of 4; windows over fewer
than 64 products, where copying costs more than they do.

Roles beside those of the problem: cols, sums, workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from twofour.core.cuda_products import (
    CUSPARSELT,
    DENSE_MULTIPLE,
    SPARSE_MULTIPLE,
    Product,
)
from twofour.kernels.cuda.gemm_cublaslt import sum_types
from twofour.kernels.cuda.im2col import flat_weight, im2col_bytes, im2col_call, rounded_up
from twofour.kernels.cuda.kernel import Array, Kernel, Recipe
from twofour.kernels.cuda.problem import ConvProblem
from twofour.kernels.cuda.products import (
    Offer,
    bits_of,
    direct,
    plain_product,
    scaled_sums,
    summed,
)

NAME = "2:4 cusparselt"
_FP8 = "float8e4m3fn"
_GROUP = 4
_LEAST_K = 64


def recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """The ways by cuSPARSELt, each by the library's own choice of algorithm.

    Args:
        problem: what is computed; () where its weight is not 2:4, or its shape is refused.
        constants: "w" [N, C, KH, KW] or [N, K], "scale" [N], "bias" [N].
        capability: of the GPU, 90 for 9.0.
        effort: from 2 on, sums in fewer bits where y has few.
    """
    if "w" not in constants or not takes(problem, capability):
        return ()
    dtype = problem.x.dtype
    rows = rounded_up(problem.rows, DENSE_MULTIPLE[dtype])
    columns = rounded_up(problem.k, SPARSE_MULTIPLE[dtype])
    plain = plain_product(problem, problem.y.dtype, problem.y.pixel)
    found = []
    if problem.is_product:
        found += _made(problem, constants, plain, None, effort)
    if not found:
        wide = replace(plain, m=rows, k=columns, x_row=columns)
        found = _made(problem, constants, wide, im2col_call(problem, rows, columns), effort)
    w = bits_of(constants["w"], dtype)
    w = w if w.ndim == 4 else w.reshape(*w.shape[:2], 1, 1)
    return tuple(_with_weight(recipe, w, problem, product) for recipe, product in found)


def takes(problem: ConvProblem, capability: int) -> bool:
    """Whether the library computes such problems at all."""
    dtype = problem.x.dtype
    least = 89 if dtype == _FP8 else 80
    if problem.pattern != "2:4" or dtype not in SPARSE_MULTIPLE or dtype == "float32":
        return False
    even = not problem.out_channels % SPARSE_MULTIPLE[dtype] and not problem.channels % _GROUP
    return even and capability >= least and problem.groups == 1 and problem.k >= _LEAST_K


def _made(
    problem: ConvProblem,
    constants: Mapping[str, Array],
    product: Product,
    before: Kernel | None,
    effort: int,
) -> list[tuple[Recipe, Product]]:
    """Recipes of these rows and columns."""
    offers: list[Offer | None] = []
    flat = problem.y.is_flat(*problem.out_size)
    even = problem.r is None or problem.r.is_flat(*problem.out_size)
    if product.m == problem.rows and flat and even:
        offers.append(direct(problem, constants, product, CUSPARSELT))
    if not any(offers):
        offers.append(scaled_sums(problem, constants, product))
    types = sum_types(problem, effort)
    offers += [summed(problem, constants, product, sums) for sums in types]
    found = []
    for offer in offers:
        if offer is None or list(offer.product.wrong(CUSPARSELT)):
            continue
        if before is not None:
            scratch = {**offer.scratch, "cols": im2col_bytes(problem, product.m, product.k)}
            offer = replace(offer, scratch=scratch, config=f"im2col, {offer.config}")
        found.append((offer.recipe(CUSPARSELT, NAME, before), offer.product))
    return found


def _with_weight(recipe: Recipe, w: Array, problem: ConvProblem, product: Product) -> Recipe:
    flat = np.ascontiguousarray(flat_weight(w, product.k))
    return replace(recipe, constants={**recipe.constants, "w": flat})

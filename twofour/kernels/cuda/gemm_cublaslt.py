"""Dense matrix products, and 1x1 convolutions as such, by NVIDIA's cuBLASLt.

What the GPU's own vendor made of its tensor cores, with kernels that no one else has written for
shapes that are many. Its algorithms are candidates by themselves: compiler/cuda/libraries.py asks
the library for them and puts each into a recipe of its own.

The weight lies as it is, [N, K]. Roles beside those of the problem: sums, workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from twofour.core.cuda_products import CUBLASLT
from twofour.kernels.cuda.kernel import Array, Recipe
from twofour.kernels.cuda.problem import QUANTIZED, ConvProblem
from twofour.kernels.cuda.products import Offer, bits_of, direct, plain_product, summed

NAME = "cublaslt"
_FP8 = "float8e4m3fn"


def recipes(
    problem: ConvProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """The ways by cuBLASLt, each by the library's own choice of algorithm.

    Args:
        problem: what is computed; () unless it is a matrix product.
        constants: "w" [N, C, 1, 1] or [N, K], "scale" [N], "bias" [N].
        capability: of the GPU, 90 for 9.0.
        effort: from 2 on, sums in fewer bits where y has few.
    """
    dtype = problem.x.dtype
    if not problem.is_product or "w" not in constants or (dtype == _FP8 and capability < 89):
        return ()
    plain = plain_product(problem, problem.y.dtype, problem.y.pixel)
    offers = [direct(problem, constants, plain, CUBLASLT)]
    offers += [summed(problem, constants, plain, sums) for sums in sum_types(problem, effort)]
    found = [each for each in offers if each is not None and not list(each.product.wrong(CUBLASLT))]
    if dtype == _FP8 and effort >= 2:
        found += [_fast(each) for each in found]
    w = np.ascontiguousarray(bits_of(constants["w"], dtype).reshape(plain.n, plain.k))
    return tuple(
        replace(each, constants={**each.constants, "w": w}).recipe(CUBLASLT, NAME) for each in found
    )


def sum_types(problem: ConvProblem, effort: int) -> tuple[str, ...]:
    """Types that sums may be stored in before they are finished."""
    if problem.x.dtype == "int8":
        return ("int32",)
    if problem.x.dtype == _FP8:
        few = problem.y.dtype in QUANTIZED and effort >= 2
        return ("float32", "bfloat16") if few else ("float32",)
    return (problem.x.dtype,)


def _fast(offer: Offer) -> Offer:
    """The same with sums of fewer bits, 14 of them as tensor cores of 9.0 add fp8."""
    config = f"{offer.config}, fast sums"
    return replace(offer, product=replace(offer.product, fast=True), config=config)

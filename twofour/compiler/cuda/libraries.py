"""Recipes by NVIDIA's libraries, with their algorithms found and their weights compressed.

    for recipe in library_recipes(problem, constants, device, effort=2):
        ...                                   # time it like any other candidate

The tactics gemm_cublaslt.py and gemm_cusparselt.py say which products the libraries can do of a
problem, each by the library's own choice of algorithm. Here, on the GPU that the engine is for,
each becomes several recipes: one for each of the fastest algorithms, as a short race tells that
runs all of them in a process of its own (race.py). A recipe that comes back needs
nothing more: its calls' settings name the algorithm and the library's version, its constant "w" is
what the library reads (compressed, for cuSPARSELt), its scratch has the role "workspace" where
there is one.

The places of a call follow from its roles, as those of a kernel do. At run time
runtime/cuda/prepared.py takes it from there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

from twofour.compiler.cuda.race import racer
from twofour.core.cuda_products import CUBLASLT, CUSPARSELT, Product, read_product
from twofour.core.errors import UnsupportedError
from twofour.kernels.cuda import gemm_cublaslt, gemm_cusparselt
from twofour.kernels.cuda.kernel import Array, LibraryKernel, Recipe
from twofour.kernels.cuda.problem import ConvProblem
from twofour.runtime.cuda import cublaslt, cusparselt, libraries
from twofour.runtime.cuda.device import Device

_TRIED = {CUBLASLT: (1, 4, 6, 16), CUSPARSELT: (1, 8, 24, 128)}
_SLOW = ("float16", "bfloat16")
"""Types in which cuSPARSELt takes a fifth of a second (0.8.0 on an H200) to look for algorithms,
for each plan again: a network of many small products would be built in minutes."""
_TRIED_SLOW = (1, 4, 8, 128)
_WORTH_MACS = 1 << 34
"""From there on it was seen to be ahead in these types."""
_KEPT = (1, 1, 2, 6)
_RUNS = 3
_ALL = 3  # the effort that leaves nothing out


def library_recipes(
    problem: ConvProblem, constants: Mapping[str, Array], device: Device, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """All ways by NVIDIA's libraries, the fastest algorithms of each.

    Args:
        problem: what is computed.
        constants: "w" [N, C, KH, KW], "scale" [N], "bias" [N].
        device: the GPU that the engine is for.
        effort: 0 leaves the algorithm to the library; more algorithms are tried from 1 to 3.

    Returns:
        () where there is none, or where the libraries are not here: see `missing`.

    Raises:
        UnsupportedError: the GPU has no memory left.
    """
    found: list[Recipe] = []
    absent = missing()
    packed: dict[tuple[int, int], Array] = {}
    if left_out(problem, effort):
        absent[CUSPARSELT] = ""
    for tactic, library in ((gemm_cublaslt, CUBLASLT), (gemm_cusparselt, CUSPARSELT)):
        if library in absent:
            continue
        own: list[Recipe] = []
        for recipe in tactic.recipes(problem, constants, device.capability, effort=effort):
            if own and effort < _ALL and len(recipe.calls) > len(own[0].calls):
                continue  # what the library does by itself needs no kernel behind it
            with device.current():
                own += _expanded(recipe, library, device, effort, packed)
        found += own
    return tuple(found)


def left_out(problem: ConvProblem, effort: int) -> str:
    """Why cuSPARSELt is not tried; "" where it is.

    Args:
        problem: what is computed.
        effort: as for `library_recipes`.
    """
    macs = problem.rows * problem.k * problem.out_channels
    if effort >= _ALL or problem.x.dtype not in _SLOW or macs >= _WORTH_MACS:
        return ""
    return (
        f"not tried: its plans in {problem.x.dtype} take long, and {macs / 1e9:.1f} thousand "
        "million products are few; --tuning-effort 3 tries it"
    )


def repacked(
    recipe: Recipe, problem: ConvProblem, constants: Mapping[str, Array], device: Device
) -> Recipe:
    """A recipe of `library_recipes` for a product of equal sizes with constants of its own.

    Args:
        recipe: what was chosen, by one algorithm.
        problem: the other product.
        constants: of it, as for `library_recipes`.
        device: the GPU.
    """
    tactics = (gemm_cublaslt, gemm_cusparselt)
    offers = [o for t in tactics for o in t.recipes(problem, constants, device.capability)]
    own = next(
        each
        for each in offers
        if each.tactic == recipe.tactic and recipe.config.startswith(f"{each.config}, algorithm ")
    )
    place, call = library_of(recipe)
    product = read_product(call.settings, call.library)
    _, fresh = library_of(own)
    mine = read_product(fresh.settings, fresh.library)
    numbers = replace(product, alpha=mine.alpha, beta=mine.beta, upper=mine.upper)
    w = own.constants["w"]
    if call.library == CUSPARSELT:
        with device.current():
            w = _compressed(numbers, w, device)
    made = replace(call, settings=numbers.to_json())
    calls = (*own.calls[:place], made, *own.calls[place + 1 :])
    return replace(recipe, calls=calls, constants={**own.constants, "w": w})


def missing() -> dict[str, str]:
    """Library -> why it cannot be called here, and what brings it; for explain and doctor."""
    found = {}
    for library, get in ((CUBLASLT, libraries.cublaslt), (CUSPARSELT, libraries.cusparselt)):
        try:
            get()
        except UnsupportedError as error:
            found[library] = str(error)
    return found


def library_of(recipe: Recipe) -> tuple[int, LibraryKernel]:
    """The place and the call of a library among those of a recipe."""
    found = [(i, call) for i, call in enumerate(recipe.calls) if isinstance(call, LibraryKernel)]
    return found[0]


def _expanded(
    recipe: Recipe,
    library: str,
    device: Device,
    effort: int,
    packed: dict[tuple[int, int], Array],
) -> list[Recipe]:
    """The recipe by each of the fastest algorithms."""
    place, call = library_of(recipe)
    product = read_product(call.settings, library)
    level = min(max(effort, 0), len(_KEPT) - 1)
    algorithms = cublaslt.algorithms if library == CUBLASLT else cusparselt.algorithms
    is_slow = library == CUSPARSELT and product.x in _SLOW
    most = (_TRIED_SLOW if is_slow else _TRIED[library])[level]
    products = algorithms(product, device.capability, most, device.gpu.index)
    if not products:
        return []
    w = recipe.constants["w"]
    if library == CUSPARSELT:
        key = (product.n, product.k)
        if key not in packed:
            packed[key] = _compressed(product, w, device)
        w = packed[key]
    best = [products[0]]
    if len(products) > 1:
        # The address of a bias is part of a plan: without one a plan less is made of each.
        tried = [replace(each, bias="") for each in products] if is_slow else products
        raced = racer(device.gpu.uuid).race(tried, library, _RUNS)
        fit = [each.product for each in raced if each.us < math.inf][: _KEPT[level]]
        best = [replace(each, bias=product.bias) for each in fit]
    return [_by(recipe, place, call, found, w) for found in best]


def _compressed(product: Product, w: Array, device: Device) -> Array:
    stream = device.stream()
    try:
        return cusparselt.compress(product, w, device, stream, device.gpu.index)
    finally:
        device.drop_stream(stream)


def _by(recipe: Recipe, place: int, call: LibraryKernel, product: Product, w: Array) -> Recipe:
    """The recipe by one algorithm."""
    before = read_product(call.settings, call.library).roles
    roles = dict(zip(before, call.roles, strict=True)) | {"workspace": "workspace"}
    named = tuple(roles[role] for role in product.roles)
    made = LibraryKernel(call.library, product.to_json(), named)
    calls = (*recipe.calls[:place], made, *recipe.calls[place + 1 :])
    scratch = dict(recipe.scratch)
    if product.workspace_bytes:
        scratch["workspace"] = product.workspace_bytes
    return replace(
        recipe,
        config=f"{recipe.config}, algorithm {_title(product, call.library)}",
        calls=calls,
        constants={**recipe.constants, "w": w},
        scratch=scratch,
    )


def _title(product: Product, library: str) -> str:
    """A short name of an algorithm: cuSPARSELt's number, part of a hash of cuBLASLt's bytes."""
    if library == CUSPARSELT:
        return product.algorithm
    return hashlib.sha256(product.algorithm.encode()).hexdigest()[:6]

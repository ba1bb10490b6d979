"""Routed experts and the masked MLP: each token is computed by the experts that it chose alone.

    choose, sort      which rows each expert has (experts_route.py)
    quantize          int8: rows of x, each with a scale of its own
    first product     each expert's rows by its weights, and the activation; SwiGlu's both halves
    quantize          int8: rows of what is between the products
    second product    results go to where their choices are
    combine           y: gate * result

A product is cut into tiles of rows of one expert each. Which tile is whose is not known when the
kernels are started, so there are as many programs as the worst routing takes; each finds its expert
from the counts of all, and those beyond the last tile end at once. So the launches are the same
every time, as a CUDA graph wants it, and the time grows with what is routed.

Roles: x [tokens, hidden], logits [tokens, experts] or mask [tokens], y [tokens, hidden]. Constants:
w1, b1, w2, b2 and, of int8, w1_scale and w2_scale, as core/experts.py has them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from twofour.core.bfloat16 import to_bf16
from twofour.core.cuda_program import DTYPES
from twofour.core.experts import SWIGLU
from twofour.kernels.cuda import quantize_rows
from twofour.kernels.cuda.experts_route import ExpertsProblem, combine_call, routing_calls
from twofour.kernels.cuda.finish import activate
from twofour.kernels.cuda.kernel import SHARED_BYTES, Kernel, Recipe, divided, of_capability
from twofour.kernels.cuda.problem import REAL, RowsProblem

Array = NDArray[Any]

MOST_EXPERTS = 1024
_CONFIGS = {0: 1, 1: 2, 2: 7, 3: 11}


@dataclass(frozen=True)
class Product:
    """One of the two products; roles of what it reads and writes.

    Attributes:
        number: 1 or 2.
        k: inputs.
        n: outputs.
        gated: w has another n rows, which the activation takes too.
        activation: of the results.
    """

    number: int
    k: int
    n: int
    gated: bool
    activation: str


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows, outputs, inputs of a step, warps and stages."""

    rows: int
    n: int
    k: int
    warps: int
    stages: int
    precision: str = "tf32x3"


@triton.jit
def expert_product(
    x,
    w,
    bias,
    w_scale,
    x_scale,
    owners,
    counts,
    y,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    PRODUCT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the rows of an expert; scales are None of floats.

    The first product reads rows by token and writes them by slot, the second one reads them by slot
    and writes them by choice.
    """
    tile = tl.program_id(0) % TILES
    number = tl.arange(0, BLOCK_EXPERTS)
    rows = tl.load(counts + number, mask=number < EXPERTS, other=0)
    tiles = (rows + BLOCK - 1) // BLOCK
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    if expert >= EXPERTS:
        return
    before = number < expert
    row = (tile - tl.sum(tl.where(before, tiles, 0), axis=0)) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.sum(tl.where(number == expert, rows, 0), axis=0)
    slot = tl.sum(tl.where(before, rows, 0), axis=0) + row
    owner = tl.load(owners + slot, mask=inside, other=0)
    source, target = tl.where(inside, slot, 0), owner  # rows beyond the last are read, and not kept
    if PRODUCT.number == 1:
        source, target = owner // CHOICES, slot

    n = tl.program_id(0) // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < PRODUCT.n
    n_there = tl.minimum(n, PRODUCT.n - 1)
    height: tl.constexpr = PRODUCT.n * 2 if PRODUCT.gated else PRODUCT.n
    k = tl.arange(0, BLOCK_K)
    x_rows = x + source.to(tl.int64)[:, None] * PRODUCT.k + k[None, :]
    w_rows = w + expert.to(tl.int64) * (height * PRODUCT.k)
    w_rows += n_there[:, None] * PRODUCT.k + k[None, :]
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros([BLOCK, BLOCK_N], kind)
    others = tl.zeros([BLOCK, BLOCK_N], kind)
    for first in range(0, PRODUCT.k, BLOCK_K):
        values = _columns(x_rows, first, k, PRODUCT.k, BLOCK_K)
        weights = _columns(w_rows, first, k, PRODUCT.k, BLOCK_K)
        sums = tl.dot(values, tl.trans(weights), sums, PRECISION, out_dtype=kind)
        if PRODUCT.gated:
            weights = _columns(w_rows + PRODUCT.n * PRODUCT.k, first, k, PRODUCT.k, BLOCK_K)
            others = tl.dot(values, tl.trans(weights), others, PRECISION, out_dtype=kind)

    at = expert * height + n
    v = _finished(sums, bias, w_scale, x_scale, at, n_inside, source, inside)
    if PRODUCT.gated:
        other = _finished(others, bias, w_scale, x_scale, at + PRODUCT.n, n_inside, source, inside)
        v = activate(v, "Silu") * other
    elif PRODUCT.activation == "Relu":
        v = tl.maximum(v, 0.0)
    else:
        name: tl.constexpr = PRODUCT.activation
        v = activate(v, name)
    place = y + target.to(tl.int64)[:, None] * PRODUCT.n + n[None, :]
    tl.store(place, v.to(y.dtype.element_ty), mask=inside[:, None] & n_inside[None, :])


@triton.jit
def _columns(rows, first, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Some columns of rows that are all there; zeros behind the last column."""
    if K % BLOCK_K == 0:
        found = tl.load(rows + first)
    else:
        found = tl.load(rows + first, mask=(first + k)[None, :] < K, other=0)
    return found


@triton.jit
def _finished(sums, bias, w_scale, x_scale, at, n_inside, source, inside):
    """Sums in units of their scales, plus the bias."""
    v = sums.to(tl.float32)
    if w_scale is not None:
        factor = tl.load(w_scale + at, mask=n_inside, other=0.0)[None, :]
        v = v * (factor * tl.load(x_scale + source, mask=inside, other=0.0)[:, None])
    return v + tl.load(bias + at, mask=n_inside, other=0.0)[None, :]


def why_not(problem: ExpertsProblem, capability: int) -> str:
    """Why the kernels cannot take a problem; "" if they can."""
    if problem.x not in REAL or problem.logits not in REAL:
        return f"x is {problem.x} and logits are {problem.logits}: expected real numbers"
    if problem.weights not in (problem.x, "int8"):
        return f"weights are {problem.weights}: expected {problem.x} or int8"
    if not 1 <= problem.k <= problem.experts <= MOST_EXPERTS:
        text = f"{problem.k} of {problem.experts} experts a token"
        return f"{text}: expected 1 to all of at most {MOST_EXPERTS}"
    if problem.slots * max(problem.hidden, problem.inner) >= 2**40 or problem.slots >= 2**30:
        return f"{problem.slots} rows are too many"
    return ""


def recipes(
    problem: ExpertsProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """Tiles of the products, the best guess first.

    Args:
        problem: the layer.
        constants: weights, biases and scales.
        capability: of the GPU, 90 for 9.0.
        effort: 0 to 3, how many.
    """
    if why_not(problem, capability):
        return ()
    held = _packed(problem, constants)
    found = []
    for tile in _tiles(problem, capability)[: _CONFIGS[effort]]:
        calls, scratch = _calls(problem, capability, tile)
        text = f"{tile.rows}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages"
        text += f", {tile.precision}" if problem.weights == "float32" else ""
        found.append(Recipe("experts", text, calls, held, scratch))
    return tuple(found)


def _packed(problem: ExpertsProblem, constants: Mapping[str, Array]) -> dict[str, Array]:
    """Weights in the type that is multiplied, all else in float32."""
    held: dict[str, Array] = {}
    for name, array in constants.items():
        if name not in ("w1", "w2"):
            held[name] = np.ascontiguousarray(array, np.float32)
        elif problem.weights == "bfloat16":
            held[name] = to_bf16(np.asarray(array, np.float32))
        else:
            held[name] = np.ascontiguousarray(array, problem.weights)
    return held


def _tiles(problem: ExpertsProblem, capability: int) -> list[Tile]:
    """Rows near those that an expert usually has first."""
    size = DTYPES[problem.weights]
    step = 64 if size == 2 else 128 if size == 1 else 32
    shapes = [(128, 128, 8, 3, 1), (64, 128, 4, 3, 1), (64, 64, 4, 4, 1), (32, 64, 4, 4, 1)]
    shapes += [(16, 64, 4, 5, 1), (128, 256, 8, 3, 1), (64, 64, 4, 3, 2), (16, 64, 4, 4, 2)]
    shapes += [(32, 128, 4, 3, 1), (16, 128, 4, 4, 1), (128, 64, 4, 3, 1)]
    if size > 2:  # too many registers, or too few warps for so long a step
        shapes = [shape for shape in shapes if shape[1] <= 128 and shape[4] == 1]
    usual = min(128, max(16, triton.next_power_of_2(problem.usual_rows)))
    order = sorted(shapes, key=lambda shape: abs(np.log2(shape[0] / usual)))
    gated = problem.activation == SWIGLU
    if gated:  # twice as many sums
        order = [shape for shape in order if shape[0] * shape[1] < 128 * 128]
    room = of_capability(SHARED_BYTES, capability)
    precisions = ("tf32x3", "ieee") if problem.weights == "float32" else ("",)
    found = []
    for precision in precisions:
        for rows, n, warps, stages, steps in order:
            if (rows + n * (1 + gated)) * step * steps * size * stages <= room:
                found.append(Tile(rows, n, step * steps, warps, stages, precision))
    return found


def _calls(
    problem: ExpertsProblem, capability: int, tile: Tile
) -> tuple[tuple[Kernel, ...], dict[str, int]]:
    """All kernels in order, and the bytes of what lies between them."""
    p, quantized = problem, problem.weights == "int8"
    gated = p.activation == SWIGLU
    first = Product(1, p.hidden, p.inner, gated, "" if gated else p.activation)
    second = Product(2, p.inner, p.hidden, False, "")
    between = "float32" if quantized else p.x
    scratch = {
        "chosen": 4 * p.slots,
        "owners": 4 * p.slots,
        "counts": 4 * p.experts,
        "between": DTYPES[between] * p.slots * p.inner,
        "results": 4 * p.slots * p.hidden,
    }
    calls = [*routing_calls(p)]
    if p.routed:
        scratch["gates"] = 4 * p.slots
    sources = [("x", p.x), ("between", between)]
    targets = [("between", between), ("results", "float32")]
    sizes = ((p.tokens, p.hidden), (p.slots, p.inner))
    for product, source, target, (rows, channels) in zip(
        (first, second), sources, targets, sizes, strict=True
    ):
        if quantized:
            narrow = f"{source[0]}_bytes"
            scratch |= {narrow: rows * channels, f"{source[0]}_scale": 4 * rows}
            calls.append(_quantize(source, rows, channels, capability))
            source = (narrow, "int8")
        calls.append(_product(p, product, tile, source, target))
    return (*calls, combine_call(p)), scratch


def _quantize(source: tuple[str, str], rows: int, channels: int, capability: int) -> Kernel:
    """Rows of x, or between the products, to int8."""
    role, dtype = source
    asked = RowsProblem(rows, channels, (dtype, channels), ("int8", channels))
    (recipe,) = quantize_rows.recipes(asked, capability, effort=0)
    (kernel,) = recipe.calls
    if not isinstance(kernel, Kernel):
        raise TypeError(f"expected a kernel of Triton, got {type(kernel).__name__}")
    names = {"x": role, "y": f"{role}_bytes", "row_scale": f"{role}_scale"}
    operands = tuple((names[name], kind) for name, kind in kernel.operands)
    return replace(kernel, operands=operands, unaligned=tuple(names[r] for r in kernel.unaligned))


def _product(
    problem: ExpertsProblem,
    product: Product,
    tile: Tile,
    source: tuple[str, str],
    target: tuple[str, str],
) -> Kernel:
    """One product; pointers that are missing are None."""
    name = f"w{product.number}"
    tiles = problem.tiles(tile.rows)
    numbers: dict[str, Any] = {
        "EXPERTS": problem.experts,
        "CHOICES": problem.k,
        "PRODUCT": product,
        "TILES": tiles,
        "BLOCK_EXPERTS": triton.next_power_of_2(problem.experts),
        "BLOCK": tile.rows,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "PRECISION": tile.precision or "ieee",
    }
    operands = [source, (name, problem.weights), (f"b{product.number}", "float32")]
    if problem.weights == "int8":
        scale = f"{source[0].removesuffix('_bytes')}_scale"
        operands += [(f"{name}_scale", "float32"), (scale, "float32")]
    else:
        numbers |= {"w_scale": None, "x_scale": None}
    operands += [("owners", "int32"), ("counts", "int32"), target]
    grid = (tiles * divided(product.n, tile.n), 1, 1)
    return Kernel(expert_product, tuple(operands), numbers, grid, tile.warps, tile.stages)

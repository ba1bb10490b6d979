"""Results of products on the GPU against their definition, at some pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from twofour.compiler.cuda.lower import Turn
from twofour.compiler.cuda.tensors import Tensor
from twofour.core.bfloat16 import from_bf16, to_bf16
from twofour.core.errors import Error
from twofour.core.float8 import from_fp8, to_fp8
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import QUANTIZED, ConvProblem

Array = NDArray[Any]
_PIXELS = 48
_BITS = {"bfloat16": np.uint16, "float8e4m3fn": np.uint8}
_MEANT: Mapping[str, Callable[[Array], Array]] = {"bfloat16": from_bf16, "float8e4m3fn": from_fp8}
_HELD: Mapping[str, Callable[[Array], Array]] = {"bfloat16": to_bf16, "float8e4m3fn": to_fp8}
_ROUNDING = {"float32": 2e-3, "float16": 4e-3, "bfloat16": 2e-2, "float8e4m3fn": 8e-2}
"""Relative to the root mean square of the results; float32 products round to 22 bits at worst."""
_STEPS = 1


class WrongError(Error):
    """A kernel gives results that its definition does not."""


def typed(content: Array, dtype: str) -> Array:
    """Bytes as elements of a type; those that numpy has no type for as their bits."""
    return content.reshape(-1).view(np.uint8).view(_BITS.get(dtype, dtype))


def meant(elements: Array, dtype: str) -> Array:
    """What elements stand for: bits as float32."""
    return _MEANT[dtype](elements) if dtype in _MEANT else elements


@dataclass(frozen=True)
class Sample:
    """Some results of a product as its definition has them.

    Attributes:
        pixels: int64 [pixels, 3]: image, row and column of y.
        values: float64 [pixels, channels], before they are rounded.
    """

    pixels: Array
    values: Array


Read = Callable[[int, int], Array]
"""Bytes of the result: the first, counted from its first element, and how many."""


def sample_of(turn: Turn, inputs: Mapping[str, Array]) -> Sample | None:
    """What a product has to give at some pixels; None for a turn that is none.

    Args:
        turn: what is computed.
        inputs: what it reads, by role.
    """
    problem = turn.problem
    if not isinstance(problem, ConvProblem):
        return None
    pixels = _chosen(problem)
    x = _pixels_last(inputs["x"], turn.operands["x"])
    sums = _sums(problem, x, turn.constants["w"], pixels)
    return Sample(pixels, _finished(problem, turn, inputs, sums, pixels))


def compare(turn: Turn, recipe: Recipe, sample: Sample, read: Read) -> None:
    """Compares the result of a product with its definition.

    Raises:
        WrongError: the results are not what they have to be.
    """
    y = turn.operands["y"]
    view, channels = y.view, turn.problem.out_channels
    places = sample.pixels @ np.array([view.image, view.row, view.pixel])
    rows = [read(int(at) * y.item_bytes, channels * y.item_bytes) for at in places]
    got = meant(typed(np.stack(rows), y.dtype), y.dtype).reshape(len(rows), channels)
    _compare(turn, recipe, sample.values, got.astype(np.float32))


def _pixels_last(content: Array, tensor: Tensor) -> Array:
    """The elements of a tensor as [N, H, W, C], given the bytes from its first element on."""
    elements = typed(content, tensor.dtype)
    batch, height, width, channels = tensor.extent
    view, size = tensor.view, elements.itemsize
    steps = (view.image * size, view.row * size, view.pixel * size, size)
    return as_strided(elements, (batch, height, width, channels), steps, writeable=False)


def _chosen(problem: ConvProblem) -> Array:
    """Image, row and column of some pixels of y: the corners and random ones."""
    out_h, out_w = problem.out_size
    random = np.random.default_rng(0)
    most = (problem.batch, out_h, out_w)
    found = np.stack([random.integers(0, n, _PIXELS) for n in most], 1)
    found[0], found[1] = 0, np.array(most) - 1
    return found


def _sums(problem: ConvProblem, x: Array, w: Array, pixels: Array) -> Array:
    """float64 [pixels, N], padding read as x_zero."""
    window, groups = problem.window, problem.groups
    top, left = window.pads[:2]
    per_group, outs = problem.channels // groups, problem.out_channels // groups
    weights = _as_read(w, problem.x.dtype)
    total = np.zeros((len(pixels), problem.out_channels))
    for kh in range(window.kernel[0]):
        for kw in range(window.kernel[1]):
            row = pixels[:, 1] * window.stride[0] - top + kh * window.dilation[0]
            column = pixels[:, 2] * window.stride[1] - left + kw * window.dilation[1]
            inside = (row >= 0) & (row < problem.height) & (column >= 0) & (column < problem.width)
            safe = np.where(inside, row, 0), np.where(inside, column, 0)
            taken = meant(x[pixels[:, 0], safe[0], safe[1]], problem.x.dtype).astype(np.float64)
            taken = np.where(inside[:, None], taken, problem.x_zero)
            for g in range(groups):
                part = taken[:, g * per_group : (g + 1) * per_group]
                own = slice(g * outs, (g + 1) * outs)
                total[:, own] += part @ weights[own, :, kh, kw].T
    return total


def _as_read(w: Array, dtype: str) -> Array:
    """Weights as the product reads them: rounded to the type of x."""
    if w.dtype == np.int8 and dtype == "int8":
        return w.astype(np.float64)
    wide = w.astype(np.float32)
    held = _HELD[dtype](wide) if dtype in _HELD else wide.astype(dtype)
    return meant(held, dtype).astype(np.float64)


def _finished(
    problem: ConvProblem, turn: Turn, inputs: Mapping[str, Array], sums: Array, pixels: Array
) -> Array:
    """What is stored, before it is rounded: float64 [pixels, N]."""
    finish, constants = problem.finish, turn.constants
    value = sums * constants["scale"].astype(np.float64) if finish.scaled else sums
    if finish.by_rows:
        flat = (pixels[:, 0] * problem.out_size[0] + pixels[:, 1]) * problem.out_size[1]
        value = value * typed(inputs["row_scale"], "float32")[flat + pixels[:, 2], None]
    value = value + constants["bias"].astype(np.float64)
    r: Array | float = 0.0
    if problem.r is not None:
        whole = _pixels_last(inputs["r"], turn.operands["r"])
        read = meant(whole[tuple(pixels.T)], problem.r.dtype)
        r = read.astype(np.float64) - finish.residual_zero
        r = r * finish.residual_scale
    value = value if finish.add_last else value + r
    value = finish.activation.apply(value.astype(np.float32)).astype(np.float64)
    value = value + r if finish.add_last else value
    value = np.clip(value * finish.y_factor + finish.y_zero, finish.low, finish.high)
    if problem.y.dtype == "int8":
        return np.asarray(np.clip(value, -128, 127))
    most = {"float8e4m3fn": 448.0, "float16": 65504.0}.get(problem.y.dtype, np.inf)
    return np.asarray(np.clip(value, -most, most))


def _compare(turn: Turn, recipe: Recipe, wanted: Array, got: Array) -> None:
    dtype = turn.problem.y.dtype
    off = np.abs(got - wanted)
    if dtype == "int8":
        # Halfway between two steps float32 may round to either: half a step, and what it rounds.
        bound = np.full(wanted.shape, 0.5 + _STEPS * 0.02)
    else:
        narrow = turn.problem.x.dtype if turn.problem.x.dtype not in QUANTIZED else dtype
        share = max(_ROUNDING[dtype], _ROUNDING.get(narrow, 0.0))
        scale = np.sqrt(np.mean(wanted**2)) + np.abs(wanted)
        bound = share * scale + 1e-6
    wrong = ~(off <= bound)
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, off, -1)), off.shape)
        raise WrongError(
            f"{recipe.tactic} {recipe.config} computes {turn.op.name!r} wrongly",
            [
                f"{wrong.mean():.1%} of the results looked at are off",
                f"expected {wanted[worst]:.6g}, got {got[worst]:.6g} (channel {worst[1]})",
                f"the problem: {turn.problem}",
            ],
            "this is a defect of the kernel; report it with the model",
        )

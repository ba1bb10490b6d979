"""Weights of convolutions as kernels of Triton read them, and the same convolution in other words.

A convolution is put in words that fill tiles and whole loads: fewer groups, whole words of
channels, pairs of pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from twofour.core.bfloat16 import to_bf16
from twofour.core.float8 import to_fp8
from twofour.core.numerics import Window
from twofour.kernels.cuda.kernel import Array, divided
from twofour.kernels.cuda.problem import ConvProblem
from twofour.kernels.cuda.reference import round_to

K_MULTIPLE = 128
"""What K of packed weights is padded to a multiple of."""
_FULL_CHANNELS = 64
_FEW_CHANNELS = 16
_WORD = 4


def taps_inside(problem: ConvProblem) -> tuple[Array, Array]:
    """Which taps lie in x: bool [OH, KH] and [OW, KW]."""
    window, found = problem.window, []
    sizes = (problem.height, problem.width)
    for axis, (size, outs) in enumerate(zip(sizes, problem.out_size, strict=True)):
        first = np.arange(outs)[:, None] * window.stride[axis] - window.pads[axis]
        place = first + np.arange(window.kernel[axis]) * window.dilation[axis]
        found.append((place >= 0) & (place < size))
    return found[0], found[1]


def stored(values: Array, dtype: str) -> Array:
    """Weights as a kernel reads them: bits where numpy lacks the type.

    Args:
        values: int8 or float32, any shape.
        dtype: of x.
    """
    if dtype == "float8e4m3fn":
        return to_fp8(values.astype(np.float32))
    if dtype == "bfloat16":
        return to_bf16(values.astype(np.float32))
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    return round_to(values, dtype).astype(dtype, copy=False)


def pad_constant(problem: ConvProblem) -> dict[str, Array]:
    """The role "pad", what taps outside of x read: x_zero for each channel or k of a step.

    None where all taps lie inside.
    """
    if all(inside.all() for inside in taps_inside(problem)):
        return {}
    size = max(K_MULTIPLE, problem.channels)
    return {"pad": stored(np.full(size, problem.x_zero), problem.x.dtype)}


def pack(w: Array, dtype: str) -> Array:
    """Weights [N, C, KH, KW] as [N, K padded], zeros behind K; of x's type."""
    n = w.shape[0]
    rows = stored(w, dtype).transpose(0, 2, 3, 1).reshape(n, -1)
    k = rows.shape[1]
    packed = np.zeros((n, divided(k, K_MULTIPLE) * K_MULTIPLE), rows.dtype)
    packed[:, :k] = rows
    return packed


def unpack(packed: Array, shape: tuple[int, int, int, int]) -> Array:
    """The inverse of `pack`, as it is stored, for a weight of that shape [N, C, KH, KW]."""
    n, c, kh, kw = shape
    return packed[:, : c * kh * kw].reshape(n, kh, kw, c).transpose(0, 3, 1, 2)


def merged(problem: ConvProblem, w: Array) -> tuple[ConvProblem, Array]:
    """The same convolution with fewer groups, filled up with zeros, so that each fills tiles.

    Args:
        problem: the convolution.
        w: [N, C / groups, KH, KW].

    Returns:
        The problem, and its weight, of larger groups.
    """
    groups, per_group = problem.groups, problem.channels // problem.groups
    sizes = [size for size in range(1, groups + 1) if groups % size == 0]
    size = next((s for s in sizes if s * per_group >= _FULL_CHANNELS), groups)
    if size == 1:
        return problem, w
    n, (kernel_h, kernel_w) = w.shape[0], w.shape[2:]
    wide = np.zeros((n, size, per_group, kernel_h, kernel_w), w.dtype)
    of_group = np.arange(n) // (n // groups)
    wide[np.arange(n), of_group % size] = w
    full = wide.reshape(n, size * per_group, kernel_h, kernel_w)
    return replace(problem, groups=groups // size), full


def widened(problem: ConvProblem, w: Array) -> tuple[ConvProblem, Array]:
    """The same convolution of whole words: gaps between few channels count as channels.

    Their weights are 0. A pixel of 3 channels with room for 4 is loaded at once.

    Args:
        problem: the convolution.
        w: [N, C / groups, KH, KW].
    """
    channels = divided(problem.channels, _WORD) * _WORD
    narrow = channels != problem.channels <= _FEW_CHANNELS and problem.groups == 1
    fits = problem.x.pixel >= channels and problem.x.pixel % _WORD == 0
    if not narrow or not fits:
        return problem, w
    wide = np.pad(w, ((0, 0), (0, channels - problem.channels), (0, 0), (0, 0)))
    return replace(problem, channels=channels), wide


def paired(problem: ConvProblem, w: Array) -> tuple[ConvProblem, Array]:
    """The same convolution of pairs of pixels, where it steps over two and they have few channels.

    A row of x is read as half as many pixels of twice the channels, so that half as many taps are
    looked for, twice as long. The window begins at an even pixel: its weights get a column of
    zeros in front where it began at an odd one, and one behind where it ends at an even one.

    Args:
        problem: the convolution.
        w: [N, C, KH, KW].
    """
    window, x, channels = problem.window, problem.x, problem.channels
    words = problem.groups == 1 and x.dtype == "int8" and channels == x.pixel == _WORD
    even = problem.width % 2 == 0 and window.stride[1] == 2 and window.dilation[1] == 1
    top, left, bottom, _ = window.pads
    front = left % 2
    columns = divided(front + w.shape[3], 2)
    first = (left + front) // 2
    last = problem.out_size[1] - 1 + columns - first - problem.width // 2
    if not (words and even):
        return problem, w
    n, _, height, width = w.shape
    wide = np.pad(w, ((0, 0), (0, 0), (0, 0), (front, 2 * columns - front - width)))
    pairs = wide.reshape(n, channels, height, columns, 2).transpose(0, 4, 1, 2, 3)
    found = replace(
        problem,
        width=problem.width // 2,
        channels=2 * channels,
        x=replace(x, pixel=2 * x.pixel),
        window=Window(
            (height, columns),
            (window.stride[0], 1),
            (window.dilation[0], 1),
            (top, first, bottom, last),
        ),
    )
    return found, pairs.reshape(n, 2 * channels, height, columns)

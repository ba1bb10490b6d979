"""What a convolution or matrix product asks of a kernel, and how it is cut into tiles.

A matrix product [M, K] x [K, N] is the convolution of an M x 1 image with a 1 x 1 kernel, so there
is one problem. Activations lie channels-last; a quantized tensor is stored as uint8 (int8 values
plus 128).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import Epilogue

LANES = 16
ELEMENT_BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}
"""Of an element of a tensor, by the name that problems give its type."""


@dataclass(frozen=True)
class Strides:
    """Bytes from one image, row or pixel to the next."""

    image: int
    row: int
    pixel: int


@dataclass(frozen=True)
class ConvProblem:
    """One convolution as a kernel sees it.

    Attributes:
        batch: images.
        out_h: output rows.
        out_w: output columns.
        c: input channels of a group.
        n: output channels of a group.
        dtype: of the sums' inputs: "int8", "bfloat16" or "float32".
        x: strides of the input; its pointer is the first tap of output (0, 0).
        y: strides of the output.
        out: dtype of the output, "int8", "bfloat16" or "float32".
        kernel: (height, width).
        stride: (height, width).
        dilation: (height, width).
        groups: number of groups.
        r: strides of the residual, or None.
        add: dtype of the residual, or "" without one.
        activation: name of what the results go through, see core/functions.py; of results in
            bytes, what more than their own bounds, see `activation_of`.
        bounded: no result can leave int32 before it is rounded, whatever the input.
        gate: the activation is done by a table, see core/gates.py; out is "int8".
        ends: so many inputs at the end of each run are no part of it: those of several runs make
            steps of their own after all runs (conv_dense_ends.py).
        open_rows: the number of rows is given at each call, out_h is a usual one; for columns of
            single pixels, in one image (see nest.py).
        dynamic: x was quantized at run time, by "row" or as one "tensor" (core/dynamic.py): behind
            each of its rows stand scale and zero point, see quantize_rows.py; "" where both are
            known.
        add_last: the residual is added behind the activation.
    """

    batch: int
    out_h: int
    out_w: int
    c: int
    n: int
    dtype: str
    x: Strides
    y: Strides
    out: str
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    r: Strides | None = None
    add: str = ""
    activation: str = ""
    bounded: bool = False
    gate: bool = False
    open_rows: bool = False
    ends: int = 0
    dynamic: str = ""
    add_last: bool = False

    @property
    def x_bytes(self) -> int:
        """Bytes of one input element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def y_bytes(self) -> int:
        """Bytes of one output element."""
        return ELEMENT_BYTES[self.out]

    @property
    def r_bytes(self) -> int:
        """Bytes of one residual element."""
        return ELEMENT_BYTES[self.add or "int8"]

    @property
    def depthwise(self) -> bool:
        """Whether each output channel has one input channel of its own."""
        return self.groups > 1 and self.c == self.n == 1

    @property
    def x_size_bytes(self) -> int:
        """Bytes of the inputs, as far as they are read."""
        height, width = self.out_h * self.stride[0], self.out_w * self.stride[1]
        return self.batch * height * width * self.c * self.groups * self.x_bytes

    @property
    def y_size_bytes(self) -> int:
        """Bytes of the outputs."""
        return self.batch * self.out_h * self.out_w * self.n * self.groups * self.y_bytes

    @property
    def blocks(self) -> int:
        """16-channel blocks of a group's outputs."""
        return -(-self.n // LANES)

    @property
    def taps_joined(self) -> bool:
        """Whether the taps of a filter row lie one after the other: kw * c is one run of bytes."""
        return self.groups == 1 and self.dilation[1] == 1 and self.x.pixel == self.c * self.x_bytes

    @property
    def segments(self) -> int:
        """Runs of consecutive inputs that a window is made of."""
        return self.kernel[0] * (1 if self.taps_joined else self.kernel[1])

    @property
    def segment_k(self) -> int:
        """Inputs in a run, without its end."""
        return self.c * (self.kernel[1] if self.taps_joined else 1) - self.ends

    @property
    def macs(self) -> int:
        """Multiply-adds, counted as if dense."""
        outputs = self.batch * self.out_h * self.out_w * self.n * self.groups
        return outputs * self.c * self.kernel[0] * self.kernel[1]

    @property
    def is_column(self) -> bool:
        """Whether it is a matrix product: every output row is one pixel of an input row."""
        return self.out_w == 1 and self.kernel == self.stride == (1, 1)

    def flattened(self) -> ConvProblem:
        """The same problem with rows and images merged into one column, where strides allow it."""
        views = [self.x, self.y, *([self.r] if self.r is not None else [])]
        if self.kernel != (1, 1) or self.stride != (1, 1):
            return self
        if any(
            v.row != self.out_w * v.pixel or (self.batch > 1 and v.image != self.out_h * v.row)
            for v in views
        ):
            return self
        rows = self.batch * self.out_h * self.out_w

        def column(v: Strides) -> Strides:
            return Strides(rows * v.pixel, v.pixel, v.pixel)

        r = column(self.r) if self.r is not None else None
        return replace(self, batch=1, out_h=rows, out_w=1, x=column(self.x), y=column(self.y), r=r)


def activation_of(epilogue: Epilogue) -> str:
    """What a kernel's `activation` is: bytes are bounded from below, and by 255, in any case.

    Raises:
        ValueError: the zero point of y is not part of the bias where it can be.
    """
    if epilogue.zero_point is None or not epilogue.activation.clamps:
        return epilogue.activation.name
    if epilogue.zero_point:
        raise ValueError("kernels round what they store: expected Epilogue.in_stored_steps()")
    return "Clip" if epilogue.bounds()[1] < 255 else ""


def merge_groups(w: NDArray[Any], groups: int) -> tuple[NDArray[Any], int]:
    """Joins groups, with zeros between them, until a group fills whole blocks of output channels.

    A depthwise convolution stays as it is.

    Args:
        w: [N, C / groups, KH, KW].
        groups: of the convolution.

    Returns:
        [N, C / merged, KH, KW] and the new number of groups.
    """
    outs, ins = w.shape[0] // groups, w.shape[1]
    if outs == ins == 1:
        return w, groups
    join = next(
        (j for j in range(1, groups + 1) if groups % j == 0 and (j * outs) % LANES == 0), groups
    )
    merged = np.zeros((w.shape[0], ins * join, *w.shape[2:]), w.dtype)
    for g in range(groups):
        column = (g % join) * ins
        merged[g * outs : (g + 1) * outs, column : column + ins] = w[g * outs : (g + 1) * outs]
    return merged, groups // join


def segments_of(w: NDArray[Any], problem: ConvProblem, k_per_step: int) -> NDArray[Any]:
    """Weights in the order the kernels walk, zeros where padded.

    Args:
        w: [groups * n, c, KH, KW].
        problem: the problem.
        k_per_step: inputs that one step of the kernel takes from a run.

    Returns:
        [groups * blocks, 16, segments, steps, k_per_step].
    """
    return _in_steps(_runs(w, problem)[..., : problem.segment_k], problem, k_per_step)


def ends_of(w: NDArray[Any], problem: ConvProblem, k_per_step: int) -> NDArray[Any]:
    """Weights of the ends of runs, one after the other.

    Args:
        w: [groups * n, c, KH, KW].
        problem: the problem.
        k_per_step: inputs that one step takes, from k_per_step / ends runs.

    Returns:
        [groups * blocks, 16, 1, steps, k_per_step].
    """
    ends = _runs(w, problem)[..., problem.segment_k :]
    return _in_steps(ends.reshape(problem.groups, problem.n, 1, -1), problem, k_per_step)


def _runs(w: NDArray[Any], problem: ConvProblem) -> NDArray[Any]:
    """[groups, n, segments, inputs]."""
    runs = w.transpose(0, 2, 3, 1)
    return runs.reshape(problem.groups, problem.n, problem.segments, -1)


def _in_steps(runs: NDArray[Any], problem: ConvProblem, k_per_step: int) -> NDArray[Any]:
    """[groups, n, segments, inputs] to [groups * blocks, 16, segments, steps, k_per_step]."""
    segments, inputs = runs.shape[2:]
    steps = -(-inputs // k_per_step)
    unused = problem.blocks * LANES - problem.n
    runs = np.pad(runs, ((0, 0), (0, unused), (0, 0), (0, steps * k_per_step - inputs)))
    return runs.reshape(problem.groups * problem.blocks, LANES, segments, steps, k_per_step)


@dataclass(frozen=True)
class Pieces:
    """`total` cut into `count` near-equal pieces.

    The first `big_count` hold `size`, the others size - 1.
    """

    total: int
    count: int
    size: int
    big_count: int

    @staticmethod
    def of(total: int, at_most: int) -> Pieces:
        """The fewest pieces of at most `at_most`, as equal as can be."""
        count = -(-total // at_most)
        size = -(-total // count)
        return Pieces(total, count, size, total - (size - 1) * count)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The distinct sizes, larger first."""
        return (self.size,) if self.big_count == self.count else (self.size, self.size - 1)


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: the tile one pass of the inner loop computes, and the order of tiles.

    Attributes:
        tile_h: output rows of a tile (at most; pieces are made even).
        tile_w: output columns of a tile.
        blocks: 16-channel blocks of a tile: a panel.
        panels_outside: walk the panels in the outer loop (large weights) instead of the inner one.
        prefetch_bytes: how far ahead weights are prefetched; 0 for none.
    """

    tile_h: int
    tile_w: int
    blocks: int
    panels_outside: bool = False
    prefetch_bytes: int = 0

    @property
    def plain(self) -> Config:
        """The tile alone: panels inside, nothing prefetched. Weights are packed the same for it."""
        return Config(self.tile_h, self.tile_w, self.blocks)

    def __str__(self) -> str:
        """As reports show it: rows x columns x channels."""
        text = f"{self.tile_h}x{self.tile_w}x{LANES * self.blocks}"
        text += " weights outside" if self.panels_outside else ""
        return text + (f" prefetch {self.prefetch_bytes}" if self.prefetch_bytes else "")


_L1_SETS, _LINE_BYTES = 64, 64
_WAYS = 8


def crowding(problem: ConvProblem, height: int, width: int) -> int:
    """The most positions of a height x width tile whose inputs lie in one set of L1."""
    down = problem.x.row * problem.stride[0] * np.arange(height)
    across = problem.x.pixel * problem.stride[1] * np.arange(width)
    lines = (down[:, None] + across).reshape(-1) // _LINE_BYTES
    return int(np.bincount(lines % _L1_SETS).max())


def tilings(problem: ConvProblem, most_rows: int, blocks: int, count: int) -> list[Config]:
    """The most promising tiles of at most `most_rows` positions, best guess first.

    The guess: every step of a tile costs one cycle a row and block, plus two to fetch weights and
    two per tile; twice that where its inputs lie in so few sets of L1 that they evict each other.

    Args:
        problem: the problem.
        most_rows: positions a tile may have (accumulator registers / blocks).
        blocks: 16-channel blocks of a tile.
        count: how many to return.
    """

    def cost(rows: Pieces, columns: Pieces) -> float:
        tiles = rows.count * columns.count
        variants = len(rows.sizes) * len(columns.sizes)
        crowded = crowding(problem, rows.size, columns.size) > _WAYS
        fetches = tiles * 2.0 * (1 + 1 / blocks) * (1 + crowded)
        return fetches + 0.01 * variants + 0.001 * columns.size

    found: dict[tuple[int, int], float] = {}
    for columns in range(1, min(problem.out_w, most_rows) + 1):
        across = Pieces.of(problem.out_w, columns)
        down = Pieces.of(problem.out_h, max(1, most_rows // across.size))
        if across.size * down.size <= most_rows:
            found[down.size, across.size] = cost(down, across)
    best = sorted(found, key=lambda key: (found[key], key))[:count]
    return [Config(height, width, blocks) for height, width in best]


# Sums that fit in vector registers beside weights, indices and inputs: 16 lanes are one, two or
# four registers.
_SUMS = {"avx512vnni": 28, "dotprod": 6, "avx2": 6, "vector": 3}
_MANY_REGISTERS = ("avx512vnni", "dotprod")
_PREFETCH_BYTES = 4096  # the time of about two tiles' steps: what L3 takes to answer
_NEAR_WEIGHTS_BYTES = 32 << 10  # up to here all panels stay in L1 between two tiles
_LARGE_WEIGHTS_BYTES = 256 << 10  # beyond this the weights leave L2 between two tiles


def tiles_for(
    problem: ConvProblem, isa: str, *, blocks: tuple[int, ...], count: int, spare: int = 0
) -> list[Config]:
    """Configurations worth timing, best guess first.

    Args:
        problem: the problem.
        isa: instruction set.
        blocks: panel widths to try, in 16-channel blocks; only divisors of the layer's blocks are
            taken. Where there are few positions, wider multiples of the first take the place of
            rows.
        count: tile shapes a width.
        spare: registers the format needs beyond four.
    """
    sums = max(1, _SUMS[isa] - (spare if isa in _MANY_REGISTERS else 0))
    positions = problem.out_h * problem.out_w
    widths = [b for b in blocks if problem.blocks % b == 0 and b <= max(sums, blocks[0])]
    if positions * 2 <= sums:
        step = blocks[0]
        most = min(problem.blocks, max(step, sums // positions), 8)
        wide = [b for b in range(step, most + 1, step) if problem.blocks % b == 0]
        widths = wide[-2:] or widths
    found = [c for width in widths for c in tilings(problem, max(1, sums // width), width, count)]
    weights_bytes = (
        problem.n * problem.groups * problem.segments * problem.segment_k * problem.x_bytes
    )
    if weights_bytes > _LARGE_WEIGHTS_BYTES and positions > sums:
        found += [replace(config, panels_outside=True) for config in found]
    if weights_bytes <= _NEAR_WEIGHTS_BYTES or isa != "avx512vnni":
        return found
    ahead = [replace(config, prefetch_bytes=_PREFETCH_BYTES) for config in found]
    # What leaves L2 between two tiles is always prefetched: in a trial it may lie nearer by chance.
    return ahead if weights_bytes > _LARGE_WEIGHTS_BYTES else found + ahead

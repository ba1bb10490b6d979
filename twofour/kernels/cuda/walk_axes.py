"""The axes of a walk: as few as there can be, and shared out among the programs of a grid.

Axes of one element are dropped, the rest is ordered by the strides of one operand, and neighbours
that are one run of memory in every operand are merged.

A program does a block of rows times columns. Which lanes of a block lie side by side in a thread is
decided by Triton for each operand: where one is contiguous along the rows and another one along the
columns, the block is turned around in shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from twofour.kernels.cuda.problem import Ref


@dataclass(frozen=True)
class Axis:
    """One loop.

    Attributes:
        count: its turns.
        steps: elements that a turn moves each operand (inputs, then y).
    """

    count: int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """How a walk is cut; each group of axes counts as one, the last of its axes the fastest.

    Attributes:
        rows: of a block.
        columns: of a block.
        outer: one place a program.
        block: rows and columns, powers of 2.
        warps: of a program.
    """

    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    outer: tuple[Axis, ...]
    block: tuple[int, int]
    warps: int

    @property
    def pieces(self) -> tuple[int, int, int]:
        """Blocks along rows and columns, and how often: their product is the grid."""
        rows, columns = (
            -(-size(axes) // block)
            for axes, block in zip((self.rows, self.columns), self.block, strict=True)
        )
        return rows, columns, size(self.outer)


def size(axes: Sequence[Axis]) -> int:
    """Elements of a group."""
    return math.prod(axis.count for axis in axes)


def power(count: int) -> int:
    """The least power of 2 that is not below."""
    return 1 << max(count - 1, 0).bit_length()


def axes_of(dims: Sequence[int], refs: Sequence[Ref], leading: int = -1) -> tuple[Axis, ...]:
    """The fewest axes, outermost first.

    Args:
        dims: turns along each axis.
        refs: the operands.
        leading: the operand whose strides say the order.
    """
    found = [
        Axis(count, tuple(ref.strides[i] for ref in refs))
        for i, count in enumerate(dims)
        if count != 1
    ]
    found.sort(key=lambda axis: -abs(axis.steps[leading]))
    merged: list[Axis] = []
    for axis in found:
        run = tuple(step * axis.count for step in axis.steps)
        if merged and merged[-1].steps == run:
            merged[-1] = Axis(merged[-1].count * axis.count, axis.steps)
        else:
            merged.append(axis)
    return tuple(merged)


_PROGRAMS = 264  # enough for all multiprocessors of a large GPU, twice
_LINE_BYTES = 32
_NARROW = 64  # elements: a run shorter than that is no block


def tilings(
    axes: tuple[Axis, ...], sizes: Sequence[int], *, runs: bool = False
) -> tuple[Tiling, ...]:
    """Ways to cut a walk of elements, the best guess first.

    Args:
        axes: as `axes_of` gives them.
        sizes: bytes of an element of each operand.
        runs: what is read depends on the rows, so flat blocks would read element by element.
    """
    if not axes:
        return (Tiling((), (Axis(1, (1,) * len(sizes)),), (), (1, 1), 1),)
    inner, total = axes[-1], size(axes)
    usual = 2048 if min(sizes) == 1 else 1024
    first = max(min(power(total // _PROGRAMS), usual), 128)
    elements = [n for n in (first, first * 2, first * 4, first // 2) if 128 <= n <= 8192]
    found: list[Tiling] = []
    across = _across(axes, sizes)
    for n in elements:
        warps = 4 if n <= 2048 else 8
        if n < 512:
            warps = n // 128
        flat = Tiling((), axes, (), (1, n), warps)
        if across is not None:
            rest = tuple(a for i, a in enumerate(axes[:-1]) if i != across)
            tiles = [Tiling((axes[across],), (inner,), rest, block, warps)
                     for block in _turned(n, axes[across].count, inner.count)]  # fmt: skip
            found += [flat, *tiles] if inner.count < 8 else [*tiles, flat]
        elif len(axes) == 1 or (inner.count < _NARROW and not runs):
            found += [flat]
        else:
            rows = _by_rows(axes, n, warps)
            found += [rows] if runs else [rows, flat]
    return tuple(dict.fromkeys(found))


def _across(axes: tuple[Axis, ...], sizes: Sequence[int]) -> int | None:
    """The axis along which an input is contiguous that strides along y's own."""
    for which in range(len(sizes) - 1):
        apart = [abs(axis.steps[which]) * sizes[which] for axis in axes]
        near = [i for i, step in enumerate(apart[:-1]) if 0 < step < _LINE_BYTES]
        if near and apart[-1] >= _LINE_BYTES:
            return near[-1]
    return None


def _turned(elements: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """Blocks that are long enough both ways."""
    if power(columns) <= 16:
        return [(min(elements // power(columns), power(rows)), power(columns))]
    if power(rows) <= 16:
        return [(power(rows), min(elements // power(rows), power(columns)))]
    sides = [(32, elements // 32), (64, elements // 64)] if elements >= 2048 else [(32, 32)]
    return [(min(a, power(rows)), min(b, power(columns))) for a, b in sides]


def _by_rows(axes: tuple[Axis, ...], elements: int, warps: int) -> Tiling:
    """Runs of y's inner axis, several of them where they are short."""
    inner, rest = axes[-1], axes[:-1]
    even = inner.count & -inner.count
    columns = min(even if even >= _NARROW else power(inner.count), elements)
    rows = min(elements // columns, power(size(rest)))
    if rows == 1:
        return Tiling((), (inner,), rest, (1, columns), warps)
    return Tiling(rest, (inner,), (), (rows, columns), warps)

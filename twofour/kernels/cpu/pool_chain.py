"""Maxima of maxima, as a pyramid pooling has them: y1 = max(x), y2 = max(y1), ... in one kernel.

All windows are the same, with steps of one pixel and padding that keeps the size. A window that the
border clips has the maximum of one whose places beyond the border are those on it, so no tap is
left out, and a maximum over a window is one over its columns, then one over its rows:

    z[i, j] = max over a of y[clip(i + a), j]        written where the result will lie
    z[i, j] = max over b of z[i, clip(j + b)]        in place; columns read but overwritten are kept

For 5x5 that is 10 loads for a pixel instead of 25. Nobody waits for another thread between two
maxima: t0..t1 counts images, p0..p1 blocks of channels. The first argument is a table of pointers:
to x, then to each result.
"""

from __future__ import annotations

from itertools import pairwise

from twofour.core.numerics import Window
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.pool import (
    BYTES,
    PoolProblem,
    greater,
    load_block,
    lowest_of,
    mask_of,
    store_block,
    vector_of,
)
from twofour.kernels.cpu.problem import Strides


def can_chain(window: Window) -> bool:
    """Whether maxima over a window may follow each other in one kernel."""
    (kh, kw), half = window.kernel, (window.kernel[0] // 2, window.kernel[1] // 2)
    same = window.pads == (*half, *half) and kh % 2 == kw % 2 == 1
    return same and window.stride == (1, 1) and window.dilation == (1, 1)


def emit_pool_chain(name: str, problem: PoolProblem) -> str:
    """The kernel as an LLVM module.

    Args:
        name: its symbol.
        problem: a maximum with `further` ones, over a window for which `can_chain` holds.
    """
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )
    strides = [problem.x, problem.y, *problem.further]
    tensors = [f.load("ptr", "%x", 8 * i, 8) for i in range(len(strides))]

    def unit(image: Value, block: Value) -> list[Value]:
        first = f.int_op("mul", block, problem.lanes * BYTES[problem.kind])
        places = [
            _Plane(f.at(f.at(tensor, f.int_op("mul", image, by.image)), first), by)
            for tensor, by in zip(tensors, strides, strict=True)
        ]
        mask = mask_of(f, problem, block)
        for x, y in pairwise(places):
            _Maximum(f, problem, mask).emit(x, y)
        return []

    f.loop("%t0", "%t1", [], lambda t, _: f.loop("%p0", "%p1", [], lambda p, _: unit(t, p)))
    return module_text([f])


class _Plane:
    """A block of channels of an image: `pointer` to pixel (0, 0), and the strides."""

    def __init__(self, pointer: Value, strides: Strides) -> None:
        self.pointer, self.strides = pointer, strides

    def row(self, f: Function, i: Value) -> Value:
        """Pixel (i, 0)."""
        return f.at(self.pointer, f.int_op("mul", i, self.strides.row))

    def pixel(self, f: Function, row: Value, j: Value) -> Value:
        """Pixel j of a row."""
        return f.at(row, f.int_op("mul", j, self.strides.pixel))


class _Maximum:
    """One maximum of a block of channels of an image; `mask` says which lanes are channels."""

    def __init__(self, f: Function, problem: PoolProblem, mask: Value) -> None:
        self.f, self.problem, self.mask = f, problem, mask

    def emit(self, x: _Plane, y: _Plane) -> None:
        """Columns, then rows."""
        self.f.repeat(0, self.problem.height, lambda i: self._columns(x, y, i))
        self.f.repeat(0, self.problem.height, lambda i: self._row(y, i))

    def _columns(self, x: _Plane, y: _Plane, i: Value) -> None:
        """Row i of y: the maximum over the rows around it."""
        f, half = self.f, self.problem.window.kernel[0] // 2
        rows = [x.row(f, self._clipped(i, a, self.problem.height)) for a in range(-half, half + 1)]
        to = y.row(f, i)

        def column(j: Value) -> None:
            self._store(self._most([self._load(x.pixel(f, row, j)) for row in rows]), y, to, j)

        f.repeat(0, self.problem.width, column)

    def _row(self, y: _Plane, i: Value) -> None:
        """Row i of y in place: the maximum over the columns around each."""
        f, half, vector = self.f, self.problem.window.kernel[1] // 2, vector_of(self.problem)
        row = y.row(f, i)
        begin = self._load(row)

        def column(j: Value, before: list[Value]) -> list[Value]:
            ahead = [self._clipped(j, b, self.problem.width) for b in range(half + 1)]
            here, *after = [self._load(y.pixel(f, row, at)) for at in ahead]
            self._store(self._most([*before, here, *after]), y, row, j)
            return [*before[1:], here]

        if half:
            f.loop(0, self.problem.width, [(vector, begin)] * half, column)

    def _clipped(self, at: Value, by: int, count: int) -> Value:
        """Index `at` + `by`, or the nearest there is."""
        f = self.f
        if by == 0:
            return at
        moved, least = f.int_op("add", at, by), "llvm.smax.i64" if by < 0 else "llvm.smin.i64"
        return f.call("i64", least, ("i64", moved), ("i64", "0" if by < 0 else str(count - 1)))

    def _most(self, values: list[Value]) -> Value:
        best = lowest_of(self.problem)
        for value in values:
            best = greater(self.f, self.problem, value, best)
        return best

    def _load(self, at: Value) -> Value:
        return load_block(self.f, self.problem, at, self.mask)

    def _store(self, value: Value, y: _Plane, row: Value, j: Value) -> None:
        store_block(self.f, self.problem, value, y.pixel(self.f, row, j), self.mask)

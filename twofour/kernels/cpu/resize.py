"""Linear resizing of channels-last images: each pixel from its four neighbours.

    y[i, j, c] = r0 (c0 x[a, p, c] + c1 x[a, q, c]) + r1 (c0 x[b, p, c] + c1 x[b, q, c])

Rows a, b and columns p, q with their weights stand in tables beside the weights, as byte offsets,
so that any scale and any way to count coordinates is the same kernel. Sixteen channels at a time,
the last ones masked. Same kernel signature as nest.py: t0..t1 counts rows of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.problem import LANES, Strides
from twofour.kernels.cpu.rows import first_lanes, load16, store16
from twofour.kernels.cpu.vector import F32S

_ENTRY_BYTES = 24  # two offsets, two weights
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Tap:
    """What one row or column of the result is made of.

    Attributes:
        first: row or column of the input.
        second: the other one.
        weight: of the second; the first has the rest of 1.
    """

    first: int
    second: int
    weight: float


@dataclass(frozen=True)
class ResizeProblem:
    """One resizing of float32 images.

    Attributes:
        batch: images.
        height: rows of the result.
        width: columns of the result.
        channels: number of channels.
        x: input strides.
        y: output strides.
    """

    batch: int
    height: int
    width: int
    channels: int
    x: Strides
    y: Strides


def pack_resize(
    problem: ResizeProblem, rows: Sequence[Tap], columns: Sequence[Tap]
) -> NDArray[np.uint8]:
    """The tables: an entry for each row of the result, then one for each column.

    An entry is two int64 byte offsets into an image and two float32 weights.
    """
    table = np.zeros(len(rows) + len(columns), [("at", np.int64, 2), ("weight", np.float32, 2)])
    steps = [problem.x.row] * len(rows) + [problem.x.pixel] * len(columns)
    for entry, tap, step in zip(table, (*rows, *columns), steps, strict=True):
        weight = np.float32(tap.weight)
        entry["at"] = tap.first * step, tap.second * step
        entry["weight"] = np.float32(1) - weight, weight
    return table.view(np.uint8)


def emit_resize(name: str, problem: ResizeProblem) -> str:
    """The kernel as an LLVM module."""
    pointers = [("ptr", p) for p in "xwyr"]
    f = Function(name, pointers + [("i64", p) for p in ("t0", "t1", "p0", "p1")])
    f.loop("%t0", "%t1", [], lambda t, _: _row(f, problem, t))
    return module_text([f])


def _row(f: Function, problem: ResizeProblem, t: Value) -> list[Value]:
    """One row of the result."""
    image, row = f.int_op("udiv", t, problem.height), f.int_op("urem", t, problem.height)
    x = f.at("%x", f.int_op("mul", image, problem.x.image))
    lines, down = _entry(f, x, row)
    begin = f.int_op("mul", image, problem.y.image)
    y = f.at("%y", f.int_op("add", begin, f.int_op("mul", row, problem.y.row)))

    def column(j: Value, _: list[Value]) -> list[Value]:
        index = f.int_op("add", j, problem.height)
        taps = [_entry(f, line, index) for line in lines]
        to = f.at(y, f.int_op("mul", j, problem.y.pixel))
        whole = problem.channels - problem.channels % LANES
        f.loop(0, whole, [], lambda c, _: _pixel(f, (taps, down), (to, c), ""), LANES)
        if problem.channels > whole:
            mask = first_lanes(problem.channels - whole)
            _pixel(f, (taps, down), (to, str(whole)), mask)
        return []

    f.loop(0, problem.width, [], column)
    return []


Entry = tuple[tuple[Value, Value], tuple[Value, Value]]
"""Two places, and two weights in each lane."""


_Taps = tuple[Sequence[Entry], tuple[Value, Value]]
"""Of a pixel: two columns in each of two rows, and the weights of the rows."""


def _entry(f: Function, base: Value, index: Value) -> Entry:
    """An entry of the tables, its offsets from `base`."""
    at = f.int_op("mul", index, _ENTRY_BYTES)
    entry = f.at("%w", at)
    first, second = (f.at(base, f.load("i64", entry, offset, 8)) for offset in (0, 8))
    low, high = (f.splat("float", f.load("float", entry, offset, 4)) for offset in (16, 20))
    return (first, second), (low, high)


def _pixel(
    f: Function,
    taps: tuple[Sequence[Entry], tuple[Value, Value]],
    to: tuple[Value, Value],
    mask: str,
) -> list[Value]:
    """Sixteen channels of one pixel."""
    (across, down), (y, channel) = taps, to
    at = f.int_op("mul", channel, _FLOAT_BYTES)

    def mixed(values: Sequence[Value], weights: Sequence[Value]) -> Value:
        parts = [f.let(f"fmul {F32S} {v}, {w}") for v, w in zip(values, weights, strict=True)]
        return f.let(f"fadd {F32S} {parts[0]}, {parts[1]}")

    lines = [
        mixed([load16(f, F32S, place, at, mask) for place in places], weights)
        for places, weights in across
    ]
    store16(f, F32S, mixed(lines, down), y, at, mask)
    return []

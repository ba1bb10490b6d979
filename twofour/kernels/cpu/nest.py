"""The loops around every convolution kernel.

    for each panel of output channels, for each piece of rows, for each piece of columns:
        one tile                                  (tile.py, or a kernel file's own)

`Config` says whether the panels are walked outside or inside the pieces.

A kernel has one signature, whatever it computes: `void kernel(x, w, y, r, t0, t1, p0, p1)`: row
pieces t0..t1 and panels p0..p1, so threads share a layer by ranges of either. `w` is laid out by
packing.py.

Of a problem with `open_rows` nobody knows the number of rows when its kernel is made: there t0..t1
are rows, and every call cuts its own into tiles of the configured height h and of h - 1. Where that
cannot be done (few rows), the rest that whole tiles leave goes through ever lower ones (`_ladder`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.dynamic import TENSOR
from twofour.core.numerics import Epilogue
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.packing import Format, header_bytes, pack, panel_bytes
from twofour.kernels.cpu.problem import LANES, Config, ConvProblem, Pieces
from twofour.kernels.cpu.tile import Tile

# Blocks of sums that fit in registers beside what any format needs: rows of a tall tile.
_TALL = {"avx512vnni": 20, "dotprod": 4, "avx2": 4, "vector": 2}

Pointers = dict[str, Value]
Visit = Callable[[Pointers, tuple[int, int]], None]


@dataclass(frozen=True)
class Panels:
    """How a kernel's panels lie in the packed weights and in the tensors.

    Attributes:
        size_bytes: of one packed panel.
        outputs: output channels of a panel.
        sharing: neighbouring panels that read the same inputs.
        inputs_bytes: from their inputs to those of the next.
        own_last: the panel with tile functions of its own, or -1.
    """

    size_bytes: int
    outputs: int
    sharing: int
    inputs_bytes: int
    own_last: int = -1


Tiles = Callable[[tuple[int, int], bool], Function]
"""Writes the tile function of a (height, width), for the `own_last` panel or for the others."""


@dataclass(frozen=True)
class Tiled:
    """Kernels made of a packed format and its inner loop: tile.py within the loops of this file.

    Attributes:
        format: packed format and inner loop.
        ends: whether what steps do not divide of the runs makes steps of its own, see
            conv_dense_ends.py.
        centre: what the kernel takes off each integer input as stored (neon.py).
    """

    format: Format
    ends: bool = False
    centre: int = 0

    def walked(self, problem: ConvProblem) -> ConvProblem:
        """The problem with runs as this kernel walks them."""
        if not self.ends:
            return problem
        return replace(problem, ends=problem.segment_k % self.format.k_per_step)

    def emit(self, name: str, problem: ConvProblem, config: Config, isa: str) -> str:
        """The kernel as an LLVM module."""
        problem = self.walked(problem)

        def tile(size: tuple[int, int], _: bool) -> Function:
            written = Tile(problem, self.format, config, *size, self.centre)
            return written.emit(f"{name}_tile_{size[0]}x{size[1]}", isa)

        panels = Panels(
            panel_bytes(problem, self.format, config.blocks),
            config.blocks * LANES,
            problem.blocks // config.blocks,
            problem.c * problem.x_bytes if problem.groups > 1 else 0,
        )
        return emit_loops(name, problem, config, panels, tile, _TALL[isa] // config.blocks)

    def pack(
        self,
        w: NDArray[Any],
        problem: ConvProblem,
        config: Config,
        epilogue: Epilogue,
        x_zero_point: int,
    ) -> NDArray[np.uint8]:
        """Weights and constants, see packing.py."""
        walked = self.walked(problem)
        if problem.dynamic != TENSOR:  # there a zero point is multiplied by the sum of the weights
            x_zero_point -= self.centre
        return pack(w, walked, self.format, config.blocks, epilogue, x_zero_point)

    def work(self, problem: ConvProblem, config: Config) -> tuple[int, int]:
        """Row pieces and panels."""
        return row_pieces(problem, config), problem.groups * problem.blocks // config.blocks


def row_pieces(problem: ConvProblem, config: Config) -> int:
    """Row pieces of all images; rows, where their number is open."""
    if problem.open_rows:
        return problem.out_h
    return problem.batch * Pieces.of(problem.out_h, config.tile_h).count


def emit_loops(
    name: str, problem: ConvProblem, config: Config, panels: Panels, tiles: Tiles, tall: int = 0
) -> str:
    """The kernel as an LLVM module.

    Args:
        name: its symbol.
        problem: what it computes.
        config: tile and order of the loops.
        panels: where the parts of a panel lie.
        tiles: writes the functions `tile(x, w, y, r, header, left)` that the loops call; `left`
            is the number of output channels from the panel on.
        tall: rows of a tile that fit in registers, where their number is open.
    """
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )
    down, across = Pieces.of(problem.out_h, config.tile_h), Pieces.of(problem.out_w, config.tile_w)
    walk = _Walk(f, problem, down, across, _ladder(problem, config, tall))
    # Which tile functions there are: of other panels, of the last one, or both.
    kinds = (False, True) if panels.own_last > 0 else (panels.own_last == 0,)
    written = {(size, k): tiles(size, k) for size in walk.tile_sizes() for k in kinds}

    def tile(at: Pointers, size: tuple[int, int], p: Value) -> None:
        """Calls the tile function of `size` on panel `p`."""
        arguments = _arguments(f, problem, panels, at, p)

        def call(kind: bool) -> None:
            f.do(f"call void @{written[size, kind].name}{arguments}")

        if len(kinds) == 1:
            call(kinds[0])
        else:
            last = f.let(f"icmp eq i64 {p}, {panels.own_last}")
            f.when(last, lambda: call(True), lambda: call(False))

    if config.panels_outside:
        walk.panels(lambda p: walk.pieces(lambda at, size: tile(at, size, p)))
    else:
        walk.pieces(lambda at, size: walk.panels(lambda p: tile(at, size, p)))
    return module_text([*written.values(), f])


def _arguments(f: Function, problem: ConvProblem, panels: Panels, at: Pointers, p: Value) -> str:
    """What a tile function gets for panel `p` of the tile at `at`."""
    w = f.at("%w", f.int_op("add", f.int_op("mul", p, panels.size_bytes), header_bytes(problem)))
    first = f.int_op("mul", p, panels.outputs)
    x = at["x"]
    if panels.inputs_bytes:
        shared = f.int_op("udiv", p, panels.sharing) if panels.sharing > 1 else p
        x = f.at(x, f.int_op("mul", shared, panels.inputs_bytes))
    y = f.at(at["y"], f.int_op("mul", first, problem.y_bytes))
    r = f.at(at["r"], f.int_op("mul", first, problem.r_bytes))
    left = f.int_op("sub", problem.n * problem.groups, first)
    return f"(ptr {x}, ptr {w}, ptr {y}, ptr {r}, ptr %w, i64 {left})"


@dataclass(frozen=True)
class _Walk:
    """The loops of one kernel over panels and tiles.

    Attributes:
        f: the kernel.
        problem: what it computes.
        down: output rows, cut.
        across: output columns, cut.
        ladder: heights of tiles where the number of rows is open, see `_ladder`.
    """

    f: Function
    problem: ConvProblem
    down: Pieces
    across: Pieces
    ladder: tuple[int, ...] = ()

    def tile_sizes(self) -> list[tuple[int, int]]:
        """Every (height, width) that occurs."""
        heights = self.ladder or self.down.sizes
        return [(height, width) for height in heights for width in self.across.sizes]

    def panels(self, visit: Callable[[Value], None]) -> None:
        """Emits a loop over the panels: for p in range(p0, p1): visit(p)."""
        self.f.repeat("%p0", "%p1", visit)

    def pieces(self, visit: Visit) -> None:
        """Emits a loop over the tiles of row pieces t0..t1: visit(pointers, size)."""
        if self.ladder:
            self._open_rows(visit)
            return
        self.f.repeat("%t0", "%t1", lambda t: self._rows(t, visit))

    def _rows(self, t: Value, visit: Visit) -> None:
        """The tiles of one row piece; the first `big_count` of an image are one row higher."""
        f, down = self.f, self.down
        image, piece = f.int_op("udiv", t, down.count), f.int_op("urem", t, down.count)
        mixed = len(down.sizes) == 2
        row = f.int_op("mul", piece, down.size - mixed)
        if mixed:
            more = f.call("i64", "llvm.umin.i64", ("i64", piece), ("i64", str(down.big_count)))
            row = f.int_op("add", row, more)
        at = {}
        for key, (whole, line) in self._strides().items():
            moved = f.int_op("add", f.int_op("mul", image, whole), f.int_op("mul", row, line))
            at[key] = f.at(f"%{key}", moved)
        if not mixed:
            self._columns(at, down.size, visit)
        else:
            f.when(
                f.let(f"icmp ult i64 {piece}, {down.big_count}"),
                lambda: self._columns(at, down.size, visit),
                lambda: self._columns(at, down.size - 1, visit),
            )

    def _open_rows(self, visit: Visit) -> None:
        """The tiles of rows t0..t1: of two neighbouring heights if they fit, else down the ladder.

        count tiles of `high` or high - 1 rows hold any number of rows from count * (high - 1) on.
        """
        f, first = self.f, "%t0"
        for high, lower in zip(self.ladder, (*self.ladder[1:], 0), strict=True):
            rows = f.int_op("sub", "%t1", first)
            whole = f.int_op("udiv", rows, high)
            if high > 1 and lower == high - 1:
                count = f.int_op("udiv", f.int_op("add", rows, lower), high)
                spare = f.int_op("sub", rows, f.int_op("mul", count, lower))
                even = f.let(f"icmp sge i64 {spare}, 0")
                whole = f.let(f"select i1 {even}, i64 {spare}, i64 {whole}")
            first = self._run(first, whole, high, visit)

    def _run(self, first: Value, count: Value, height: int, visit: Visit) -> Value:
        """So many tiles of one height from a row on; returns the row after them."""
        f = self.f

        def tile(i: Value) -> None:
            row = f.int_op("add", first, f.int_op("mul", i, height))
            strides = self._strides()
            at = {k: f.at(f"%{k}", f.int_op("mul", row, step)) for k, (_, step) in strides.items()}
            self._columns(at, height, visit)

        f.repeat(0, count, tile)
        return f.int_op("add", first, f.int_op("mul", count, height))

    def _strides(self) -> dict[str, tuple[int, int]]:
        """Of each operand, the bytes from one image and from one row of outputs to the next."""
        p = self.problem
        r = p.r or p.y
        return {
            "x": (p.x.image, p.x.row * p.stride[0]),
            "y": (p.y.image, p.y.row),
            "r": (r.image, r.row),
        }

    def _columns(self, at: Pointers, height: int, visit: Visit) -> None:
        """The tiles of one row piece of that height: first the wide ones, then the narrow ones."""
        across, problem = self.across, self.problem
        pixels = {
            "x": problem.x.pixel * problem.stride[1],
            "y": problem.y.pixel,
            "r": (problem.r or problem.y).pixel,
        }
        begin = 0
        counts = (across.big_count, across.count - across.big_count)
        for count, width in zip(counts, (across.size, across.size - 1), strict=True):
            start = {key: self.f.at(p, begin * pixels[key]) for key, p in at.items()}

            def turn(j: Value, start: Pointers = start, width: int = width) -> None:
                here = {
                    k: self.f.at(p, self.f.int_op("mul", j, width * pixels[k]))
                    for k, p in start.items()
                }
                visit(here, (height, width))

            if count:
                self.f.repeat(0, count, turn)
            begin += count * width


def _ladder(problem: ConvProblem, config: Config, tall: int) -> tuple[int, ...]:
    """Heights of tiles that any number of rows is a sum of; () where that number is known.

    They are the configured height h and h - 1, then halves down to 1. Where usual rows are too few
    for a tall tile, t and t - 1 come before, for shapes of more rows.
    """
    if not problem.open_rows:
        return ()
    heights = [config.tile_h]
    while heights[-1] > 1:
        heights.append(heights[-1] - 1 if len(heights) == 1 else heights[-1] // 2)
    if problem.out_h < tall - 1 and config.tile_h < tall - 1:
        heights = [tall, tall - 1, *heights]
    return tuple(heights)

"""Depthwise integer convolution: four rows of inputs interleaved, one dot product per column.

A lane is an output channel with an input channel of its own, so nothing is broadcast. Sixty-four
channels are 64 consecutive bytes of a pixel. The bytes of four input rows in one column are
interleaved (two levels of `vpunpck`) into four vectors of 16 lanes, each lane 4 taps of a channel:

    quad[k].lane[4 g + e] = (x[row 0, c], x[row 1, c], x[row 2, c], x[row 3, c]), c = 16g + 4k + e

One `vpdpbusd` then adds a column of the filter. The four rows serve two rows of outputs (weights
w0 w1 w2 0 and 0 w0 w1 w2), and every column of filters that covers them: 3x3 costs 3 dot products
and 1 shuffle per 16 outputs. The order of lanes is that of `vpackssdw` and `vpackuswb`, so four
vectors of results narrow to 64 bytes in their place.

The last 1-32 channels of a layer would leave lanes idle: there the 64 bytes are 32 channels of two
strips of columns, or 16 channels of four. Layout of a panel:

    for rows in the distinct places of a filter column in a quad: for column in KW: for k in 4:
        for lane in 16: for e in 4: w[channel(k, lane), rows[e], column], 0 where rows[e] is none
    16 x i32 start for k in 4; then scale, bias likewise; or, where epilogue.py does the rest, as
    packing.py has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import Epilogue
from twofour.kernels.cpu.depthwise_tile import GROUP, VECTORS, Taps, Tile, narrows, places_of
from twofour.kernels.cpu.llvm import Function
from twofour.kernels.cpu.nest import Panels, emit_loops, row_pieces
from twofour.kernels.cpu.packing import CONSTANTS_BYTES, header, starts
from twofour.kernels.cpu.problem import LANES, Config, ConvProblem, Pieces
from twofour.kernels.cpu.tactic import Tactic, Weights
from twofour.kernels.cpu.vector import Vector

_SUMS = 24  # accumulators that fit beside a quad and what the epilogue needs

Array = NDArray[Any]


def _tallest(problem: ConvProblem, config: Config) -> int:
    """Rows of the highest tile."""
    return Pieces.of(problem.out_h, config.tile_h).size


def _strips(problem: ConvProblem) -> int:
    """Strips of columns side by side in the last panel."""
    rest = problem.groups % GROUP
    return 1 if not narrows(problem) or rest > GROUP // 2 else 2 if rest > LANES else 4


@dataclass(frozen=True)
class Interleaved:
    """The kernel and its packed weights."""

    def emit(self, name: str, problem: ConvProblem, config: Config, isa: str) -> str:
        """The kernel as an LLVM module."""

        def tile(size: tuple[int, int], last: bool) -> Function:
            strips = _strips(problem) if last else 1
            channels = problem.groups % GROUP if last else GROUP
            f = Function(
                f"{name}_tile_{size[0]}x{size[1]}{'_last' if last else ''}",
                [("ptr", p) for p in "xwyrh"] + [("i64", "left")],
                linkage="internal",
            )
            places = places_of(problem, _tallest(problem, config))
            Tile(Vector(isa, f), problem, places, *size, channels, strips).emit()
            return f

        own = problem.groups // GROUP if problem.groups % GROUP else -1
        panels = Panels(_panel_bytes(problem, config), GROUP, 1, GROUP, own)
        return emit_loops(name, problem, config, panels, tile)

    def pack(
        self,
        w: Weights,
        problem: ConvProblem,
        config: Config,
        epilogue: Epilogue,
        x_zero_point: int,
    ) -> NDArray[np.uint8]:
        """Weights and constants, see the head of this file."""
        channels = problem.groups
        start = starts(w, x_zero_point)
        scale, bias = (c.astype(np.float32).view(np.int32) for c in (epilogue.scale, epilogue.bias))
        places = places_of(problem, _tallest(problem, config))
        columns = np.stack([_column(w[:, 0], taps) for taps in places], axis=1)
        columns = columns.reshape(channels, -1).view(np.int32)  # places x KW
        panels = []
        for begin in range(0, channels, GROUP):
            part = slice(begin, begin + GROUP)
            repeat = _strips(problem) if begin + GROUP > channels else 1
            after = [_lanes(v[part, None], repeat) for v in (start, scale, bias)]
            if not narrows(problem):
                natural = [_padded(v[part], GROUP).reshape(VECTORS, LANES) for v in (scale, bias)]
                zeros = np.zeros_like(natural[0])
                after = [after[0], np.stack([zeros, *natural], axis=1)]
            panels += [_lanes(columns[part], repeat).reshape(-1), *(a.reshape(-1) for a in after)]
        return np.concatenate([header(epilogue), np.concatenate(panels).view(np.uint8)])

    def work(self, problem: ConvProblem, config: Config) -> tuple[int, int]:
        """Row pieces and panels."""
        return row_pieces(problem, config), -(-problem.groups // GROUP)


def _panel_bytes(problem: ConvProblem, config: Config) -> int:
    """Bytes of a panel: weights and constants."""
    constants = 3 * GROUP * 4 if narrows(problem) else GROUP * 4 + VECTORS * CONSTANTS_BYTES
    places = places_of(problem, _tallest(problem, config))
    return len(places) * problem.kernel[1] * GROUP * 4 + constants


def _column(w: Array, taps: Taps) -> Array:
    """[C, KH, KW] -> [C, KW, 4]: the filter rows `taps`, zeros for none."""
    picked = [w[:, tap] if tap >= 0 else np.zeros_like(w[:, 0]) for tap in taps]
    return np.ascontiguousarray(np.stack(picked, axis=2))


def _padded(values: Array, count: int) -> Array:
    """`values` with zeros after them."""
    return np.pad(values, [(0, count - len(values)), *[(0, 0)] * (values.ndim - 1)])


def _lanes(values: Array, strips: int) -> Array:
    """[at most 64, T] -> [T, 4, 16]: the order of lanes, repeated for each strip."""
    full = np.concatenate([_padded(values, GROUP // strips)] * strips)
    split = full.reshape(VECTORS, VECTORS, 4, -1)  # 16-byte group, vector, lane of the group
    return split.transpose(3, 1, 0, 2).reshape(-1, VECTORS, LANES)


def _refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    return "" if isa == "avx512vnni" else "needs AVX-512 with VNNI"


def _configs(problem: ConvProblem, isa: str) -> list[Config]:
    """Tiles whose sums stay in registers: two rows of outputs if that leaves enough columns."""
    reach = (problem.kernel[1] - 1) * problem.dilation[1] + 1
    columns = min(-(-reach // problem.stride[1]), problem.out_w)  # with sums begun, none finished
    height = 2 if problem.out_h > 1 and columns * 2 * VECTORS <= _SUMS else 1
    fits = columns * height * VECTORS <= _SUMS
    widths = [Pieces.of(problem.out_w, w).size for w in ((8, 14) if fits else (_SUMS // VECTORS,))]
    found = [Config(height, width, VECTORS) for width in widths]
    return list(dict.fromkeys([*found, replace(found[0], panels_outside=True)]))


TACTICS = (Tactic("depthwise", "int8", "", Interleaved(), _refuse, _configs, depthwise=True),)

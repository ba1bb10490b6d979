"""Depthwise convolution, 16 channels at a time: floats, and integers on any instruction set.

Lanes are 16 output channels, each with an input channel of its own; a tile's sums stay in registers
while each input is read once and added to every position whose window holds it. A product of a byte
and a weight of 16 bits fits LLVM's `vpmaddwd`. Inputs in bfloat16 become float32 as they are read:
that costs more than it saves in a near cache, and less than the bytes it saves in a whole network.
Layout of a panel:

    for row in KH: for column in KW: for lane in 16: w[lane, row, column]   (int16 for int8)
    16 x i32 start, 16 x f32 scale, 16 x f32 bias
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import Epilogue
from twofour.kernels.cpu.epilogue import emit_epilogue
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.nest import Panels, emit_loops, row_pieces
from twofour.kernels.cpu.packing import CONSTANTS_BYTES, header, starts
from twofour.kernels.cpu.problem import LANES, Config, ConvProblem, tilings
from twofour.kernels.cpu.rows import from_bfloats
from twofour.kernels.cpu.tactic import Tactic, Weights
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, WORDS16, Vector

# Positions of a tile: their sums, and beside them the filter where registers allow.
_POSITIONS = {"avx512vnni": 16, "dotprod": 5, "avx2": 5, "vector": 2}


@dataclass(frozen=True)
class Lanes:
    """The kernel and its packed weights."""

    def emit(self, name: str, problem: ConvProblem, config: Config, isa: str) -> str:
        """The kernel as an LLVM module."""

        def tile(size: tuple[int, int], _: bool) -> Function:
            f = Function(
                f"{name}_tile_{size[0]}x{size[1]}",
                [("ptr", p) for p in "xwyrh"] + [("i64", "left")],
                linkage="internal",
            )
            _emit_tile(Vector(isa, f), problem, *size)
            return f

        size = _weights_bytes(problem) + CONSTANTS_BYTES
        panels = Panels(size, LANES, 1, LANES * problem.x_bytes)
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
        channels, blocks = problem.groups, -(-problem.groups // LANES)
        start = np.zeros(channels, np.int32)
        if problem.dtype == "int8":
            start = starts(w, x_zero_point)
        taps = w.reshape(channels, -1).astype(np.int16 if problem.dtype == "int8" else np.float32)
        scale, bias = (c.astype(np.float32).view(np.int32) for c in (epilogue.scale, epilogue.bias))
        parts = []
        for part in (taps, *(c[:, None] for c in (start, scale, bias))):
            padded = np.pad(part, ((0, blocks * LANES - channels), (0, 0)))
            lanes = padded.reshape(blocks, LANES, -1).transpose(0, 2, 1)
            parts.append(np.ascontiguousarray(lanes).reshape(blocks, -1).view(np.uint8))
        return np.concatenate([header(epilogue), np.concatenate(parts, axis=1).reshape(-1)])

    def work(self, problem: ConvProblem, config: Config) -> tuple[int, int]:
        """Row pieces and panels."""
        return row_pieces(problem, config), -(-problem.groups // LANES)


def _tap_bytes(problem: ConvProblem) -> int:
    """Bytes of one tap of 16 channels."""
    return LANES * (2 if problem.dtype == "int8" else 4)


def _weights_bytes(problem: ConvProblem) -> int:
    """Bytes of a panel's weights."""
    return problem.kernel[0] * problem.kernel[1] * _tap_bytes(problem)


def _emit_tile(v: Vector, problem: ConvProblem, height: int, width: int) -> None:
    """The function `tile(x, w, y, r, h, left)` of `height` x `width` positions."""
    f = v.f
    constants = f.at("%w", _weights_bytes(problem))
    first = f.load(I32S, constants, 0, 4) if problem.dtype == "int8" else "zeroinitializer"
    spots = [(i, j) for i in range(height) for j in range(width)]
    sums = dict.fromkeys(spots, first)
    for (row, column), uses in _uses(problem, spots).items():
        x = _input(f, problem, row * problem.x.row + column * problem.x.pixel)
        for spot, tap in uses:
            sums[spot] = _add(v, problem, sums[spot], x, tap)
    emit_epilogue(v, problem, spots, list(sums.values()), constants, 1)


Uses = dict[tuple[int, int], list[tuple[tuple[int, int], int]]]


def _uses(problem: ConvProblem, spots: list[tuple[int, int]]) -> Uses:
    """Input pixel -> the positions that read it, each with the tap, pixels in order."""
    (kh, kw), (sh, sw), (dh, dw) = problem.kernel, problem.stride, problem.dilation
    found: Uses = {}
    for i, j in spots:
        for a in range(kh):
            for b in range(kw):
                pixel = (i * sh + a * dh, j * sw + b * dw)
                found.setdefault(pixel, []).append(((i, j), a * kw + b))
    return dict(sorted(found.items()))


def _input(f: Function, problem: ConvProblem, offset: int) -> Value:
    """16 channels of one pixel."""
    if problem.dtype == "int8":
        return f.let(f"zext {BYTES16} {f.load(BYTES16, '%x', offset)} to {I32S}")
    if problem.dtype == "bfloat16":
        return from_bfloats(f, f.load(WORDS16, "%x", offset))
    return f.load(F32S, "%x", offset)


def _add(v: Vector, problem: ConvProblem, total: Value, x: Value, tap: int) -> Value:
    """The sum of one position, one product later."""
    f, at = v.f, tap * _tap_bytes(problem)
    if problem.dtype != "int8":
        return v.fma(total, x, f.load(F32S, "%w", at, 64))
    w = f.let(f"sext <16 x i16> {f.load('<16 x i16>', '%w', at, 32)} to {I32S}")
    return f.let(f"add {I32S} {total}, {f.let(f'mul {I32S} {x}, {w}')}")


def _refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    return ""


def _configs(problem: ConvProblem, isa: str) -> list[Config]:
    """Tiles of several positions; one, where integers have a faster kernel as well."""
    found = tilings(problem, _POSITIONS[isa], 1, 1 if problem.dtype == "int8" else 2)
    if problem.dtype == "int8" and isa == "avx512vnni":
        return found
    return [*found, replace(found[0], panels_outside=True)]


TACTICS = tuple(
    Tactic("depthwise 16", dtype, "", Lanes(), _refuse, _configs, depthwise=True)
    for dtype in ("int8", "bfloat16", "float32")
)

"""One tile of a depthwise integer convolution on AVX-512: quads, dot products, narrowing.

conv_depthwise.py tells how it works and how its weights are packed.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.kernels.cpu.epilogue import activated, emit_epilogue, narrow_of, scalars, scaled
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.narrow import Narrow
from twofour.kernels.cpu.problem import LANES, ConvProblem
from twofour.kernels.cpu.vector import BYTES64, F32S, I32S, Vector

GROUP = 64  # channels of a panel: the bytes of a register
VECTORS = GROUP // LANES

Taps = tuple[int, ...]
Quad = tuple[Taps, Taps]
"""Four input rows, counted from the tile's first, and the filter row of each (-1: none)."""


def quads_of(problem: ConvProblem, row: int) -> list[Quad]:
    """The quads of one output row of a tile: as few as can be, begun where others share them."""
    kernel, dilation = problem.kernel[0], problem.dilation[0]
    unit, phase = divmod(row * problem.stride[0], dilation)
    align = min((4, 2, 1), key=lambda a: (-(-(unit % a + kernel) // 4), -a))
    first = unit - unit % align
    quads = []
    for begin in range(first, unit + kernel, 4):
        places = range(begin, begin + 4)
        taps = tuple(p - unit if 0 <= p - unit < kernel else -1 for p in places)
        quads.append((tuple(phase + dilation * p for p in places), taps))
    return quads


def places_of(problem: ConvProblem, height: int) -> list[Taps]:
    """The distinct places of filter rows in a quad, in the order of the packed weights."""
    rows = (quad for row in range(height) for quad in quads_of(problem, row))
    return list(dict.fromkeys(taps for _, taps in rows))


def narrows(problem: ConvProblem) -> bool:
    """Whether the tile stores by itself: bytes, without a residual."""
    return problem.out == "int8" and not problem.add


@dataclass(frozen=True)
class Tile:
    """`height` x `width` positions of a panel, straight on.

    Input columns are walked once; a column of outputs is finished as soon as its last input has
    come.

    Attributes:
        v: emits into `tile(x, w, y, r, h, left)`.
        problem: what is computed.
        places: of filter rows in quads, as packed.
        height: output rows.
        width: output columns.
        channels: of the panel.
        strips: of columns, side by side in a register.
    """

    v: Vector
    problem: ConvProblem
    places: list[Taps]
    height: int
    width: int
    channels: int
    strips: int

    @property
    def _across(self) -> int:
        """Columns of a strip; the last one may overlap."""
        return -(-self.width // self.strips)

    @property
    def _starts(self) -> list[int]:
        """The first output column of each strip."""
        last = self.width - self._across
        return [min(i * self._across, last) for i in range(self.strips)]

    def emit(self) -> None:
        """The whole tile."""
        f, problem = self.v.f, self.problem
        (_, kw), (_, sw), (_, dw) = problem.kernel, problem.stride, problem.dilation
        weights = len(self.places) * kw * GROUP * 4
        narrow = narrow_of(self.v, problem) if narrows(problem) else None
        sums: dict[tuple[int, int], list[Value]] = {}
        for column in range((self._across - 1) * sw + (kw - 1) * dw + 1):
            taps = [(column - t * dw, t) for t in reversed(range(kw))]
            uses = [
                (at // sw, t) for at, t in taps if at % sw == 0 and 0 <= at // sw < self._across
            ]
            quads = self._quads(column) if uses else {}
            for j, t in uses:
                for i in range(self.height):
                    before = sums.get((i, j)) or [
                        f.load(I32S, "%w", weights + 64 * k, 64) for k in range(VECTORS)
                    ]
                    sums[i, j] = self._add(before, i, t, quads)
                if t == kw - 1:
                    done = [sums.pop((i, j)) for i in range(self.height)]
                    self._finish(j, done, narrow, weights)

    def _add(
        self, sums: list[Value], row: int, column: int, quads: dict[Taps, list[Value]]
    ) -> list[Value]:
        """One column of the filter for one output row."""
        f, kw = self.v.f, self.problem.kernel[1]
        for rows, taps in quads_of(self.problem, row):
            first = (self.places.index(taps) * kw + column) * GROUP * 4
            sums = [
                self.v.dot4(s, q, f.load(I32S, "%w", first + 64 * k, 64))
                for k, (s, q) in enumerate(zip(sums, quads[rows], strict=True))
            ]
        return sums

    def _quads(self, column: int) -> dict[Taps, list[Value]]:
        """The interleaved inputs of one column, by their rows."""
        needed = [q for row in range(self.height) for q in quads_of(self.problem, row)]
        used = {r for rows, taps in needed for r, tap in zip(rows, taps, strict=True) if tap >= 0}
        loaded: dict[int, Value] = {}
        pairs: dict[Taps, list[Value]] = {}

        def line(row: int) -> Value:
            if row not in loaded:
                loaded[row] = self._load(row, column)
            return loaded[row]

        def pair(upper: int, lower: int) -> list[Value]:
            if (upper, lower) not in pairs:
                # Rows that no filter covers have zero weights: any other byte serves.
                a, b = (r if r in used else other for r, other in ((upper, lower), (lower, upper)))
                if a not in used:
                    a = b = min(used)
                pairs[upper, lower] = _unpack(self.v.f, line(a), line(b), 8)
            return pairs[upper, lower]

        quads = {}
        for rows, _ in needed:
            if rows not in quads:
                up, down = pair(*rows[:2]), pair(*rows[2:])
                quads[rows] = [
                    q for a, b in zip(up, down, strict=True) for q in _unpack(self.v.f, a, b, 16)
                ]
        return quads

    def _load(self, row: int, column: int) -> Value:
        """64 bytes: a panel's channels of one pixel, of each strip."""
        f, x = self.v.f, self.problem.x
        size = GROUP // self.strips
        step = self.problem.stride[1] * x.pixel
        at = row * x.row + column * x.pixel
        parts = [f.load(f"<{size} x i8>", "%x", at + start * step) for start in self._starts]
        while len(parts) > 1:
            pick = ", ".join(f"i32 {i}" for i in range(2 * size))
            kind = f"<{size} x i8>"
            parts = [
                f.let(f"shufflevector {kind} {a}, {kind} {b}, <{2 * size} x i32> <{pick}>")
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
            size *= 2
        return parts[0]

    def _finish(self, j: int, rows: list[list[Value]], narrow: Narrow | None, weights: int) -> None:
        """Requantizes and stores column `j` of each strip, the sums of its rows given."""
        f, y = self.v.f, self.problem.y
        if narrow is None:
            spots = [(i, j) for i in range(self.height)]
            sums = [s for row in rows for s in _natural(f, row)]
            constants = f.at("%w", weights + 4 * GROUP)
            emit_epilogue(self.v, self.problem, spots, sums, constants, VECTORS)
            return
        size, values = GROUP // self.strips, self._results(rows, weights)
        for i, value in enumerate(narrow.packed(four) for four in values):
            for index, start in enumerate(self._starts):
                where = i * y.row + (start + j) * y.pixel
                _store(f, value, index * size, min(size, self.channels), where)

    def _results(self, rows: list[list[Value]], weights: int) -> list[list[Value]]:
        """The sums of each row scaled and activated; constants are read once for all rows."""
        f, problem = self.v.f, self.problem
        fixed = scalars(f, problem)
        columns = []
        for k, sums in enumerate(zip(*rows, strict=True)):
            at = weights + 64 * k
            constants = [f.load(F32S, "%w", at + GROUP * 4 * part, 64) for part in (1, 2)]
            scales = [scaled(self.v, problem, total, constants) for total in sums]
            columns.append([activated(self.v, problem, value, fixed) for value in scales])
        return [list(four) for four in zip(*columns, strict=True)]


def _unpack(f: Function, a: Value, b: Value, bits: int) -> list[Value]:
    """`vpunpckl` and `vpunpckh` in each 16 bytes: a0 b0 a1 b1 ...; of words, to 16 lanes."""
    lanes = GROUP * 8 // bits
    kind, group = f"<{lanes} x i{bits}>", lanes // 4
    a, b = (f.let(f"bitcast {BYTES64} {v} to {kind}") for v in (a, b))
    out = []
    for half in (0, group // 2):
        pick = [
            f"i32 {source + 16 * 8 // bits * g + half + i}"
            for g in range(4)
            for i in range(group // 2)
            for source in (0, lanes)
        ]
        mixed = f.let(f"shufflevector {kind} {a}, {kind} {b}, <{lanes} x i32> <{', '.join(pick)}>")
        out.append(f.let(f"bitcast {kind} {mixed} to {BYTES64 if bits == 8 else I32S}"))
    return out


def _natural(f: Function, sums: list[Value]) -> list[Value]:
    """Four vectors in the order of quads -> in the order of channels."""

    def join(a: Value, b: Value, pick: list[int]) -> Value:
        picks = ", ".join(f"i32 {i}" for i in pick)
        return f.let(f"shufflevector {I32S} {a}, {I32S} {b}, <16 x i32> <{picks}>")

    lower, upper = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
    even = [*range(4), *range(8, 12), *range(16, 20), *range(24, 28)]
    odd = [i + 4 for i in even]
    halves = [[join(sums[0], sums[1], p), join(sums[2], sums[3], p)] for p in (lower, upper)]
    return [join(a, b, pick) for a, b in halves for pick in (even, odd)]


def _store(f: Function, value: Value, first: int, count: int, where: int) -> None:
    """Stores `count` of 64 bytes from the `first` on, in pieces of powers of two."""
    done = 0
    while done < count:
        size = 1 << ((count - done).bit_length() - 1)
        if size == GROUP:
            part = value
        else:
            pick = ", ".join(f"i32 {first + done + i}" for i in range(size))
            part = f.let(
                f"shufflevector {BYTES64} {value}, {BYTES64} poison, <{size} x i32> <{pick}>"
            )
        f.store(f"<{size} x i8>", part, "%y", where + done)
        done += size

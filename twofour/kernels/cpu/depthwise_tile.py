"""One tile of a depthwise integer convolution on AVX-512: quads, dot products, narrowing.

conv_depthwise.py tells how it works and how its weights are packed.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.core.functions import CLAMPS
from twofour.kernels.cpu.epilogue import emit_epilogue
from twofour.kernels.cpu.functions import emit_activation
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES, ConvProblem
from twofour.kernels.cpu.vector import BYTES64, F32S, I32S, Vector

GROUP = 64  # channels of a panel: the bytes of a register
VECTORS = GROUP // LANES
_WORDS = "<32 x i16>"

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
        narrow = (
            _Narrow.of(f, problem.activation, f.at("%w", weights)) if narrows(problem) else None
        )
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

    def _finish(
        self, j: int, rows: list[list[Value]], narrow: _Narrow | None, weights: int
    ) -> None:
        """Requantizes and stores column `j` of each strip, the sums of its rows given."""
        f, y = self.v.f, self.problem.y
        if narrow is None:
            spots = [(i, j) for i in range(self.height)]
            sums = [s for row in rows for s in _natural(f, row)]
            constants = f.at("%w", weights + 4 * GROUP)
            emit_epilogue(self.v, self.problem, spots, sums, constants, VECTORS)
            return
        size = GROUP // self.strips
        for i, value in enumerate(narrow.bytes(rows)):
            for index, start in enumerate(self._starts):
                where = i * y.row + (start + j) * y.pixel
                _store(f, value, index * size, min(size, self.channels), where)


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


@dataclass(frozen=True)
class _Narrow:
    """Requantizes four vectors of sums to 64 bytes, as `core.numerics.requantize` does.

    The lower bound is applied after rounding, to bytes: rounded itself, it gives the same. What is
    too small for int32 converts to its smallest value, as a NaN does, and saturating packs turn
    that into the smallest byte.

    Attributes:
        f: the tile.
        activation: of the problem.
        constants: points at start, scale and bias.
        high: largest value, 16 times.
        zero: zero point of y, 32 words.
        low: smallest byte, 64 times.
    """

    f: Function
    activation: str
    constants: Value
    high: Value
    zero: Value
    low: Value

    @staticmethod
    def of(f: Function, activation: str, constants: Value) -> _Narrow:
        """Reads the header."""
        high = f.splat("float", f.load("float", "%h", 12, 4))
        zero = f.load("i32", "%h", 16, 4)
        low = f.let(f"insertelement <4 x float> poison, float {f.load('float', '%h', 8, 4)}, i32 0")
        low = f.call("i32", "llvm.x86.sse.cvtss2si", ("<4 x float>", low))
        least = f.let(f"trunc i32 {f.int_op('add', low, zero, 'i32')} to i8")
        words = f.splat("i16", f.let(f"trunc i32 {zero} to i16"), 32)
        return _Narrow(f, activation, constants, high, words, f.splat("i8", least, 64))

    def bytes(self, rows: list[list[Value]]) -> list[Value]:
        """64 stored bytes for the sums of each row."""
        f, rounded = self.f, []
        for k, sums in enumerate(zip(*rows, strict=True)):
            constants = [f.load(F32S, self.constants, GROUP * 4 * i + 64 * k, 64) for i in (1, 2)]
            rounded.append([self._rounded(total, *constants) for total in sums])
        return [self._packed(list(four)) for four in zip(*rounded, strict=True)]

    def _rounded(self, total: Value, scale: Value, bias: Value) -> Value:
        """One vector scaled, activated, at most `high`, rounded half to even."""
        f = self.f
        value = f.let(f"sitofp {I32S} {total} to {F32S}")
        value = f.let(f"fmul {F32S} {value}, {scale}")
        value = f.let(f"fadd {F32S} {value}, {bias}")
        if self.activation not in CLAMPS:
            value = emit_activation(f, self.activation, value, short=True)
            factor = f.splat("float", f.load("float", "%h", 20, 4))
            value = f.let(f"fmul {F32S} {value}, {factor}")
        high, nearest = (F32S, self.high), ("i32", "4")  # 4: rounding as the CPU is set, to even
        value = f.call(F32S, "llvm.x86.avx512.min.ps.512", high, (F32S, value), nearest)
        whole = "llvm.x86.avx512.mask.cvtps2dq.512"
        none = (I32S, "zeroinitializer")
        return f.call(I32S, whole, (F32S, value), none, ("i16", "-1"), nearest)

    def _packed(self, four: list[Value]) -> Value:
        """The bytes of four vectors, the zero point added."""
        f, zero, words = self.f, (_WORDS, self.zero), []
        for a, b in (four[:2], four[2:]):
            both = (_WORDS, f.call(_WORDS, "llvm.x86.avx512.packssdw.512", (I32S, a), (I32S, b)))
            words.append((_WORDS, f.call(_WORDS, "llvm.sadd.sat.v32i16", both, zero)))
        narrow = f.call(BYTES64, "llvm.x86.avx512.packuswb.512", *words)
        if not self.activation:
            return narrow
        return f.call(BYTES64, "llvm.umax.v64i8", (BYTES64, narrow), (BYTES64, self.low))

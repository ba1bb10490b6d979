"""Rounding real results to stored bytes, and storing them.

The meaning is `saturate(round_half_even(v))` within the bounds of the activation; the zero point is
part of v, except behind an activation that does more than clamp. On AVX-512:

    cvtps2dq     16 floats -> 16 int32
    pmaxsd       the lower bound, at least 0; pminsd only where the upper one is below 255
    pmovusdb     16 int32 -> 16 bytes in memory, saturated as unsigned numbers

This costs two thirds of joining four vectors first, as a gate (core/gates.py) does, which works on
words, and what is stored side by side:

    4 x cvtps2dq               16 floats   -> 16 int32
    2 x packssdw               2 x 16 int32 -> 32 int16
    1 x packuswb               2 x 32 int16 -> 64 uint8, 128-bit lane L holding, of each of the four
                               vectors, channels 4 L to 4 L + 3
    vpermd                     the four vectors one after the other

Elsewhere each vector is clipped as floats, rounded by adding 1.5 * 2**23, and truncated. Both give
the same bytes: the bounds are integers, so it does not matter whether they are applied before or
after rounding. A conversion to int32 turns what is too large into the smallest number; so where
sums are not known to stay below 2**31 they are clipped from above first. NaN becomes the lower
bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twofour.kernels.cpu.gates import GateTable
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.vector import (
    BYTES16,
    BYTES64,
    F32S,
    I32S,
    LANES,
    ROUND,
    WORDS32,
    Vector,
    every,
    float_bits,
)

AT_ONCE = 4
_BELOW_INT32 = 2.0**30


@dataclass(frozen=True)
class Target:
    """Where one vector of 16 results goes.

    Attributes:
        offset: bytes from the pointer.
        mask: which lanes are stored, <16 x i1>; "" for all.
        pointer: of the output.
    """

    offset: int
    mask: Value
    pointer: Value = "%y"


@dataclass(frozen=True)
class Rounding:
    """What there is to do besides rounding and the range of a byte.

    Attributes:
        bounded: nothing: every result is known to be below 2**31 in size.
        moves: the zero point is added to what was rounded; else it is part of the value, or 0.
        clips: the upper bound may be below 255.
        gate: the activation is a table, which the header holds, and so is the zero point.
        adds: the table's results get a residual.
    """

    bounded: bool
    moves: bool = True
    clips: bool = False
    gate: bool = False
    adds: bool = False


class Narrow:
    """Stores results as bytes.

    Args:
        v: emits the operations.
        header: points at the packed weights' header, see packing.py.
        rounding: what there is to do.
    """

    def __init__(self, v: Vector, header: Value, rounding: Rounding) -> None:
        """Loads the bounds and the zero point, or the table."""
        f = v.f
        self.v, self.rounding = v, rounding
        self.gate = GateTable(f, header, v.isa, adds=rounding.adds) if rounding.gate else None
        if rounding.gate:
            return
        zero = f.load("i32", header, 16, 4)
        if v.isa != "avx512vnni":
            self.bounds = tuple(f.splat("float", f.load("float", header, at, 4)) for at in (8, 12))
            self.zero = f.splat("i8", f.let(f"trunc i32 {zero} to i8"))
            return
        self.zero = f.splat("i32", zero)
        ends = [f.load("i32", header, at, 4) for at in (24, 28)]
        self.ends = tuple(f.splat("i32", end) for end in ends)
        self.bytes = tuple(
            f.splat("i8", f.let(f"trunc i32 {end} to i8"), AT_ONCE * LANES) for end in ends
        )

    def store(
        self, values: Sequence[Value], targets: Sequence[Target], residuals: Sequence[Value] = ()
    ) -> None:
        """Rounds and stores up to `AT_ONCE` vectors of <16 x float>.

        `residuals`: what a gate adds behind itself, as stored, <16 x i32> each; () for nothing.
        """
        if self.v.isa == "avx512vnni" and self.gate:
            self._store_joined(values, targets, residuals)
            return
        for index, (value, target) in enumerate(zip(values, targets, strict=True)):
            if self.v.isa == "avx512vnni":
                self._store_whole(self._within(self._moved(self._rounded(value))), target)
            elif self.gate:
                r = residuals[index] if residuals else ""
                self._put(self.gate.bytes16(value, r), target)
            else:
                self._put(self._clipped(value), target)

    def _store_joined(
        self, values: Sequence[Value], targets: Sequence[Target], residuals: Sequence[Value]
    ) -> None:
        """Four vectors at once."""
        packed = self._in_order(self.packed(values, residuals))
        for first, last in _runs(targets):
            lanes = range(LANES * first, LANES * last)
            part = _part(self.v.f, packed, lanes)
            self._put(part, targets[first], len(lanes))

    def _store_whole(self, whole: Value, target: Target) -> None:
        """<16 x i32>, none below 0."""
        f = self.v.f
        mask = f.let(f"bitcast <16 x i1> {target.mask} to i16") if target.mask else "-1"
        arguments = (("ptr", f.at(target.pointer, target.offset)), (I32S, whole), ("i16", mask))
        f.call("void", "llvm.x86.avx512.mask.pmovus.db.mem.512", *arguments)

    def _put(self, value: Value, target: Target, lanes: int = LANES) -> None:
        """Stores bytes, masked where the target says so."""
        f, pointer = self.v.f, self.v.f.at(target.pointer, target.offset)
        if not target.mask:
            f.store(f"<{lanes} x i8>", value, pointer)
            return
        arguments = ((BYTES16, value), ("ptr", pointer), ("<16 x i1>", target.mask))
        f.call("void", "llvm.masked.store.v16i8.p0", *arguments)

    def packed(self, values: Sequence[Value], residuals: Sequence[Value] = ()) -> Value:
        """Four vectors as 64 bytes: in each 16, four of the first, of the second, ...; AVX-512."""
        f = self.v.f
        ints = [self._moved(self._rounded(value)) for value in values]
        words, more = self._words(ints), self._words(residuals) if residuals else ["", ""]
        pair = [
            (WORDS32, self.gate.words(both, r) if self.gate else both)
            for both, r in zip(words, more, strict=True)
        ]
        out = f.call(BYTES64, "llvm.x86.avx512.packuswb.512", *pair)
        if self.gate:
            return out
        low, high = self.bytes
        out = f.call(BYTES64, "llvm.umax.v64i8", (BYTES64, out), (BYTES64, low))
        if not self.rounding.clips:
            return out
        return f.call(BYTES64, "llvm.umin.v64i8", (BYTES64, out), (BYTES64, high))

    def _words(self, whole: Sequence[Value]) -> list[Value]:
        """Up to four vectors of <16 x i32> as two of <32 x i16>, saturated."""
        four = [*whole, *[whole[0]] * (AT_ONCE - len(whole))]
        name = "llvm.x86.avx512.packssdw.512"
        return [self.v.f.call(WORDS32, name, (I32S, a), (I32S, b)) for a, b in (four[:2], four[2:])]

    def _moved(self, whole: Value) -> Value:
        """Plus the zero point, where it is part of neither the value nor a table."""
        if self.gate or not self.rounding.moves:
            return whole
        return self.v.f.let(f"add {I32S} {whole}, {self.zero}")

    def _within(self, whole: Value) -> Value:
        """Not below the lower bound, nor above one that is below 255."""
        f, (low, high) = self.v.f, self.ends
        whole = f.call(I32S, "llvm.smax.v16i32", (I32S, whole), (I32S, low))
        if not self.rounding.clips:
            return whole
        return f.call(I32S, "llvm.smin.v16i32", (I32S, whole), (I32S, high))

    def _in_order(self, packed: Value) -> Value:
        """The four vectors one after the other."""
        f = self.v.f
        quads = f.let(f"bitcast {BYTES64} {packed} to {I32S}")
        order = ", ".join(f"i32 {4 * lane + vector}" for vector in range(4) for lane in range(4))
        quads = f.let(f"shufflevector {I32S} {quads}, {I32S} poison, <16 x i32> <{order}>")
        return f.let(f"bitcast {I32S} {quads} to {BYTES64}")

    def _rounded(self, value: Value) -> Value:
        """round_half_even, <16 x i32>."""
        f = self.v.f
        if not self.rounding.bounded:
            most = every("float", float_bits(_BELOW_INT32))
            above = f.let(f"fcmp ogt {F32S} {value}, {most}")  # false for NaN
            value = f.let(f"select <16 x i1> {above}, {F32S} {most}, {F32S} {value}")
        nearest = (("i16", "-1"), ("i32", "4"))  # all lanes, in the current rounding mode
        name = "llvm.x86.avx512.mask.cvtps2dq.512"
        return f.call(I32S, name, (F32S, value), (I32S, "zeroinitializer"), *nearest)

    def _clipped(self, value: Value) -> Value:
        """Sixteen bytes, by way of floats."""
        f, (low, high) = self.v.f, self.bounds
        above = f.let(f"fcmp ogt {F32S} {value}, {low}")  # as maxps: a NaN becomes the bound
        value = f.let(f"select <16 x i1> {above}, {F32S} {value}, {F32S} {low}")
        below = f.let(f"fcmp olt {F32S} {value}, {high}")
        value = f.let(f"select <16 x i1> {below}, {F32S} {value}, {F32S} {high}")
        shifted = f.let(f"fadd {F32S} {value}, {every('float', float_bits(ROUND))}")
        bits = f.let(f"bitcast {F32S} {shifted} to {I32S}")
        low_bytes = f.let(f"trunc {I32S} {bits} to {BYTES16}")
        return (
            f.let(f"add {BYTES16} {low_bytes}, {self.zero}") if self.rounding.moves else low_bytes
        )


def _runs(targets: Sequence[Target]) -> list[tuple[int, int]]:
    """Ranges of targets that one store serves: two or four neighbours without a mask."""
    runs, first = [], 0
    while first < len(targets):
        count = next((n for n in (4, 2) if _adjacent(targets[first : first + n], n)), 1)
        runs.append((first, first + count))
        first += count
    return runs


def _adjacent(targets: Sequence[Target], count: int) -> bool:
    """Whether `count` targets lie one after the other and are stored whole."""
    first = targets[0]
    return list(targets) == [
        Target(first.offset + LANES * i, "", first.pointer) for i in range(count)
    ]


def _part(f: Function, packed: Value, lanes: range) -> Value:
    """Some neighbouring bytes of 64."""
    if len(lanes) == 4 * LANES:
        return packed
    pick = ", ".join(f"i32 {lane}" for lane in lanes)
    return f.let(
        f"shufflevector {BYTES64} {packed}, {BYTES64} poison, <{len(lanes)} x i32> <{pick}>"
    )

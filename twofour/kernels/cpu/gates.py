"""The emitter of core/gates.py: activations whose result becomes a byte, by a table of 64 lines.

On AVX-512 they are 16-bit integers, 32 at a time, and `vpermi2w` looks a line up in two registers:
10 instructions for 32 results, where real numbers take 6 to 22 for 16. What saturates on the way
there is more than 255 steps, so it changes no byte. Elsewhere they are 32-bit integers, and the
line of each is loaded.

Packed:

    in the header (packing.py), from byte NUMBERS on: i32 limit, i32 index, i32 2**(15 - bits),
        i32 r_factor, i32 r_zero
    after it: 64 x i16 base + (zero_point << bits), 64 x i16 slope, and both once more as
        64 x (i16, i16) for those who load a line at a time
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twofour.core.gates import R_BITS, SEGMENTS, Gate
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.vector import (
    BYTES16,
    F32S,
    I32S,
    LANES,
    ROUND,
    WORDS32,
    every,
    float_bits,
)

GATE_BYTES = 2 * 4 * SEGMENTS
NUMBERS = 32
_TABLE = 64


def gate_numbers(gate: Gate) -> list[int]:
    """What the header holds of a gate, from byte NUMBERS on."""
    return [gate.limit, gate.index, 1 << 15 - gate.bits, gate.r_factor, gate.r_zero]


def gate_lines(gate: Gate, zero_point: int) -> NDArray[np.uint8]:
    """The table, uint8 [GATE_BYTES], the zero point as stored made part of the base."""
    base = gate.base + np.int16(zero_point << gate.bits)
    pairs = np.stack([base, gate.slope], axis=1)
    return np.concatenate([base, gate.slope, pairs.reshape(-1)]).view(np.uint8)


class GateTable:
    """The table of a kernel, and what it does to results in units of the gate.

    Args:
        f: the function being written.
        header: points at the packed weights' header.
        isa: instruction set.
        adds: a residual is added behind the activation.
    """

    def __init__(self, f: Function, header: Value, isa: str, *, adds: bool = False) -> None:
        """Loads the numbers and, where registers hold it, the table."""
        self.f = f
        table = f.at(header, _TABLE)
        self._pairs = f.at(table, 2 * 2 * SEGMENTS)
        numbers = [f.load("i32", header, NUMBERS + 4 * i, 4) for i in range(5 if adds else 3)]
        if isa != "avx512vnni":
            self._limit, self._index, self._unit, *self._r = (f.splat("i32", n) for n in numbers)
            return
        self._limit, self._index, self._unit, *self._r = (
            f.splat("i16", f.let(f"trunc i32 {number} to i16"), 32) for number in numbers
        )
        self._halves = [
            [f.load(WORDS32, table, at + 64 * half, 2) for half in (0, 1)]
            for at in (0, 2 * SEGMENTS)
        ]

    def words(self, x: Value, r: Value = "") -> Value:
        """<32 x i16>: X to y before it is saturated; AVX-512. `r`: the residual as stored."""
        f = self.f
        size = f.call(WORDS32, "llvm.abs.v32i16", (WORDS32, x), ("i1", "false"))
        a = f.call(WORDS32, "llvm.umin.v32i16", (WORDS32, size), (WORDS32, self._limit))
        n = f.call(WORDS32, "llvm.x86.avx512.pmulhu.w.512", (WORDS32, a), (WORDS32, self._index))
        look_up = "llvm.x86.avx512.vpermi2var.hi.512"
        base, slope = (
            f.call(WORDS32, look_up, (WORDS32, low), (WORDS32, n), (WORDS32, high))
            for low, high in self._halves
        )
        t = f.let(f"add {WORDS32} {base}, {self._words_product(a, slope)}")
        above = f.call(WORDS32, "llvm.smax.v32i16", (WORDS32, x), (WORDS32, "zeroinitializer"))
        total = f.call(WORDS32, "llvm.sadd.sat.v32i16", (WORDS32, above), (WORDS32, t))
        if r:
            factor, zero = self._r
            centred = f.let(f"sub {WORDS32} {r}, {zero}")
            wide = f.let(f"shl {WORDS32} {centred}, {every('i16', R_BITS, 32)}")
            more = self._words_product(wide, factor)
            total = f.call(WORDS32, "llvm.sadd.sat.v32i16", (WORDS32, total), (WORDS32, more))
        return self._words_product(total, self._unit)

    def bytes16(self, value: Value, r: Value = "") -> Value:
        """<16 x float>: v to y, <16 x i8>; any instruction set.

        `r`: the residual as stored, <16 x i32>, or "".
        """
        f = self.f
        x = self._whole(value)
        size = f.call(I32S, "llvm.abs.v16i32", (I32S, x), ("i1", "false"))
        a = self._least(size, self._limit)
        n = f.let(f"lshr {I32S} {f.let(f'mul {I32S} {a}, {self._index}')}, {every('i32', 16)}")
        line, half = self._looked_up(n), every("i32", 16)
        base = f.let(f"ashr {I32S} {f.let(f'shl {I32S} {line}, {half}')}, {half}")
        slope = f.let(f"ashr {I32S} {line}, {half}")
        t = f.let(f"add {I32S} {base}, {self._product(a, slope)}")
        total = f.let(f"add {I32S} {self._most(x, 'zeroinitializer')}, {t}")
        if r:
            total = self._word(f.let(f"add {I32S} {self._word(total)}, {self._units(r)}"))
        y = self._most(self._product(total, self._unit), "zeroinitializer")
        return f.let(f"trunc {I32S} {self._least(y, every('i32', 255))} to {BYTES16}")

    def _units(self, r: Value) -> Value:
        """A residual in units of the gate, <16 x i32>."""
        f, (factor, zero) = self.f, self._r
        centred = f.let(f"sub {I32S} {r}, {zero}")
        return self._product(f.let(f"shl {I32S} {centred}, {every('i32', R_BITS)}"), factor)

    def _word(self, total: Value) -> Value:
        """saturate_int16, <16 x i32>."""
        return self._most(self._least(total, every("i32", 2**15 - 1)), every("i32", -(2**15)))

    def _words_product(self, a: Value, b: Value) -> Value:
        """(a * b + 2**14) >> 15, <32 x i16>."""
        return self.f.call(WORDS32, "llvm.x86.avx512.pmul.hr.sw.512", (WORDS32, a), (WORDS32, b))

    def _product(self, a: Value, b: Value) -> Value:
        """(a * b + 2**14) >> 15, <16 x i32>."""
        f, half = self.f, every("i32", 1 << 14)
        more = f.let(f"add {I32S} {f.let(f'mul {I32S} {a}, {b}')}, {half}")
        return f.let(f"ashr {I32S} {more}, {every('i32', 15)}")

    def _whole(self, value: Value) -> Value:
        """saturate_int16(round_half_even(value)), <16 x i32>; NaN is the smallest."""
        f = self.f
        low, high = (every("float", float_bits(end)) for end in (-(2.0**15), 2.0**15 - 1))
        above = f.let(f"fcmp ogt {F32S} {value}, {low}")
        value = f.let(f"select <16 x i1> {above}, {F32S} {value}, {F32S} {low}")
        below = f.let(f"fcmp olt {F32S} {value}, {high}")
        value = f.let(f"select <16 x i1> {below}, {F32S} {value}, {F32S} {high}")
        shifted = f.let(f"fadd {F32S} {value}, {every('float', float_bits(ROUND))}")
        bits = f.let(f"bitcast {F32S} {shifted} to {I32S}")
        ones = int(np.float32(ROUND).view(np.int32))
        return f.let(f"sub {I32S} {bits}, {every('i32', ones)}")

    def _looked_up(self, n: Value) -> Value:
        """Line n of the table, <16 x i32>: slope above base."""
        f, out = self.f, "poison"
        for lane in range(LANES):
            place = f.let(f"extractelement {I32S} {n}, i32 {lane}")
            line = f.load("i32", f.let(f"getelementptr i32, ptr {self._pairs}, i32 {place}"), 0, 4)
            out = f.let(f"insertelement {I32S} {out}, i32 {line}, i32 {lane}")
        return out

    def _least(self, a: Value, b: Value) -> Value:
        return self.f.call(I32S, "llvm.smin.v16i32", (I32S, a), (I32S, b))

    def _most(self, a: Value, b: Value) -> Value:
        return self.f.call(I32S, "llvm.smax.v16i32", (I32S, a), (I32S, b))

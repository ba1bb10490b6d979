"""The vector operations kernels are made of, per instruction set, each beside its numpy meaning.

All work on 16 lanes of 32 bits, one lane an output channel. On AVX-512 with VNNI each is one
instruction; elsewhere the same operation is spelled in plain vector IR, slower and equal to the
last bit.
"""

from __future__ import annotations

import struct

from twofour.kernels.cpu import neon
from twofour.kernels.cpu.llvm import Function, Value

LANES = 16
I32S, F32S, I64S = "<16 x i32>", "<16 x float>", "<8 x i64>"
BYTES64, BYTES16 = "<64 x i8>", "<16 x i8>"
FUSED = ("avx512vnni", "avx2", "dotprod")
"""Instruction sets with a multiply-add of floats that is rounded once."""
BFLOATS32, BFLOATS16 = "<32 x bfloat>", "<16 x bfloat>"
WORDS32, WORDS16 = "<32 x i16>", "<16 x i16>"


def every(kind: str, value: int | float | str, lanes: int = LANES) -> str:
    """A vector constant of equal elements."""
    return "<" + ", ".join([f"{kind} {value}"] * lanes) + ">"


def float_bits(value: float) -> str:
    """A float32 constant as LLVM wants it: the bits of the equal double."""
    return "0x" + struct.pack(">d", struct.unpack(">f", struct.pack(">f", value))[0]).hex().upper()


ROUND = 12582912.0
"""1.5 * 2**23: adding it rounds |v| < 2**22 half to even and leaves the integer in the low bits."""


def lanes_below(function: Function, count: Value) -> Value:
    """np.arange(16) < count, <16 x i1>; `count` is an i64."""
    lanes = "<" + ", ".join(f"i64 {lane}" for lane in range(LANES)) + ">"
    return function.let(f"icmp slt <16 x i64> {lanes}, {function.splat('i64', count)}")


def emit_fma(f: Function, operands: tuple[Value, Value, Value], lanes: int, isa: str) -> Value:
    """`core.fma.fma` of a, b and c: one instruction, or its spelling in double precision.

    Args:
        f: the function being written.
        operands: a, b and c; vectors of `lanes` floats (1: scalars).
        lanes: how many.
        isa: an instruction set; where it is "vector" or "" there may be no such instruction.
    """

    def kind(element: str) -> str:
        return element if lanes == 1 else f"<{lanes} x {element}>"

    if isa in FUSED:
        name = "llvm.fma.f32" if lanes == 1 else f"llvm.fma.v{lanes}f32"
        return f.call(kind("float"), name, *((kind("float"), value) for value in operands))
    wide = kind("double")
    a, b, c = (f.let(f"fpext {kind('float')} {value} to {wide}") for value in operands)
    product = f.let(f"fmul {wide} {a}, {b}")
    total = f.let(f"fadd {wide} {product}, {c}")
    part = f.let(f"fsub {wide} {total}, {product}")
    left = f.let(f"fsub {wide} {product}, {f.let(f'fsub {wide} {total}, {part}')}")
    error = f.let(f"fadd {wide} {left}, {f.let(f'fsub {wide} {c}, {part}')}")
    odd = _to_odd(f, total, error, lanes)
    return f.let(f"fptrunc {wide} {odd} to {kind('float')}")


def _to_odd(f: Function, total: Value, error: Value, lanes: int) -> Value:
    """A rounded total and its error -> the total rounded to odd, doubles."""

    def all_of(element: str, value: str) -> str:
        return value if lanes == 1 else every(element, value, lanes)

    wide, bits, flags = (
        element if lanes == 1 else f"<{lanes} x {element}>" for element in ("double", "i64", "i1")
    )
    zero, none = all_of("double", "0.0"), all_of("i64", "0")
    whole = f.let(f"bitcast {wide} {total} to {bits}")
    up = f.let(f"fcmp ogt {wide} {error}, {zero}")
    plus = f.let(f"fcmp ogt {wide} {total}, {zero}")
    away = f.let(f"icmp eq {flags} {up}, {plus}")
    one, minus = all_of("i64", "1"), all_of("i64", "-1")
    step = f.let(f"select {flags} {away}, {bits} {one}, {bits} {minus}")
    # False for NaN, and for the infinite error of an infinite total.
    finite = f.let(f"fcmp one {wide} {f.let(f'fmul {wide} {error}, {zero}')}, {error}")
    even = f.let(f"icmp eq {bits} {f.let(f'and {bits} {whole}, {one}')}, {none}")
    inexact = f.let(f"and {flags} {finite}, {even}")
    moved = f.let(f"select {flags} {inexact}, {bits} {step}, {bits} {none}")
    return f.let(f"bitcast {bits} {f.let(f'add {bits} {whole}, {moved}')} to {wide}")


class Vector:
    """Vector operations for one instruction set; values are `<16 x i32>` unless said otherwise."""

    def __init__(self, isa: str, function: Function) -> None:
        """Emits into `function`."""
        self.isa = isa
        self.f = function

    def broadcast4(self, pointer: Value, offset: int) -> Value:
        """Each lane: the 4 bytes at pointer + offset."""
        return self.f.splat("i32", self.f.load("i32", pointer, offset))

    def broadcast8(self, pointer: Value, offset: int) -> Value:
        """<8 x i64>, each the 8 bytes at pointer + offset."""
        return self.f.splat("i64", self.f.load("i64", pointer, offset), 8)

    def merged(self, old: Value, new: Value, index: int, size: int) -> Value:
        """Each lane's bytes of `old`, but those from index * size on, `size` of them, of `new`."""
        f = self.f
        mask = ", ".join(f"i1 {'true' if i % 4 // size == index else 'false'}" for i in range(64))
        a, b = (f.let(f"bitcast {I32S} {value} to {BYTES64}") for value in (new, old))
        merged = f.let(f"select <64 x i1> <{mask}>, {BYTES64} {a}, {BYTES64} {b}")
        return f.let(f"bitcast {BYTES64} {merged} to {I32S}")

    def dot4(self, acc: Value, a: Value, b: Value) -> Value:
        """Adds 4 products to each lane, exact in int32.

        acc + (a.view(u8).astype(int) * b.view(i8)).reshape(16, 4).sum(1)
        """
        f = self.f
        if self.isa == "avx512vnni":
            bytes_a, bytes_b = (f.let(f"bitcast {I32S} {v} to {BYTES64}") for v in (a, b))
            return f.call(
                I32S,
                "llvm.x86.avx512.vpdpbusd.512",
                (I32S, acc),
                (BYTES64, bytes_a),
                (BYTES64, bytes_b),
            )
        if self.isa == "avx2":
            return self._dot4_words(acc, a, b)
        if self.isa == "dotprod":
            return self._dot4_signed(acc, a, b)
        for byte in range(4):
            left = f.let(f"and {I32S} {self.shift_right(a, 8 * byte)}, {every('i32', 255)}")
            up = f.let(f"shl {I32S} {b}, {every('i32', 24 - 8 * byte)}")
            right = f.let(f"ashr {I32S} {up}, {every('i32', 24)}")
            acc = f.let(f"add {I32S} {acc}, {f.let(f'mul {I32S} {left}, {right}')}")
        return acc

    def _dot4_signed(self, acc: Value, a: Value, b: Value) -> Value:
        """dot4 on AArch64: of a - 128, and 128 times the sums of b."""
        f, after = self.f, []
        quarters = (neon.quarters(f, value) for value in (acc, a, b))
        for total, left, right in zip(*quarters, strict=True):
            kept = neon.as_bytes(f, right)
            centred = neon.flipped(f, neon.as_bytes(f, left))
            units = neon.sdot(f, "zeroinitializer", every("i8", 1), kept)
            more = f.let(f"shl {neon.WORDS} {units}, {every('i32', 7, 4)}")
            first = f.let(f"add {neon.WORDS} {total}, {more}")
            after.append(neon.sdot(f, first, centred, kept))
        return neon.joined(f, after)

    def _dot4_words(self, acc: Value, a: Value, b: Value) -> Value:
        """dot4 on AVX2: even and odd bytes as 16-bit words, two vpmaddwd each.

        They are exact, where vpmaddubsw would saturate.
        """
        f, words, half = self.f, "<32 x i16>", "<16 x i16>"
        wa, wb = (f.let(f"bitcast {I32S} {v} to {words}") for v in (a, b))
        eight = every("i16", 8, 32)
        pairs = (
            (
                f.let(f"and {words} {wa}, {every('i16', 255, 32)}"),
                f.let(f"ashr {words} {f.let(f'shl {words} {wb}, {eight}')}, {eight}"),
            ),
            (f.let(f"lshr {words} {wa}, {eight}"), f.let(f"ashr {words} {wb}, {eight}")),
        )
        for left, right in pairs:
            sums = []
            for part in (0, 1):
                pick = ", ".join(f"i32 {i}" for i in range(16 * part, 16 * part + 16))
                x, y = (
                    f.let(f"shufflevector {words} {v}, {words} poison, <16 x i32> <{pick}>")
                    for v in (left, right)
                )
                sums.append(f.call("<8 x i32>", "llvm.x86.avx2.pmadd.wd", (half, x), (half, y)))
            acc = f.let(f"add {I32S} {acc}, {self._join8(sums[0], sums[1])}")
        return acc

    def _join8(self, low: Value, high: Value) -> Value:
        pick = ", ".join(f"i32 {i}" for i in range(16))
        return self.f.let(f"shufflevector <8 x i32> {low}, <8 x i32> {high}, <16 x i32> <{pick}>")

    def dot2(self, acc: Value, a: Value, b: Value) -> Value:
        """Adds 2 products of bfloat16 to each lane, <16 x float>; AVX-512 with BF16 only.

        acc + (from_bf16(a) * from_bf16(b)).reshape(16, 2).sum(1), see core/bfloat16.py
        """
        f = self.f
        pairs = [(BFLOATS32, f.let(f"bitcast {I32S} {v} to {BFLOATS32}")) for v in (a, b)]
        return f.call(F32S, "llvm.x86.avx512bf16.dpbf16ps.512", (F32S, acc), *pairs)

    def dot(self, dtype: str, acc: Value, a: Value, b: Value) -> Value:
        """The products of 4 bytes a lane: `dot4` of "int8", `dot2` of "bfloat16"."""
        return (self.dot4 if dtype == "int8" else self.dot2)(acc, a, b)

    def shift_right(self, v: Value, bits: int) -> Value:
        """Each lane >> bits, zeros shifted in."""
        return self.f.let(f"lshr {I32S} {v}, {every('i32', bits)}") if bits else v

    def shift_right_words(self, v: Value, bits: int) -> Value:
        """Each 16-bit half of each lane >> bits: one instruction, where none shifts bytes."""
        words = self.f.let(f"bitcast {I32S} {v} to <32 x i16>")
        moved = self.f.let(f"lshr <32 x i16> {words}, {every('i16', bits, 32)}")
        return self.f.let(f"bitcast <32 x i16> {moved} to {I32S}")

    def select_bytes(self, eight: Value, index: Value) -> Value:
        """Picks bytes: out.view(u8)[i] = eight_bytes[index.view(u8)[i] & 7].

        Bits 4-6 of an index are ignored, 3 and 7 must be 0.

        Args:
            eight: from `broadcast8`.
            index: one byte per byte of the result.
        """
        f = self.f
        if self.isa == "dotprod":
            return self._select_bytes_table(eight, index)
        if self.isa == "vector":
            return self._select_bytes_plain(eight, index)
        table, picks = (
            f.let(f"bitcast {I64S} {eight} to {BYTES64}"),
            f.let(f"bitcast {I32S} {index} to {BYTES64}"),
        )
        if self.isa == "avx512vnni":
            out = f.call(BYTES64, "llvm.x86.avx512.pshuf.b.512", (BYTES64, table), (BYTES64, picks))
            return f.let(f"bitcast {BYTES64} {out} to {I32S}")
        halves = []
        for part in (0, 1):
            lanes = (
                "<32 x i32> <"
                + ", ".join(f"i32 {i}" for i in range(32 * part, 32 * part + 32))
                + ">"
            )
            x, y = (
                f.let(f"shufflevector {BYTES64} {v}, {BYTES64} poison, {lanes}")
                for v in (table, picks)
            )
            out = f.call("<32 x i8>", "llvm.x86.avx2.pshuf.b", ("<32 x i8>", x), ("<32 x i8>", y))
            halves.append(f.let(f"bitcast <32 x i8> {out} to <8 x i32>"))
        return self._join8(halves[0], halves[1])

    def _select_bytes_table(self, eight: Value, index: Value) -> Value:
        """select_bytes on AArch64, where other bits of an index are not ignored."""
        f = self.f
        pair = f.let(f"shufflevector {I64S} {eight}, {I64S} poison, <2 x i32> <i32 0, i32 1>")
        table = f.let(f"bitcast <2 x i64> {pair} to {neon.BYTES}")
        parts = []
        for part in neon.quarters(f, index):
            low = f.let(f"and {neon.BYTES} {neon.as_bytes(f, part)}, {every('i8', 7)}")
            parts.append(f.let(f"bitcast {neon.BYTES} {neon.pick(f, table, low)} to {neon.WORDS}"))
        return neon.joined(f, parts)

    def _select_bytes_plain(self, eight: Value, index: Value) -> Value:
        """select_bytes by shifts: byte k of the 8 is (eight >> 8k) & 255."""
        f, wide = self.f, "<16 x i64>"
        whole = f.splat("i64", f.let(f"extractelement {I64S} {eight}, i32 0"))
        out = every("i32", 0)
        for byte in range(4):
            pick = f.let(f"and {I32S} {self.shift_right(index, 8 * byte)}, {every('i32', 7)}")
            bits = f.let(f"shl {wide} {f.let(f'zext {I32S} {pick} to {wide}')}, {every('i64', 3)}")
            moved = f.let(f"trunc {wide} {f.let(f'lshr {wide} {whole}, {bits}')} to {I32S}")
            one = f.let(f"and {I32S} {moved}, {every('i32', 255)}")
            placed = f.let(f"shl {I32S} {one}, {every('i32', 8 * byte)}")
            out = f.let(f"or {I32S} {out}, {placed}")
        return out

    def fma(self, acc: Value, a: Value, b: Value) -> Value:
        """A multiply-add on <16 x float>; one rounding where the CPU has it, two elsewhere.

        acc + a * b
        """
        name = "llvm.fmuladd.v16f32" if self.isa == "vector" else "llvm.fma.v16f32"
        return self.f.call(F32S, name, (F32S, a), (F32S, b), (F32S, acc))

    def fused(self, acc: Value, a: Value, b: Value) -> Value:
        """Acc + a * b, <16 x float>, rounded once on every instruction set: core.fma.fma."""
        return emit_fma(self.f, (a, b, acc), LANES, self.isa)

    def select_floats(self, sixteen: Value, index: Value) -> Value:
        """Picks floats: out[i] = sixteen[index[i] & 15], <16 x float>; AVX-512 only."""
        return self.f.call(F32S, "llvm.x86.avx512.permvar.sf.512", (F32S, sixteen), (I32S, index))

    def select_words(self, inputs: Value, index: Value) -> Value:
        """Picks words: out.view(u16)[i] = inputs.view(u16)[index.view(u16)[i] & 31]; AVX-512 only.

        Args:
            inputs: 32 words.
            index: one word per word of the result.
        """
        f, words = self.f, "<32 x i16>"
        pair = [(words, f.let(f"bitcast {I32S} {value} to {words}")) for value in (inputs, index)]
        out = f.call(words, "llvm.x86.avx512.permvar.hi.512", *pair)
        return f.let(f"bitcast {words} {out} to {I32S}")

"""Operations of AArch64 on registers of 16 bytes, each beside its numpy meaning.

A vector of 16 lanes of 32 bits (vector.py) is four of them: lanes 0-3, 4-7, 8-11 and 12-15. Taking
one apart and joining it costs no instruction.

`sdot` multiplies signed bytes, and activations are stored as unsigned ones: 128 less is the same
byte with its highest bit flipped. Kernels flip 16 inputs at a time, and their sums begin with 128
times the sum of the weights (nest.Tiled.centre).
"""

from __future__ import annotations

from collections.abc import Sequence

from twofour.kernels.cpu.llvm import Function, Value

CENTRE = 128
"""What the kernels take off each activation as stored."""
QUARTERS = 4
BYTES, WORDS = "<16 x i8>", "<4 x i32>"
_ALL = ", ".join(f"i32 {lane}" for lane in range(16))
_FLIP = "<" + ", ".join(["i8 -128"] * 16) + ">"


def quarter(f: Function, vector: Value, index: int) -> Value:
    """v[4 * index : 4 * index + 4], <4 x i32> of <16 x i32>."""
    lanes = ", ".join(f"i32 {4 * index + lane}" for lane in range(4))
    return f.let(f"shufflevector <16 x i32> {vector}, <16 x i32> poison, <4 x i32> <{lanes}>")


def quarters(f: Function, vector: Value) -> list[Value]:
    """The four registers of <16 x i32>."""
    return [quarter(f, vector, index) for index in range(QUARTERS)]


def joined(f: Function, parts: Sequence[Value]) -> Value:
    """<16 x i32> of four registers: the inverse of `quarters`."""
    halves = []
    for low, high in (parts[:2], parts[2:]):
        lanes = ", ".join(f"i32 {lane}" for lane in range(8))
        halves.append(f.let(f"shufflevector {WORDS} {low}, {WORDS} {high}, <8 x i32> <{lanes}>"))
    low, high = halves
    return f.let(f"shufflevector <8 x i32> {low}, <8 x i32> {high}, <16 x i32> <{_ALL}>")


def as_bytes(f: Function, words: Value) -> Value:
    """v.view(u8)."""
    return f.let(f"bitcast {WORDS} {words} to {BYTES}")


def flipped(f: Function, stored: Value) -> Value:
    """(v.view(u8) - 128).view(i8), <16 x i8>."""
    return f.let(f"xor {BYTES} {stored}, {_FLIP}")


def sdot(f: Function, acc: Value, a: Value, b: Value) -> Value:
    """Acc + (a.view(i8).astype(int) * b.view(i8)).reshape(4, 4).sum(1), <4 x i32>."""
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
    return f.call(WORDS, name, (WORDS, acc), (BYTES, a), (BYTES, b))


def element(f: Function, sixteen: Value, index: int) -> Value:
    """np.tile(v[4 * index : 4 * index + 4], 4): part of an `sdot` by element, no instruction."""
    words = f.let(f"bitcast {BYTES} {sixteen} to {WORDS}")
    lanes = ", ".join([f"i32 {index}"] * 4)
    return as_bytes(f, f.let(f"shufflevector {WORDS} {words}, {WORDS} poison, <4 x i32> <{lanes}>"))


def pick(f: Function, table: Value, index: Value) -> Value:
    """table[index], bytes; an index of 16 or more gives 0."""
    return f.call(BYTES, "llvm.aarch64.neon.tbl1.v16i8", (BYTES, table), (BYTES, index))

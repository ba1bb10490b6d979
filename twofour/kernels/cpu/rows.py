"""Sixteen elements of a row at a time: masked loads and stores, sums in the fixed order.

What norm.py and attention share. Each emitter has its numpy meaning beside it; the
order of a sum is that of `core.norm.row_sum`.
"""

from __future__ import annotations

from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.vector import (
    BFLOATS16,
    BYTES16,
    F32S,
    I32S,
    LANES,
    WORDS16,
    every,
    float_bits,
)

_NAMES = {F32S: "v16f32", BYTES16: "v16i8", WORDS16: "v16i16"}


def first_lanes(count: int) -> Value:
    """np.arange(16) < count as a constant; "" where that is all of them."""
    if count >= LANES:
        return ""
    return "<" + ", ".join(f"i1 {int(lane < count)}" for lane in range(LANES)) + ">"


def constant16(value: float) -> Value:
    """np.float32(value) in each lane."""
    return every("float", float_bits(value))


def load16(
    f: Function, kind: str, pointer: Value, offset: int | Value = 0, mask: str = ""
) -> Value:
    """Sixteen elements, zeros where `mask` is false; nothing is read there."""
    if not mask:
        return f.load(kind, pointer, offset)
    return f.call(
        kind,
        f"llvm.masked.load.{_NAMES[kind]}.p0",
        ("ptr", f.at(pointer, offset)),
        ("<16 x i1>", mask),
        (kind, "zeroinitializer"),
    )


def store16(
    f: Function, kind: str, value: Value, pointer: Value, offset: int | Value = 0, mask: str = ""
) -> None:
    """Stores sixteen elements, those whose `mask` is true."""
    if not mask:
        f.store(kind, value, pointer, offset)
        return
    f.call(
        "void",
        f"llvm.masked.store.{_NAMES[kind]}.p0",
        (kind, value),
        ("ptr", f.at(pointer, offset)),
        ("<16 x i1>", mask),
    )


def from_bfloats(f: Function, words: Value) -> Value:
    """`core.bfloat16.from_bf16` of <16 x i16>."""
    wide = f.let(f"shl {I32S} {f.let(f'zext {WORDS16} {words} to {I32S}')}, {every('i32', 16)}")
    return f.let(f"bitcast {I32S} {wide} to {F32S}")


def to_bfloats(f: Function, value: Value) -> Value:
    """`core.bfloat16.to_bf16` as <16 x i16>, one instruction of AVX-512 with BF16.

    What is below the smallest normal number becomes 0.
    """
    short = f.let(f"fptrunc {F32S} {value} to {BFLOATS16}")
    return f.let(f"bitcast {BFLOATS16} {short} to {WORDS16}")


def keep(f: Function, value: Value, mask: Value, other: str = "zeroinitializer") -> Value:
    """np.where(mask, value, other) on floats; `value` where there is no mask."""
    if not mask:
        return value
    return f.let(f"select <16 x i1> {mask}, {F32S} {value}, {F32S} {other}")


def add16(f: Function, a: Value, b: Value) -> Value:
    """A + b on floats."""
    return f.let(f"fadd {F32S} {a}, {b}")


def greater16(f: Function, a: Value, b: Value) -> Value:
    """np.where(a > b, a, b) on floats: b where one is NaN."""
    return f.let(f"select <16 x i1> {f.let(f'fcmp ogt {F32S} {a}, {b}')}, {F32S} {a}, {F32S} {b}")


def total16(f: Function, lanes: Value) -> Value:
    """The lanes' sum in each lane: l + (l ^ 8), then ^ 4, ^ 2, ^ 1, the order of `row_sum`."""
    return totals16(f, [lanes])


def totals16(f: Function, sums: list[Value]) -> Value:
    """`total16` of 1, 2, 4, 8 or 16 vectors: the first in the first 16 / count lanes, and so on."""
    distance = LANES // 2
    while len(sums) > 1:
        low = [lane for lane in range(2 * LANES) if not lane & distance]
        sums = [
            add16(f, *(_picked(f, a, b, [lane + up for lane in low]) for up in (0, distance)))
            for a, b in zip(sums[::2], sums[1::2], strict=True)
        ]
        distance //= 2
    lanes = sums[0]
    while distance:
        lanes = add16(f, lanes, _swapped(f, lanes, distance))
        distance //= 2
    return lanes


def highest16(f: Function, lanes: Value) -> Value:
    """The lanes' maximum in each lane."""
    for distance in (8, 4, 2, 1):
        lanes = greater16(f, lanes, _swapped(f, lanes, distance))
    return lanes


def _swapped(f: Function, lanes: Value, distance: int) -> Value:
    """lanes[np.arange(16) ^ distance]."""
    return _picked(f, lanes, "poison", [lane ^ distance for lane in range(LANES)])


def _picked(f: Function, a: Value, b: Value, lanes: list[int]) -> Value:
    """np.concatenate([a, b])[lanes]."""
    pick = ", ".join(f"i32 {lane}" for lane in lanes)
    return f.let(f"shufflevector {F32S} {a}, {F32S} {b}, <16 x i32> <{pick}>")


def scalar_of(f: Function, lanes: Value) -> Value:
    """lanes[0]."""
    return f.let(f"extractelement {F32S} {lanes}, i32 0")


def widened(f: Function, stored: Value, zero: Value) -> Value:
    """(stored.astype(int) - zero).astype(float32); `zero` is <16 x i32>."""
    wide = f.let(f"zext {BYTES16} {stored} to {I32S}")
    return f.let(f"sitofp {I32S} {f.let(f'sub {I32S} {wide}, {zero}')} to {F32S}")

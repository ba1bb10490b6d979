"""What a tile does with its sums: requantizes them as `core.numerics` does, and stores them."""

from __future__ import annotations

from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.packing import CONSTANTS_BYTES
from twofour.kernels.cpu.problem import LANES, ConvProblem
from twofour.kernels.cpu.vector import (
    BYTES16,
    F32S,
    I32S,
    ROUND,
    Vector,
    every,
    float_bits,
    lanes_below,
)

# 1.5 * 2**23: adding it rounds |v| < 2**22 half to even, leaving the integer in the low bits.


def emit_epilogue(
    v: Vector,
    problem: ConvProblem,
    spots: list[tuple[int, int]],
    sums: list[Value],
    constants: Value,
    blocks: int,
) -> None:
    """`core.numerics.requantize`, operation by operation, and the store."""
    f = v.f
    scalar = {
        key: f.splat(kind, f.load(kind, "%h", offset, 4))
        for key, kind, offset in (
            ("r_scale", "float", 0),
            ("r_zero", "i32", 4),
            ("low", "float", 8),
            ("high", "float", 12),
        )
    }
    zero_byte = f.splat("i8", f.load("i8", "%h", 16))
    for block in range(blocks):
        at = block * CONSTANTS_BYTES
        scale, bias = (f.load(F32S, constants, at + 64 * part, 4) for part in (1, 2))
        mask = _tail_mask(f, block) if problem.n % LANES else ""
        for row, (i, j) in enumerate(spots):
            value = sums[row * blocks + block]
            if problem.dtype == "int8":
                value = f.let(f"sitofp {I32S} {value} to {F32S}")
                value = f.let(f"fmul {F32S} {value}, {scale}")
            value = f.let(f"fadd {F32S} {value}, {bias}")
            if problem.add and problem.r is not None:
                where = i * problem.r.row + j * problem.r.pixel
                value = f.let(
                    f"fadd {F32S} {value}, {_residual(f, problem, where, block, scalar, mask)}"
                )
            where = i * problem.y.row + j * problem.y.pixel
            _store(
                f, problem, value, where, block, (scalar["low"], scalar["high"], zero_byte, mask)
            )


def _tail_mask(f: Function, block: int) -> Value:
    """Which lanes of the panel's block `block` are real channels."""
    return lanes_below(f, f.int_op("sub", "%left", block * LANES))


def _residual(
    f: Function, problem: ConvProblem, where: int, block: int, scalar: dict[str, Value], mask: Value
) -> Value:
    """The residual of one position and block, times its scale, <16 x float>."""
    kind, width = (BYTES16, 1) if problem.add == "int8" else (F32S, 4)
    pointer = f.at("%r", where + block * LANES * width)
    if mask:
        stem = f"llvm.masked.load.v16{'i8' if width == 1 else 'f32'}.p0"
        raw = f.call(kind, stem, ("ptr", pointer), ("<16 x i1>", mask), (kind, "zeroinitializer"))
    else:
        raw = f.load(kind, pointer)
    if problem.add == "float32":
        return f.let(f"fmul {F32S} {raw}, {scalar['r_scale']}")
    wide = f.let(f"zext {BYTES16} {raw} to {I32S}")
    centred = f.let(f"sub {I32S} {wide}, {scalar['r_zero']}")
    return f.let(f"fmul {F32S} {f.let(f'sitofp {I32S} {centred} to {F32S}')}, {scalar['r_scale']}")


def _store(
    f: Function,
    problem: ConvProblem,
    value: Value,
    where: int,
    block: int,
    extra: tuple[Value, Value, Value, Value],
) -> None:
    """Clamps, rounds and narrows one position's block, and stores it."""
    low, high, zero_byte, mask = extra
    if problem.out == "float32":
        kind, width, name = F32S, 4, "v16f32"
        if problem.relu:
            negative = f.let(f"fcmp ogt {F32S} zeroinitializer, {value}")  # false for NaN: kept
            value = f.let(f"select <16 x i1> {negative}, {F32S} zeroinitializer, {F32S} {value}")
    else:
        kind, width, name = BYTES16, 1, "v16i8"
        above = f.let(f"fcmp ogt {F32S} {value}, {low}")  # as maxps: a NaN becomes the bound
        value = f.let(f"select <16 x i1> {above}, {F32S} {value}, {F32S} {low}")
        below = f.let(f"fcmp olt {F32S} {value}, {high}")
        value = f.let(f"select <16 x i1> {below}, {F32S} {value}, {F32S} {high}")
        shifted = f.let(f"fadd {F32S} {value}, {every('float', float_bits(ROUND))}")
        bits = f.let(f"bitcast {F32S} {shifted} to {I32S}")
        value = f.let(f"add {BYTES16} {f.let(f'trunc {I32S} {bits} to {BYTES16}')}, {zero_byte}")
    pointer = f.at("%y", where + block * LANES * width)
    if mask:
        f.call(
            "void",
            f"llvm.masked.store.{name}.p0",
            (kind, value),
            ("ptr", pointer),
            ("<16 x i1>", mask),
        )
    else:
        f.store(kind, value, pointer)

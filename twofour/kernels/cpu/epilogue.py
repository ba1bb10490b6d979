"""What a tile does with its sums: requantizes them as `core.numerics` does, and stores them."""

from __future__ import annotations

from twofour.core.dynamic import TENSOR
from twofour.core.functions import CLAMPS
from twofour.kernels.cpu.functions import Floats, emit_activation
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.narrow import AT_ONCE, Narrow, Rounding, Target
from twofour.kernels.cpu.packing import CONSTANTS_BYTES
from twofour.kernels.cpu.problem import LANES, ConvProblem
from twofour.kernels.cpu.quantize_rows import row_tail
from twofour.kernels.cpu.rows import from_bfloats, load16, store16, to_bfloats
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, WORDS16, Vector, lanes_below

Spot = tuple[int, int]
_STORED = {"int8": BYTES16, "bfloat16": WORDS16, "float32": F32S}


def emit_epilogue(
    v: Vector,
    problem: ConvProblem,
    spots: list[Spot],
    sums: list[Value],
    constants: Value,
    blocks: int,
) -> None:
    """`core.numerics.requantize`, operation by operation, and the store."""
    f = v.f
    scalar = scalars(f, problem)
    narrow = narrow_of(v, problem)
    parts = [
        [f.load(F32S, constants, block * CONSTANTS_BYTES + 64 * part, 4) for part in (1, 2)]
        for block in range(blocks)
    ]
    masks = [_tail_mask(f, block) if _uneven(problem, blocks) else "" for block in range(blocks)]
    items = [(row, block) for row in range(len(spots)) for block in range(blocks)]
    for first in range(0, len(items), AT_ONCE):
        values, targets, residuals = [], [], []
        group = items[first : first + AT_ONCE]
        here = [sums[row * blocks + block] for row, block in group]
        if v.isa == "avx512vnni" and not narrowed(problem):
            here = _held_back(f, here, I32S if problem.dtype == "int8" else F32S)
        for (row, block), total in zip(group, here, strict=True):
            i, j = spots[row]
            scale, bias = parts[block]
            if problem.dynamic:
                tail = i * problem.x.row + j * problem.x.pixel + row_tail(problem.c)[0]
                total = _centred(f, problem, total, constants, (block, tail))
                scale = f.let(f"fmul {F32S} {_broadcast(f, 'float', tail)}, {scale}")
            value = scaled(v, problem, total, [scale, bias])
            if problem.r is None:
                value = activated(v, problem, value, scalar)
            else:
                where = i * problem.r.row + j * problem.r.pixel + block * LANES * problem.r_bytes
                residual = _residual(v, problem, (where, masks[block]))
                value = _with_residual(v, problem, value, residual, scalar)
                residuals.append(residual)
            values.append(value)
            where = i * problem.y.row + j * problem.y.pixel + block * LANES * problem.y_bytes
            targets.append(Target(where, masks[block]))
        if narrow is not None:
            last = problem.gate and problem.add_last
            narrow.store(values, targets, residuals if last else ())
        else:
            _store_floats(f, problem, values, targets)


def narrow_of(v: Vector, problem: ConvProblem) -> Narrow | None:
    """What rounds the results to bytes; None where they are no bytes."""
    if problem.out != "int8":
        return None
    moves, clips = problem.activation not in CLAMPS, problem.activation == "Clip"
    moves = moves and not problem.add_last  # the offset has the zero point
    adds = problem.gate and problem.add_last
    return Narrow(v, "%h", Rounding(problem.bounded, moves, clips, problem.gate, adds))


def _held_back(f: Function, values: list[Value], kind: str) -> list[Value]:
    """The same vectors, which nothing is computed from before all that was written until here.

    LLVM would begin the activations of the whole tile at once, and spill what does not fit. An
    empty piece of assembly that claims to change the vectors stops it and costs nothing.
    """
    count = len(values)
    outs, ins = ["=v"] * count, [str(i) for i in range(count)]
    all_of = f"{{{', '.join([kind] * count)}}}" if count > 1 else kind
    arguments = ", ".join(f"{kind} {value}" for value in values)
    constraints = ",".join([*outs, *ins, "~{memory}"])
    held = f.let(f'call {all_of} asm sideeffect "", "{constraints}"({arguments})')
    if count == 1:
        return [held]
    return [f.let(f"extractvalue {all_of} {held}, {i}") for i in range(count)]


def scalars(f: Function, problem: ConvProblem) -> dict[str, Value]:
    """Those numbers of the header that the problem needs, in all lanes."""
    offsets = {"r_scale": 0} if problem.add else {}
    offsets |= {"offset": 4} if problem.add_last else {}
    if problem.out != "int8":
        offsets |= {"low": 8, "high": 12} if problem.activation in CLAMPS else {}
    elif not narrowed(problem):
        offsets |= {"y_factor": 20}
    return {
        key: f.splat("float", f.load("float", "%h", offset, 4)) for key, offset in offsets.items()
    }


def narrowed(problem: ConvProblem) -> bool:
    """Whether the activation is part of the way to bytes: of their saturation, or by a table."""
    return problem.gate or problem.activation in CLAMPS


def _uneven(problem: ConvProblem, blocks: int) -> bool:
    """Whether the last panel holds lanes that are no channels."""
    return bool(problem.n * problem.groups % (LANES * blocks))


def activated(v: Vector, problem: ConvProblem, value: Value, scalar: dict[str, Value]) -> Value:
    """The activation, unless `Narrow` does it; in steps of y."""
    floats = Floats(v.f, LANES, v.isa)
    if problem.out != "int8":
        bounds = (scalar["low"], scalar["high"]) if problem.activation in CLAMPS else None
        short = problem.out == "bfloat16"
        return emit_activation(floats, problem.activation, value, bounds, short=short)
    if narrowed(problem):
        return value
    value = emit_activation(floats, problem.activation, value, short=True)
    if problem.add_last:
        return v.fused(scalar["offset"], value, scalar["y_factor"])
    return v.f.let(f"fmul {F32S} {value}, {scalar['y_factor']}")


def scaled(v: Vector, problem: ConvProblem, value: Value, constants: list[Value]) -> Value:
    """Acc * scale + bias; the sums of floats have no scale."""
    scale, bias = constants
    if problem.dtype != "int8":
        return v.f.let(f"fadd {F32S} {value}, {bias}")
    return v.fused(bias, v.f.let(f"sitofp {I32S} {value} to {F32S}"), scale)


def _broadcast(f: Function, kind: str, offset: int) -> Value:
    """What stands at an offset from the tile's first input, in all lanes."""
    return f.splat(kind, f.load(kind, "%x", offset, 4))


def _centred(
    f: Function, problem: ConvProblem, total: Value, constants: Value, at: tuple[int, int]
) -> Value:
    """The sums of a block less zero point * sum of weights, where a row has a zero point.

    Args:
        f: the tile.
        problem: what is computed.
        total: <16 x i32>; begins with 0 where the zero point is not known (tile.py).
        constants: of the panel; there `start` is minus the sum of the weights.
        at: the block, and the offset of the tail of the row of x.
    """
    if problem.dynamic != TENSOR:
        return total
    start = f.load(I32S, constants, at[0] * CONSTANTS_BYTES, 4)
    moved = f.let(f"mul {I32S} {_broadcast(f, 'i32', at[1] + 4)}, {start}")
    return f.let(f"add {I32S} {total}, {moved}")


def _tail_mask(f: Function, block: int) -> Value:
    """Which lanes of the panel's block `block` are real channels."""
    return lanes_below(f, f.int_op("sub", "%left", block * LANES))


def _residual(v: Vector, problem: ConvProblem, where: tuple[int, Value]) -> Value:
    """The residual at an offset, under a mask: floats, or <16 x i32> of bytes."""
    f, kind = v.f, _STORED[problem.add]
    raw = load16(f, kind, "%r", where[0], where[1])
    if problem.add == "bfloat16":
        return from_bfloats(f, raw)
    return f.let(f"zext {BYTES16} {raw} to {I32S}") if problem.add == "int8" else raw


def _with_residual(
    v: Vector, problem: ConvProblem, value: Value, residual: Value, scalar: dict[str, Value]
) -> Value:
    """The activation, and the residual times its scale before or behind it.

    A gate that comes first adds it itself.
    """
    f = v.f
    if problem.gate and problem.add_last:
        return value
    if problem.add == "int8":
        residual = f.let(f"sitofp {I32S} {residual} to {F32S}")
    if not problem.add_last:
        value = v.fused(value, residual, scalar["r_scale"])
        return activated(v, problem, value, scalar)
    value = activated(v, problem, value, scalar)
    if problem.add == "int8" and problem.out != "int8":
        value = f.let(f"fadd {F32S} {value}, {scalar['offset']}")
    return v.fused(value, residual, scalar["r_scale"])


def _store_floats(
    f: Function, problem: ConvProblem, values: list[Value], targets: list[Target]
) -> None:
    """Stores vectors of floats, as they are or as bfloat16."""
    for value, target in zip(values, targets, strict=True):
        stored = to_bfloats(f, value) if problem.out == "bfloat16" else value
        store16(f, _STORED[problem.out], stored, "%y", target.offset, target.mask)

"""What this CPU's cores can do at most, measured: loops of multiply-adds without anything else.

Twelve independent sums, inputs from the first-level cache, weights and indices in registers: the
inner loop of each family of tactics, without loading weights, writing results, or tails. So what a
layer's multiply-adds take at this rate is a bound for its time, and a whole network's share of it
says what is left to gain.

Counted is as if dense: a 2:4 kernel does two multiply-adds for each product it computes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from twofour.core.memory import address, allocate
from twofour.core.plan import is_sparse
from twofour.core.target import Target, host_target, why_no_bf16
from twofour.engine import Layer
from twofour.kernels.cpu.llvm import Function, Source, Value, compile_object, module_text
from twofour.kernels.cpu.vector import F32S, I32S, Vector, every
from twofour.runtime.cpu import Code

SUMS, TURNS, REPEATS, ROUNDS = 12, 64, 400, 15
# Family -> multiply-adds, as if dense, of one sum in one turn.
MACS = {
    "int8 dense": 64,
    "int8 2:4": 128,
    "int8 2:4 pair": 128,
    "bfloat16 dense": 32,
    "bfloat16 2:4": 64,
    "bfloat16 2:4 pair": 64,
    "float32 dense": 16,
    "float32 2:4": 32,
}
_ARGUMENTS = (("ptr", "x"), ("ptr", "w"), ("ptr", "y"), ("ptr", "r"))
_RANGES = (("i64", "t0"), ("i64", "t1"), ("i64", "p0"), ("i64", "p1"))


@dataclass(frozen=True)
class Peaks:
    """Rates of this machine.

    Attributes:
        gmacs: family -> thousand millions of multiply-adds a second, counted as if dense.
    """

    gmacs: dict[str, float]


def measure_peaks(threads: int = 1, target: Target | None = None) -> Peaks:
    """Times the loops; takes some tenths of a second.

    Args:
        threads: rates are those of one core, times so many.
        target: by default this machine's.
    """
    target = target or host_target()
    target = replace(target, bf16=not why_no_bf16(target))
    families = [name for name in MACS if not lacks(target, name)]
    functions = [multiply_adds(name, index, target.isa) for index, name in enumerate(families)]
    code = Code([compile_object([Source(module_text(functions))], target)])
    macs = SUMS * TURNS * REPEATS
    memory = allocate(1 << 14)  # page-aligned zeros: the rates do not depend on values
    found = {}
    for name, function in zip(families, functions, strict=True):
        taken_ns = fastest_ns(code, function.name, (address(memory),) * 4, (0, REPEATS))
        found[name] = threads * MACS[name] * macs / taken_ns
    return Peaks(found)


def lacks(target: Target, name: str) -> bool:
    """Whether the CPU has no instructions for the kernels of a family."""
    if name.startswith("bfloat16"):
        return not target.bf16
    return name == "float32 2:4" and target.isa != "avx512vnni"


def family(layer: Layer) -> str:
    """The loop that bounds a layer's rate; a kernel for 4:8 picks inputs as often as for 2:4."""
    kind = layer.precision
    if is_sparse(layer.tactic):
        pair = kind != "float32" and "pair" in layer.tactic
        return f"{kind} 2:4 pair" if pair else f"{kind} 2:4"
    return f"{kind} dense"


def ideal_us(layers: Iterable[Layer], peaks: Peaks) -> float:
    """Microseconds that the multiply-adds of the layers would take at peak rates."""
    return sum(1e-3 * layer.macs / peaks.gmacs[family(layer)] for layer in layers if layer.macs)


def fastest_ns(
    code: Code, name: str, pointers: tuple[int, int, int, int], turns: tuple[int, int]
) -> float:
    """The shortest of some runs, what disturbs makes them longer: nanoseconds.

    Args:
        code: holds the loop.
        name: its symbol.
        pointers: what it gets as x, w, y and r.
        turns: what it gets as t0 and t1.
    """
    kernel = code.kernel(name)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        kernel(*pointers, *turns, 0, 0)
        times.append(time.perf_counter_ns() - start)
    return float(min(times))


def multiply_adds(name: str, index: int, isa: str) -> Function:
    """Sums `repeats` (t1) times TURNS turns, and stores the sums, so that nothing is left out.

    Args:
        name: a family of `MACS`.
        index: part of the function's symbol.
        isa: to emit for.
    """
    f = Function(f"peak{index}", (*_ARGUMENTS, *_RANGES))
    vector = Vector(isa, f)
    dtype = name.partition(" ")[0]
    floats = dtype == "float32"
    kind = I32S if dtype == "int8" else F32S
    weights = f.load(F32S if floats else I32S, "%w", 0, 64)
    indices = f.load(I32S, "%w", 64, 64)
    zero = every("i32", 0) if dtype == "int8" else every("float", "0.0")

    def turn(at: Value, sums: list[Value]) -> list[Value]:
        x = f.at("%x", f.int_op("mul", at, 64))
        if floats:
            return _float_turn(vector, name, x, (weights, indices), sums)
        return _dot_turn(vector, name, x, (weights, indices), sums)

    def repeat(_: Value, sums: list[Value]) -> list[Value]:
        return f.loop(0, TURNS, [(kind, value) for value in sums], turn)

    sums = f.loop("%t0", "%t1", [(kind, zero)] * SUMS, repeat)
    for number, value in enumerate(sums):
        f.store(kind, value, "%y", 64 * (TURNS + SUMS + number), 64)
    return f


def _dot_turn(
    vector: Vector, name: str, x: Value, constants: tuple[Value, Value], sums: list[Value]
) -> list[Value]:
    """One dot product a sum; behind one byte shuffle, or one for two where blocks share it.

    That of bfloat16 takes longer with an operand from memory, which two share there.
    """
    weights, indices = constants
    dtype, _, form = name.partition(" ")
    after: list[Value] = []
    picked = ""
    for number, value in enumerate(sums):
        if name == "int8 dense" or (form == "dense" and number % 2 == 0):
            picked = vector.broadcast4(x, 4 * number)
        elif form == "2:4" or (form == "2:4 pair" and number % 2 == 0):
            picked = vector.select_bytes(vector.broadcast8(x, 8 * number), indices)
        after.append(vector.dot(dtype, value, picked, weights))
    return after


def _float_turn(
    vector: Vector, name: str, x: Value, constants: tuple[Value, Value], sums: list[Value]
) -> list[Value]:
    """One multiply-add a sum; for 2:4 behind one permutation."""
    f = vector.f
    weights, indices = constants
    after = []
    for number, value in enumerate(sums):
        if name == "float32 dense":
            picked = f.splat("float", f.load("float", x, 4 * number))
        else:
            picked = vector.select_floats(f.load(F32S, x, 64 * number), indices)
        after.append(vector.fma(value, picked, weights))
    return after

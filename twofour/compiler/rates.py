"""How fast a core of this machine does what layers are made of: what a roofline is drawn from.

Beside the multiply-adds of `peak.py` these are bytes that are copied from and to the second-level
cache, weights that are read once a run, and results that are scaled, rounded and stored. Each is a
loop of the kernels' own code on data in the right cache, so it takes a moment to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from twofour.compiler.peak import Peaks, fastest_ns, measure_peaks
from twofour.compiler.result_loop import SPOTS, TURNS, Results, result_loop
from twofour.core.errors import InputError
from twofour.core.memory import address, allocate
from twofour.core.progress import Report, silent
from twofour.core.target import Target, check_runs_here, detect_host
from twofour.engine import Plan
from twofour.kernels.cpu.llvm import Function, Source, Value, compile_object, module_text
from twofour.kernels.cpu.vector import I32S
from twofour.runtime.cpu import Code

COPY_BYTES = 128 << 10
"""Read, and as many written: more than a first-level cache holds, less than a second-level one."""
_LINES = 4
_REPEATS, _COPIES = 200, 50
_LEAST_READ = 1 << 18
_ARGUMENTS = (("ptr", "x"), ("ptr", "w"), ("ptr", "y"), ("ptr", "r"))
_RANGES = (("i64", "t0"), ("i64", "t1"), ("i64", "p0"), ("i64", "p1"))


@dataclass(frozen=True)
class Rates:
    """Rates of one core.

    Attributes:
        peaks: multiply-adds.
        copy_gbps: bytes read and bytes written together, in the second-level cache.
        weights_bytes: how much `read_gbps` was measured on.
        read_gbps: bytes read, of as many as the network's weights, one after the other.
        result_ns: of 16 results, by what is done with them.
    """

    peaks: Peaks
    copy_gbps: float
    weights_bytes: int
    read_gbps: float
    result_ns: dict[Results, float]


def measure_rates(plan: Plan, report: Report = silent) -> Rates:
    """Measures what the layers of an engine need; takes about a second.

    Args:
        plan: of the engine.
        report: told how far it is.

    Raises:
        InputError: the engine's times were measured on another kind of CPU.
        UnsupportedError: the CPU lacks a feature that the engine was built for.
    """
    _require_same_cpu(plan.target)
    check_runs_here(plan.target)
    report(0, 3, "multiply-adds")
    peaks = measure_peaks(1, plan.target)
    report(1, 3, "bytes")
    copied = copy_gbps(plan.target)
    read = max(sum(layer.weight_bytes for layer in plan.layers), _LEAST_READ)
    whole = read // (64 * _LINES)
    took = _timed(_read_loop(), plan.target, read, (0, whole))
    report(2, 3, "results")
    kinds = dict.fromkeys(filter(None, map(Results.of, plan.layers)))
    return Rates(peaks, copied, read, read / took, dict(_result_ns(kinds, plan.target)))


def copy_gbps(target: Target) -> float:
    """Bytes read and written together by one core within its second-level cache."""
    return 2 * COPY_BYTES * _COPIES / _timed(_copy_loop(), target, COPY_BYTES, (0, _COPIES))


def reader(target: Target, size_bytes: int) -> Callable[[], None]:
    """A call that reads so many bytes of its own, one after the other."""
    function = _read_loop()
    code = Code([compile_object([Source(module_text([function]))], target)])
    kernel = code.kernel(function.name)
    x, y = allocate(size_bytes + 4096, huge=True), allocate(4096)
    x[:] = 1  # pages that were never written are all the same one

    def read(held: object = code) -> None:
        """Runs the loop; `held` is its code."""
        kernel(address(x), address(x), address(y), address(x), 0, size_bytes // (64 * _LINES), 0, 0)

    return read


def _require_same_cpu(target: Target) -> None:
    here = detect_host().model
    if target.model != here or target.cpu:
        how = "estimated for" if target.cpu else "measured on"
        raise InputError(
            "no roofline for an engine of another machine",
            [f"its times were {how} {target.model}", f"this is {here}"],
            "build it here, or measure there; --sort time needs no roofline",
        )


def _timed(function: Function, target: Target, size_bytes: int, turns: tuple[int, int]) -> float:
    """Nanoseconds of one call on buffers of that size."""
    code = Code([compile_object([Source(module_text([function]))], target)])
    x, y = allocate(size_bytes + 4096, huge=True), allocate(size_bytes + 4096, huge=True)
    x[:] = 1  # pages that were never written are all the same one
    return fastest_ns(code, function.name, (address(x), address(x), address(y), address(x)), turns)


def _copy_loop() -> Function:
    """Copies `COPY_BYTES` from x to y, t1 times."""
    f = Function("copy", (*_ARGUMENTS, *_RANGES))

    def lines(at: Value, _: list[Value]) -> list[Value]:
        for line in range(_LINES):
            offset = f.int_op("add", at, 64 * line)
            f.store(I32S, f.load(I32S, "%x", offset), "%y", offset)
        return []

    def turn(_: Value, __: list[Value]) -> list[Value]:
        return f.loop(0, COPY_BYTES, [], lines, 64 * _LINES)

    f.loop("%t0", "%t1", [], turn)
    return f


def _read_loop() -> Function:
    """Adds up t1 groups of lines of x."""
    f = Function("read", (*_ARGUMENTS, *_RANGES))

    def lines(at: Value, sums: list[Value]) -> list[Value]:
        first = f.int_op("mul", at, 64 * _LINES)
        x = f.at("%x", first)
        loaded = [f.load(I32S, x, 64 * line) for line in range(_LINES)]
        return [f.int_op("add", a, b, I32S) for a, b in zip(sums, loaded, strict=True)]

    sums = f.loop("%t0", "%t1", [(I32S, "zeroinitializer")] * _LINES, lines)
    for line, total in enumerate(sums):
        f.store(I32S, total, "%y", 64 * line)
    return f


def _result_ns(kinds: Iterable[Results], target: Target) -> Iterable[tuple[Results, float]]:
    """Nanoseconds of 16 results of each kind."""
    named = {
        kind: result_loop(f"results{index}", kind, target.isa) for index, kind in enumerate(kinds)
    }
    if not named:
        return
    code = Code([compile_object([Source(module_text(list(named.values())))], target)])
    memory = allocate(1 << 16)  # zeros: the time does not depend on values
    at = address(memory)
    where = (at, at + (1 << 14), at + (2 << 14), at + (3 << 14))
    for kind, function in named.items():
        taken = fastest_ns(code, function.name, where, (0, _REPEATS))
        yield kind, taken / (_REPEATS * TURNS * SPOTS)

"""Times of kernels on a machine that is not here: a model of what their code takes.

A tile of a convolution is its groups of steps and then its results. The code of both is generated
for the CPU, its instructions are counted (instructions.py), and the facts of the CPU (core/cpus.py)
turn them into cycles. What a tile reads of the weights comes from the cache that holds them, and a
sum cannot be added to before the last addition is done:

    tile   = max(groups * cycles(group), steps * latency, its weights' bytes / rate) + results
    kernel = sum of its tiles + _TILE_CYCLES for each, and weights that left the caches once

It ranks what the tuner would have timed. Times of other layers are those of the bytes they move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from twofour.compiler.instructions import Instruction, cycles, inner_loop, instructions
from twofour.compiler.result_loop import SPOTS, Results, result_loop
from twofour.core.cpus import Cpu, cpu_named
from twofour.core.target import Target
from twofour.engine import Engine, Layer
from twofour.kernels.cpu.llvm import Function, Value, assembly, module_text
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.packing import Format, end_steps, panel_bytes
from twofour.kernels.cpu.problem import Config, ConvProblem, Pieces, crowding
from twofour.kernels.cpu.tactic import Tactic
from twofour.kernels.cpu.vector import F32S, I32S, Vector

_TILE_CYCLES = 25.0
"""Of a call, the loops' ends, and pipes that run empty before the results."""
_CROWDED = 1.3
"""Inputs that evict each other from the first-level cache are read from the second."""
_WAYS = 8
_ROW_BYTES = 4096
_DEPTHWISE_OPS = 2.0  # of 16 multiply-adds
_GROUPS: dict[tuple[str, str, str, int, int, Target], list[Instruction]] = {}


@dataclass(frozen=True)
class CostModel:
    """Estimates for one target.

    Attributes:
        target: names the facts.
        cold_bytes: of other weights are read between two runs of a layer, as in `Tuner`.
    """

    target: Target
    cold_bytes: int = 0

    @property
    def cpu(self) -> Cpu:
        """What is known of it."""
        return cpu_named(self.target.cpu)

    def time_us(self, problem: ConvProblem, tactic: Tactic, config: Config) -> float:
        """Of one run on one thread."""
        kernel = tactic.kernel
        if isinstance(kernel, Tiled):
            taken = self._tiled(kernel.walked(problem), kernel.format, config)
        else:
            taken = self._untiled(problem)
        return taken / (1e3 * self.cpu.ghz)

    def _tiled(self, problem: ConvProblem, fmt: Format, config: Config) -> float:
        panels = problem.groups * problem.blocks // config.blocks
        size = panel_bytes(problem, fmt, config.blocks)
        down, across = (
            Pieces.of(total, at_most)
            for total, at_most in ((problem.out_h, config.tile_h), (problem.out_w, config.tile_w))
        )
        rate = self._rate(size, panels, config)
        total = 0.0
        for height, rows in _counts(down):
            for width, columns in _counts(across):
                one = self._tile(problem, fmt, (height, width, config.blocks))
                crowded = crowding(problem, height, width) > _WAYS
                read = size / rate if rate else 0.0
                total += rows * columns * max(one * (_CROWDED if crowded else 1.0), read)
        total *= problem.batch * panels
        if not self.cold_bytes:
            return total
        cold = size * panels / self.cpu.far_bytes_per_cycle
        return max(total, cold) if config.prefetch_bytes else total + cold

    def _rate(self, size: int, panels: int, config: Config) -> float:
        """Bytes a cycle of the weights; 0 where they lie in the first-level cache."""
        cpu = self.cpu
        again = size if config.panels_outside else size * panels
        if again <= cpu.l1_bytes // 2:
            return 0.0
        return cpu.l2_bytes_per_cycle if again <= cpu.l2_bytes else cpu.far_bytes_per_cycle

    def _tile(self, problem: ConvProblem, fmt: Format, shape: tuple[int, int, int]) -> float:
        """Cycles of a tile of (height, width, blocks)."""
        cpu, target = self.cpu, replace(self.target, model="")
        positions, blocks = shape[0] * shape[1], shape[2]
        steps = -(-problem.segment_k // fmt.k_per_step) * problem.segments
        steps += end_steps(problem, fmt)
        group = cycles(group_code(fmt, problem.dtype, positions, blocks, target), cpu)
        group = max(group, cpu.dot_latency * fmt.steps_per_group)
        kind = Results(
            problem.dtype, problem.out, problem.add, problem.activation, problem.bounded,
            problem.gate, problem.add_last,
        )  # fmt: skip
        results = cycles(_results(kind, target), cpu) / SPOTS
        whole = steps / fmt.steps_per_group * group
        return whole + positions * blocks * results + _TILE_CYCLES

    def _untiled(self, problem: ConvProblem) -> float:
        """Of a depthwise convolution."""
        cpu = self.cpu
        turns = 64 / cpu.pipe_bytes / len(cpu.pipes["vector"])
        moved = problem.x_size_bytes + problem.y_size_bytes
        return max(problem.macs / 16 * _DEPTHWISE_OPS * turns, moved / cpu.l2_bytes_per_cycle)


def with_estimates(engine: Engine) -> Engine:
    """The engine with an estimate on every layer that has no time; none for ONNX Runtime."""
    cpu = cpu_named(engine.plan.target.cpu)
    layers = tuple(
        layer
        if layer.time_us is not None or layer.tactic == "onnxruntime"
        else replace(layer, time_us=round(_other_us(layer, cpu), 3))
        for layer in engine.plan.layers
    )
    return replace(engine, plan=replace(engine.plan, layers=layers))


def _other_us(layer: Layer, cpu: Cpu) -> float:
    """Of a layer that nothing is chosen for: its bytes, and its multiply-adds."""
    lanes = cpu.pipe_bytes // 4 * len(cpu.pipes["float"])
    taken = layer.work.moved_bytes / cpu.l2_bytes_per_cycle + layer.macs / lanes
    return taken / (1e3 * cpu.ghz)


def _counts(pieces: Pieces) -> Iterable[tuple[int, int]]:
    """(size, how many) of the pieces."""
    yield pieces.size, pieces.big_count
    if pieces.big_count < pieces.count:
        yield pieces.size - 1, pieces.count - pieces.big_count


def group_code(
    fmt: Format, dtype: str, positions: int, blocks: int, target: Target
) -> list[Instruction]:
    """The code of a group of steps, as a loop has it; formats are told apart by their names."""
    key = (type(fmt).__name__, fmt.name, dtype, positions, blocks, target)
    if key not in _GROUPS:
        _GROUPS[key] = _written(fmt, dtype, positions, blocks, target)
    return _GROUPS[key]


def _written(
    fmt: Format, dtype: str, positions: int, blocks: int, target: Target
) -> list[Instruction]:
    f = Function("group", [("ptr", "x"), ("ptr", "w"), ("ptr", "y"), ("i64", "n")])
    v, kind = Vector(target.isa, f), I32S if dtype == "int8" else F32S
    steps, rows = fmt.steps_per_group, [_ROW_BYTES * row for row in range(positions)]
    starts = [f.load(kind, "%y", 64 * i) for i in range(positions * blocks)]

    def turn(_: Value, carried: list[Value]) -> list[Value]:
        x, w, *sums = carried
        sums = fmt.emit_group(v, rows, x, w, sums, steps)
        return [f.at(x, 64), f.at(w, fmt.group_bytes(blocks, steps)), *sums]

    state = [("ptr", "%x"), ("ptr", "%w"), *((kind, start) for start in starts)]
    _, _, *sums = f.loop(0, "%n", state, turn)
    for i, total in enumerate(sums):
        f.store(kind, total, "%y", 64 * i)
    return instructions(inner_loop(assembly(module_text([f]), target)), target.arch)


@cache
def _results(kind: Results, target: Target) -> list[Instruction]:
    """The code of 16 results each of `SPOTS` positions."""
    text = module_text([result_loop("results", kind, target.isa)])
    return instructions(inner_loop(assembly(text, target)), target.arch)

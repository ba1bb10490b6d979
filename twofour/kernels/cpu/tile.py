"""One tile of a convolution: all its sums in registers, from start to store.

    sums = start                                         positions x blocks accumulators
    for each run of inputs, for each group of steps:
        sums = format.emit_group(...)                    a kernel file's own part
    y = epilogue(sums)

A tile is a function of its own, which the loops of nest.py call.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.core.dynamic import TENSOR
from twofour.kernels.cpu.epilogue import emit_epilogue
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.packing import CONSTANTS_BYTES, Format, end_steps, panel_bytes
from twofour.kernels.cpu.problem import Config, ConvProblem
from twofour.kernels.cpu.vector import F32S, I32S, Vector, every


@dataclass(frozen=True)
class Tile:
    """`height` x `width` positions of `config.blocks` blocks of channels.

    Attributes:
        problem: what is computed.
        fmt: packed format and inner loop.
        config: blocks and prefetch distance.
        height: output rows.
        width: output columns.
        centre: what the inner loop takes off each integer input as stored.
    """

    problem: ConvProblem
    fmt: Format
    config: Config
    height: int
    width: int
    centre: int = 0

    def emit(self, name: str, isa: str) -> Function:
        """The function `name(x, w, y, r, h, left)`.

        `h` is the header, `left` the number of output channels from here on.
        """
        problem, blocks = self.problem, self.config.blocks
        f = Function(name, [("ptr", p) for p in "xwyrh"] + [("i64", "left")], linkage="internal")
        v = Vector(isa, f)
        spots = [(i, j) for i in range(self.height) for j in range(self.width)]
        down, across = problem.x.row * problem.stride[0], problem.x.pixel * problem.stride[1]
        rows = [i * down + j * across for i, j in spots]
        constants = f.at("%w", panel_bytes(problem, self.fmt, blocks) - blocks * CONSTANTS_BYTES)
        starts = self._starts(f, constants)
        state = ["%x", "%w", *starts * len(rows)]
        _, w, *sums = self._window(v, rows, state, self._levels())
        if problem.ends:
            sums = self._ends(v, rows, w, sums)
        emit_epilogue(v, problem, spots, sums, constants, blocks)
        return f

    def _starts(self, f: Function, constants: Value) -> list[Value]:
        """What the sums of each block begin with."""
        blocks, later = self.config.blocks, self.problem.dynamic == TENSOR
        if self.problem.dtype != "int8" or (later and not self.centre):
            return ["zeroinitializer"] * blocks
        starts = [f.load(I32S, constants, b * CONSTANTS_BYTES, 4) for b in range(blocks)]
        if not later:
            return starts
        # Minus the sum of the weights, which the epilogue multiplies by the zero point.
        return [f.let(f"mul {I32S} {start}, {every('i32', -self.centre)}") for start in starts]

    def _ends(self, v: Vector, rows: list[int], w: Value, sums: list[Value]) -> list[Value]:
        """The steps that the ends of runs make, each filter row a run; `w`: their weights."""
        problem, blocks, sums = self.problem, self.config.blocks, list(sums)
        runs = [i * problem.dilation[0] * problem.x.row for i in range(problem.segments)]
        each = self.fmt.k_per_step // problem.ends
        for step in range(end_steps(problem, self.fmt)):
            weights = [v.f.load(I32S, w, 64 * (step * blocks + b), 64) for b in range(blocks)]
            for row, offset in enumerate(rows):
                v.f.in_order()
                places = [offset + run for run in runs[each * step : each * (step + 1)]]
                inputs = self._joined(v, places)
                for block in range(blocks):
                    at = row * blocks + block
                    sums[at] = v.dot4(sums[at], inputs, weights[block])
        return sums

    def _joined(self, v: Vector, places: list[int]) -> Value:
        """Each lane: the ends of the runs at these offsets, one after the other."""
        end, size = self.problem.segment_k, self.problem.ends
        inputs = v.broadcast4("%x", places[0] + end)
        for index, place in enumerate(places[1:], 1):
            inputs = v.merged(inputs, v.broadcast4("%x", place + end - index * size), index, size)
        return inputs

    def _levels(self) -> list[tuple[int, int]]:
        """(count, bytes) of the loops over a window's runs.

        These are the filter rows, and the taps of a row where they lie apart.
        """
        problem = self.problem
        levels = [(problem.kernel[0], problem.dilation[0] * problem.x.row)]
        if not problem.taps_joined:
            levels.append((problem.kernel[1], problem.dilation[1] * problem.x.pixel))
        return [level for level in levels if level[0] > 1]

    def _window(
        self, v: Vector, rows: list[int], state: list[Value], levels: list[tuple[int, int]]
    ) -> list[Value]:
        """All runs; `state` is x, w and the sums, before and after."""
        if not levels:
            return self._run(v, rows, state)
        count, stride = levels[0]

        def turn(_: Value, carried: list[Value]) -> list[Value]:
            after = self._window(v, rows, carried, levels[1:])
            return [v.f.at(carried[0], stride), *after[1:]]

        return v.f.loop(0, count, self._typed(state), turn)

    def _run(self, v: Vector, rows: list[int], state: list[Value]) -> list[Value]:
        """One run; its last step may begin earlier, to end with it."""
        steps = -(-self.problem.segment_k // self.fmt.k_per_step)
        missing = -self.problem.segment_k % self.fmt.k_per_step
        if not (missing and self.fmt.overlaps):
            return self._steps(v, rows, state, steps)
        x, *rest = self._steps(v, rows, state, steps - 1)
        back = v.f.at(x, -missing * self.problem.x_bytes)
        return self._group(v, rows, [back, *rest], 1)

    def _steps(self, v: Vector, rows: list[int], state: list[Value], steps: int) -> list[Value]:
        """A loop of whole groups, and what is left."""
        whole = self.fmt.steps_per_group
        full, rest = divmod(steps, whole)
        if full > 1:
            state = v.f.loop(
                0, full, self._typed(state), lambda _, carried: self._group(v, rows, carried, whole)
            )
        elif full == 1:
            state = self._group(v, rows, state, whole)
        return self._group(v, rows, state, rest) if rest else state

    def _group(self, v: Vector, rows: list[int], state: list[Value], steps: int) -> list[Value]:
        """One group of steps, its weights prefetched for a later one."""
        f, (x, w, *sums) = v.f, state
        size = self.fmt.group_bytes(self.config.blocks, steps)
        for line in range(0, size if self.config.prefetch_bytes else 0, 64):
            ahead = f.at(w, self.config.prefetch_bytes + line)
            f.call(
                "void", "llvm.prefetch.p0", ("ptr", ahead), ("i32", "0"), ("i32", "3"), ("i32", "1")
            )
        sums = self.fmt.emit_group(v, rows, x, w, sums, steps)
        inputs = steps * self.fmt.k_per_step * self.problem.x_bytes
        return [f.at(x, inputs), f.at(w, size), *sums]

    def _typed(self, state: list[Value]) -> list[tuple[str, Value]]:
        """`state` with its types, as a loop carries it."""
        kind = I32S if self.problem.dtype == "int8" else F32S
        return [("ptr", state[0]), ("ptr", state[1]), *((kind, s) for s in state[2:])]

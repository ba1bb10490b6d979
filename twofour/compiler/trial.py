"""One candidate kernel on trial: compared with the definition, then timed.

Weights of a network larger than L2 are not in a near cache when their layer's turn comes, and not
even in L3 if all of them do not fit there. So a kernel is timed on copies of its weights in turn,
as many as weigh what those of the whole network do, unless these fit L2.

The definition is slow, so inputs repeat: of many images three differ, in turns, and of many rows of
a matrix as many as a prime. The answers repeat likewise, and every result is compared with its own.
That is as good as inputs that never repeat: each image stands beside two others, so one read or
written in another's place is found unless it is a whole multiple of three away; all kinds of tiles
meet in each image; and as a prime divides no height of tiles, a tile's rows are others each time.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.layout import ALIGNMENT
from twofour.core.abi import BINDINGS, SLACK_BYTES, WEIGHTS
from twofour.core.bfloat16 import ROUNDING, from_bf16, to_bf16
from twofour.core.dynamic import TENSOR
from twofour.core.errors import Error
from twofour.core.memory import address, allocate
from twofour.core.numerics import Epilogue, Window, convolve, requantize
from twofour.kernels.cpu.problem import Config, ConvProblem, Strides
from twofour.kernels.cpu.program import Call, Operand
from twofour.kernels.cpu.quantize_rows import row_tail
from twofour.kernels.cpu.tactic import Tactic
from twofour.runtime.cpu import Code, Workers

Array = NDArray[Any]
_ROUND_US = 300.0  # a round runs a kernel for about this long
_GUARD = 0xA5
_KINDS = {"int8": np.uint8, "bfloat16": np.uint16, "float32": np.float32}
CALLS = 16  # of a kernel in the program that times it on several threads
_IMAGES, _ROWS = 3, 509  # that differ


class WrongResult(Error):
    """A generated kernel differs from the definition: a fault of twofour, not of the input."""


@dataclass(frozen=True)
class Option:
    """A candidate.

    Attributes:
        tactic: the tactic.
        config: its configuration.
        key: of its time in the cache.
        by_panels: whether several threads share its panels, not its row pieces; None for one.
        handover_us: what a trial does not see: threads that read what others have written.
    """

    tactic: Tactic
    config: Config
    key: str
    by_panels: bool | None = None
    handover_us: float = 0.0


@dataclass
class Packed:
    """Weights as a kernel reads them, once or several times over.

    Attributes:
        memory: the copies, aligned.
        step: bytes from one copy to the next.
        end: bytes of all copies.
        begin: where the copy lies that was not read for the longest time.
    """

    memory: Array
    step: int
    end: int
    begin: int = 0


Timer = Callable[[int], float]


def interleaved(timers: dict[str, Timer], rounds: int) -> dict[str, float]:
    """Time of each in microseconds: the least of `rounds` in which they take turns.

    Whatever disturbs a kernel makes it slower. On a busy machine that may be most of the rounds.
    """
    counts = {}
    for key, timer in timers.items():
        once_us = timer(1)
        steady_us = timer(2) if once_us < 2 * _ROUND_US else once_us
        counts[key] = max(1, int(_ROUND_US / max(steady_us, 0.05)))
    samples: dict[str, list[float]] = {key: [] for key in timers}
    for _ in range(rounds):
        for key, timer in timers.items():
            samples[key].append(timer(counts[key]))
    return {key: min(values) for key, values in samples.items()}


def timer_of(code: Code, symbol: str, arguments: tuple[int, ...], packed: Packed) -> Timer:
    """timer(n) -> microseconds a run, over n runs, each on the next copy of the weights."""
    repeat, kernel = code.repeat(), code.address(symbol)

    def timer(count: int) -> float:
        start = time.perf_counter_ns()
        repeat(kernel, *arguments, count, packed.begin, packed.step, packed.end)
        packed.begin = (packed.begin + count * packed.step) % packed.end
        return (time.perf_counter_ns() - start) / count / 1e3

    timer.__dict__["code"] = code  # lives as long as the timer
    return timer


def shared_timer(
    code: Code, symbol: str, arguments: tuple[int, ...], packed: Packed, workers: Workers
) -> Timer:
    """As `timer_of`, for a program that several threads run: `symbol` makes `CALLS` calls."""
    x, w, y, r = arguments[:4]
    table = (ctypes.c_int64 * 6)(0, w, address(workers.sync), x, y, r)
    program, where = code.address(symbol), ctypes.addressof(table)

    def timer(count: int) -> float:
        turns = max(1, count // CALLS)
        start = time.perf_counter_ns()
        for _ in range(turns):
            workers.run(program, where)
        return (time.perf_counter_ns() - start) / (turns * CALLS) / 1e3

    timer.__dict__["table"] = table  # lives as long as the timer
    return timer


def shared_calls(kernel: str, option: Option, problem: ConvProblem, packed: Packed) -> list[Call]:
    """`CALLS` calls of a kernel, each on other weights where there are copies of them."""
    copies = packed.end // packed.step
    x, y, r = (Operand(BINDINGS + i) for i in range(3))
    pieces, panels = option.tactic.kernel.work(problem, option.config)
    return [
        Call(
            kernel,
            x,
            Operand(WEIGHTS, i * copies // CALLS % copies * packed.step),
            y,
            r,
            pieces,
            panels,
            by_panels=option.by_panels,
        )
        for i in range(CALLS)
    ]


class Trial:
    """One problem with random inputs and the right answer.

    Every tensor has a buffer of its own, with guard bytes around the output.

    Attributes:
        timers: of the candidates that were built, by their keys.
    """

    def __init__(self, problem: ConvProblem, w: Array, epilogue: Epilogue, x_zero: int) -> None:
        """Makes the inputs and computes the answer."""
        self.problem, self.w, self.epilogue, self.x_zero = problem, w, epilogue, x_zero
        self.timers: dict[str, Timer] = {}
        self._packed: dict[tuple[str, Config, int], Packed] = {}
        rng = np.random.default_rng(0)
        (kh, kw), (dh, dw), (sh, sw) = problem.kernel, problem.dilation, problem.stride
        height, width = (
            (problem.out_h - 1) * sh + (kh - 1) * dh + 1,
            (problem.out_w - 1) * sw + (kw - 1) * dw + 1,
        )
        channels = problem.c * problem.groups
        self.x = _Buffer(problem.x, (problem.batch, height, width, channels), problem.dtype, rng)
        outs = (problem.batch, problem.out_h, problem.out_w, problem.n * problem.groups)
        self.y = _Buffer(problem.y, outs, problem.out, None)
        self.r = _Buffer(problem.r, outs, problem.add, rng) if problem.r is not None else None
        self._cycle = _Cycle.of(problem)
        for given in filter(None, (self.x, self.r)):
            self._cycle.repeat(given.values())
        self._scales = self._zeros = None
        if problem.dynamic:
            self._scales, self._zeros = self._write_tails(rng)
        self._sums = self._convolved(lambda values: values, x_zero)
        r = self._cycle.first(self.r.real()) if self.r is not None else None
        self._answer = requantize(self._sums, epilogue, r, self._scales)

    def _write_tails(self, rng: np.random.Generator) -> tuple[Array, Array]:
        """Scales and zero points behind the rows of x; returns those that differ."""
        begin = row_tail(self.problem.c)[0]
        scales, zeros = (self.x.behind(begin + at, t) for at, t in ((0, np.float32), (4, np.int32)))
        scales[...] = rng.uniform(0.01, 1.0, scales.shape)
        zeros[...] = rng.integers(0, 256, zeros.shape)
        for each in (scales, zeros):
            self._cycle.repeat(each)
        return self._cycle.first(scales).copy(), self._cycle.first(zeros).copy()

    def _convolved(self, function: Callable[[Array], Array], x_zero: int = 0) -> Array:
        """The sums of function(x) and function(w), as far as they differ."""
        problem = self.problem
        window = Window(problem.kernel, problem.stride, problem.dilation)
        x, w = function(self._cycle.first(self.x.real())), function(self.w)
        if problem.dynamic != TENSOR:
            return convolve(x, w, window, problem.groups, x_zero)
        moved: Array = self._zeros * w.reshape(w.shape[0], -1).sum(1, dtype=np.int32)
        sums: Array = convolve(x, w, window, problem.groups) - moved
        return sums

    def pack(self, option: Option, *, cold_bytes: int) -> Packed:
        """The weights as the kernel reads them, in copies of at least that size together.

        Candidates that read the same bytes share them.
        """
        key = (option.tactic.name, option.config.plain, cold_bytes)
        if key not in self._packed:
            kernel, problem = option.tactic.kernel, self.problem
            packed = kernel.pack(self.w, problem, option.config, self.epilogue, self.x_zero)
            step = -(-packed.nbytes // ALIGNMENT) * ALIGNMENT
            copies = max(1, -(-cold_bytes // step))
            self._packed[key] = self._known(packed, step, copies) or _copied(packed, step, copies)
        return self._packed[key]

    def _known(self, packed: NDArray[np.uint8], step: int, copies: int) -> Packed | None:
        """These copies, if another candidate has them."""
        for other in self._packed.values():
            same = (other.step, other.end) == (step, copies * step)
            if same and np.array_equal(other.memory[: packed.nbytes], packed):
                return other
        return None

    def arguments(self, option: Option, packed: Packed, *, timed: bool) -> tuple[int, ...]:
        """Pointers and the whole range of work.

        Args:
            option: the candidate.
            packed: its weights.
            timed: the residual is overwritten in place, as in an engine; else it is kept.
        """
        pieces, panels = option.tactic.kernel.work(self.problem, option.config)
        in_place = timed and self.problem.r == self.problem.y
        r = self.y if in_place else self.r or self.y
        pointers = (self.x.address, address(packed.memory), self.y.address, r.address)
        return (*pointers, 0, pieces, 0, panels)

    def check(self, code: Code, symbol: str, option: Option, packed: Packed) -> None:
        """Runs once and compares everything, guard bytes included."""
        self.y.memory[:] = _GUARD
        code.kernel(symbol)(*self.arguments(option, packed, timed=False))
        got, expected = self.y.real(), self._cycle.all(self._answer)
        wrong = (
            got != expected
            if got.dtype != np.float32
            else ~_close(got, expected, self._cycle.all(self._slack))
        )
        self.y.values()[...] = _guard(self.y.kind)
        untouched = bool((self.y.memory == _GUARD).all())
        if wrong.any() or not untouched:
            raise self._fault(option, wrong, untouched)

    def _fault(self, option: Option, wrong: NDArray[np.bool_], untouched: bool) -> WrongResult:
        """What a kernel did wrong: values that differ, or bytes overwritten around the output."""
        where = tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.any() else ()
        around = "are intact" if untouched else "were overwritten"
        return WrongResult(
            f"kernel {option.tactic.name} {option.config} computes a wrong result",
            [
                f"{self.problem}",
                f"{int(wrong.sum())} of {wrong.size} values differ, first at {where}",
                f"bytes around the output {around}",
            ],
            "report this with the lines above; until it is mended, build with another --isa",
        )

    @cached_property
    def _slack(self) -> Array:
        """Bound on the rounding of float sums.

        K eps sum |x w|, and one step for each operation of the epilogue; none where sums overflow.
        A result in bfloat16 may be rounded to the other side.
        """
        answer, epilogue = self._answer, self.epilogue
        if self.problem.dtype == "int8":
            rows = 1.0 if self._scales is None else self._scales
            size = np.abs(self._sums) * rows * np.abs(epilogue.scale) + np.abs(epilogue.bias) + 8
            slack: Array = 1e-6 * size
            return slack
        k = self.problem.segments * self.problem.segment_k
        size = self._convolved(np.abs)
        size = np.where(size < np.finfo(np.float32).max, size, np.inf)
        slack = (k + 4) * float(np.finfo(np.float32).eps) * (size + np.abs(epilogue.bias) + 8)
        rounding = 2 * ROUNDING * np.abs(answer) if self.problem.out == "bfloat16" else 0.0
        return slack + rounding


@dataclass(frozen=True)
class _Cycle:
    """How tensors repeat: along `axis`, element i of `count` is element i % `period`."""

    axis: int
    count: int
    period: int

    @staticmethod
    def of(problem: ConvProblem) -> _Cycle:
        """Of the images, or of the rows of a matrix."""
        if problem.batch == 1 and problem.is_column:
            return _Cycle(1, problem.out_h, min(problem.out_h, _ROWS))
        return _Cycle(0, problem.batch, min(problem.batch, _IMAGES))

    def first(self, values: Array) -> Array:
        """The part that does not repeat."""
        return values.swapaxes(0, self.axis)[: self.period].swapaxes(0, self.axis)

    def repeat(self, values: Array) -> None:
        """Writes the first part again and again."""
        along = values.swapaxes(0, self.axis)
        for begin in range(self.period, self.count, self.period):
            along[begin : begin + self.period] = along[: min(self.period, self.count - begin)]

    def all(self, part: Array) -> Array:
        """The whole from its first part."""
        return np.take(part, np.arange(self.count) % self.period, self.axis)


def _copied(packed: NDArray[np.uint8], step: int, copies: int) -> Packed:
    """So many copies, `step` bytes apart."""
    memory = allocate(copies * step + SLACK_BYTES, huge=True)
    memory[: copies * step].reshape(copies, step)[:, : packed.nbytes] = packed
    return Packed(memory, step, copies * step)


def _guard(dtype: Any) -> Any:
    """The guard pattern as one element."""
    return np.frombuffer(bytes([_GUARD] * 4), dtype)[0]


def _close(got: Array, expected: Array, slack: Array) -> NDArray[np.bool_]:
    """Within the bound, where there is one."""
    with np.errstate(invalid="ignore"):
        within = np.abs(got.astype(np.float64) - expected) <= slack
    accepted: NDArray[np.bool_] = within | (got == expected) | ~np.isfinite(slack)
    return accepted


class _Buffer:
    """A strided tensor in memory of its own."""

    def __init__(
        self, strides: Strides, shape: tuple[int, ...], dtype: str, rng: np.random.Generator | None
    ) -> None:
        self.kind = np.dtype(_KINDS[dtype])
        self.shape, self.strides = (
            shape,
            (strides.image, strides.row, strides.pixel, self.kind.itemsize),
        )
        size = (
            sum((n - 1) * s for n, s in zip(shape, self.strides, strict=True)) + self.kind.itemsize
        )
        self.memory = allocate(size + 4096, huge=True)
        self.address = address(self.memory) + 1024
        self._begin = 1024
        if rng is not None and self.kind == np.uint8:
            self.memory[:] = rng.integers(0, 256, self.memory.size, np.uint8)
        elif rng is not None:
            floats = rng.standard_normal(self.memory.size // self.kind.itemsize, np.float32)
            held = to_bf16(floats) if self.kind == np.uint16 else floats
            self.memory.view(self.kind)[: held.size] = held

    def real(self) -> Array:
        """What the tensor stands for: bfloat16 as float32, all else as it is."""
        return from_bf16(self.values()) if self.kind == np.uint16 else self.values()

    def behind(self, offset: int, kind: Any) -> Array:
        """One number for each pixel, at so many bytes from its begin, as a view."""
        flat = self.memory[self._begin + offset :]
        flat = flat[: flat.size // 4 * 4].view(kind)
        return np.lib.stride_tricks.as_strided(flat, (*self.shape[:3], 1), (*self.strides[:3], 4))

    def values(self) -> Array:
        """The tensor as a view."""
        flat = (
            self.memory[self._begin :].view()
            if self.kind == np.uint8
            else self.memory[self._begin :]
        )
        flat = flat[: flat.size // self.kind.itemsize * self.kind.itemsize].view(self.kind)
        return np.lib.stride_tricks.as_strided(flat, self.shape, self.strides)

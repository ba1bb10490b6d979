"""Choosing a kernel by time: legal -> build -> compare with the reference -> time -> choose.

A candidate that gives a wrong result is an error, never a slow candidate. Candidates are timed in
interleaved rounds, so that a disturbance of the machine hits all of them; the fastest median wins.
Times are kept in a cache that may live in a file; its key lists everything a time depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.abi import SLACK_BYTES
from twofour.core.errors import Error, InputError
from twofour.core.numerics import Epilogue, Window, convolve, requantize
from twofour.core.target import Target
from twofour.engine import Candidate
from twofour.kernels.cpu.llvm import TOOLS, Source, compile_object, renamed
from twofour.kernels.cpu.nest import emit_kernel
from twofour.kernels.cpu.packing import pack
from twofour.kernels.cpu.problem import Config, ConvProblem, Pieces, Strides
from twofour.kernels.cpu.program import imbalance, threads_text
from twofour.kernels.cpu.tactic import Tactic, tactics
from twofour.runtime.cpu import Code, address, allocate

Array = NDArray[Any]
_ROUNDS = 9
_ROUND_US = 300.0  # a round runs a kernel for about this long
_GUARD = 0xA5


class WrongResult(Error):
    """A generated kernel differs from the definition: a fault of twofour, not of the input."""


@dataclass(frozen=True)
class Choice:
    """A tactic with its configuration, as timed.

    Attributes:
        tactic: the tactic.
        config: its configuration.
        time_us: median time of one run.
        text: the kernel as an LLVM module, its function named `kernel`.
    """

    tactic: Tactic
    config: Config
    time_us: float
    text: str


@dataclass
class TimingCache:
    """Measured times by key: only of kernels whose results were found right.

    Saved under a temporary name, then renamed.
    """

    times_us: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def load(path: Path | None) -> TimingCache:
        """The cache in a file; an empty one where there is none.

        Raises:
            InputError: the file is not a timing cache, or its folder does not exist.
        """
        if path is None:
            return TimingCache()
        if not path.parent.is_dir():
            raise _unwritable(path, f"there is no folder {path.parent}")
        if not path.exists():
            return TimingCache()
        try:
            given = json.loads(path.read_text())["times_us"]
            times = {str(k): float(v) for k, v in given.items()}
            if wrong := [k for k, v in times.items() if not 0 < v < math.inf]:
                raise ValueError(f"{wrong[0]} took {times[wrong[0]]} us")
            return TimingCache(times)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(
                f"{path} is not a timing cache",
                [f"{type(e).__name__}: {e}"],
                "name a file that does not exist yet, or delete this one",
            ) from e

    def save(self, path: Path | None) -> None:
        """Writes the file.

        Raises:
            InputError: it cannot be written.
        """
        if path is None:
            return
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_text(json.dumps({"times_us": self.times_us}, indent=0))
            temporary.replace(path)
        except OSError as e:
            raise _unwritable(path, str(e)) from e
        finally:
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, reason: str) -> InputError:
    what = f"cannot write the timing cache {path}"
    return InputError(what, [reason], "choose an existing, writable folder")


def timing_key(
    problem: ConvProblem, tactic: Tactic, config: Config, target: Target, source: str
) -> str:
    """All that a time depends on, hashed."""
    parts = [
        asdict(problem),
        tactic.name,
        tactic.dtype,
        asdict(config),
        target.to_json(),
        TOOLS,
        source,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Tuner:
    """Times candidates on this machine and remembers.

    Args:
        target: what to build for.
        cache: times already known.
        threads: that will share the work: a tile that divides it evenly may beat a faster one.
    """

    def __init__(self, target: Target, cache: TimingCache, threads: int = 1) -> None:
        """Measures nothing yet."""
        self.target = target
        self.cache = cache
        self.threads = threads
        self._texts: dict[tuple[ConvProblem, str, Config], str] = {}

    def choose(
        self,
        problem: ConvProblem,
        w: Array,
        epilogue: Epilogue,
        x_zero: int,
        wanted: Callable[[Tactic], str],
    ) -> tuple[Choice, tuple[Candidate, ...]]:
        """The fastest tactic and configuration, and everything it was compared with.

        Args:
            problem: the problem.
            w: its weights.
            epilogue: its constants.
            x_zero: zero point of x as stored.
            wanted: why a tactic is not to be considered ("" if it is).

        Raises:
            WrongResult: a candidate's output differs from the definition.
        """
        options, refused = self._options(problem, w, wanted)
        new = [o for o in options if o.key not in self.cache.times_us]
        if new:
            self._measure(_Trial(problem, w, epilogue, x_zero), new)
        choices = [Choice(o.tactic, o.config, self.cache.times_us[o.key], o.text) for o in options]
        choices.sort(key=lambda c: c.time_us * imbalance(*work(problem, c.config), self.threads))
        timed = [Candidate(c.tactic.name, str(c.config), round(c.time_us, 3)) for c in choices]
        return choices[0], (*timed, *refused)

    def _options(
        self, problem: ConvProblem, w: Array, wanted: Callable[[Tactic], str]
    ) -> tuple[list[_Option], list[Candidate]]:
        """What can run the problem, and what cannot with the reason."""
        options, refused = [], []
        for tactic in tactics():
            if tactic.dtype != problem.dtype:
                continue
            if reason := wanted(tactic) or tactic.refuse(problem, w, self.target.isa):
                refused.append(Candidate(tactic.name, "", None, reason))
                continue
            for config in tactic.configs(problem, self.target.isa):
                text = self._text(problem, tactic, config)
                key = timing_key(
                    problem, tactic, config, self.target, hashlib.sha256(text.encode()).hexdigest()
                )
                options.append(_Option(tactic, config, text, key))
        return options, refused

    def _text(self, problem: ConvProblem, tactic: Tactic, config: Config) -> str:
        """The kernel; written once for all layers of one shape."""
        key = (problem, tactic.name, config)
        if key not in self._texts:
            isa = self.target.isa
            self._texts[key] = emit_kernel("kernel", problem, tactic.format, config, isa)
        return self._texts[key]

    def _measure(self, trial: _Trial, options: Sequence[_Option]) -> None:
        """Builds, checks and times; results go to the cache."""
        sources = [Source(renamed(o.text, f"kernel{i}_")) for i, o in enumerate(options)]
        code = Code([compile_object([*sources, Source(threads_text())], self.target)])
        runs = {}
        memories = []  # timers hold bare addresses
        for index, option in enumerate(options):
            weights = trial.pack(option)
            memories.append(weights)
            trial.check(code, f"kernel{index}_", option, weights)
            runs[option.key] = _timer(code, f"kernel{index}_", trial.arguments(option, weights))
        self.cache.times_us.update(_interleaved(runs))


@dataclass(frozen=True)
class _Option:
    """A candidate with its code and the key of its time."""

    tactic: Tactic
    config: Config
    text: str
    key: str


Timer = Callable[[int], float]


def _interleaved(timers: dict[str, Timer]) -> dict[str, float]:
    """Median time in microseconds of each, measured in turns."""
    counts = {}
    for key, timer in timers.items():
        timer(1)
        counts[key] = max(1, int(_ROUND_US / max(timer(2), 0.05)))
    samples: dict[str, list[float]] = {key: [] for key in timers}
    for _ in range(_ROUNDS):
        for key, timer in timers.items():
            samples[key].append(timer(counts[key]))
    return {key: float(np.median(values)) for key, values in samples.items()}


def _timer(code: Code, symbol: str, arguments: tuple[int, ...]) -> Timer:
    """timer(n) -> microseconds a run, over n runs."""
    repeat, kernel = code.repeat(), code.address(symbol)

    def timer(count: int) -> float:
        start = time.perf_counter_ns()
        repeat(kernel, *arguments, count)
        return (time.perf_counter_ns() - start) / count / 1e3

    return timer


class _Trial:
    """One problem with random inputs and the right answer.

    Every tensor has a buffer of its own, with guard bytes around the output.
    """

    def __init__(self, problem: ConvProblem, w: Array, epilogue: Epilogue, x_zero: int) -> None:
        self.problem, self.w, self.epilogue, self.x_zero = problem, w, epilogue, x_zero
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
        window = Window(problem.kernel, problem.stride, problem.dilation)
        sums = convolve(self.x.values(), w, window, problem.groups, x_zero)
        self.sums = sums
        self.expected = requantize(sums, epilogue, self.r.values() if self.r else None)

    def pack(self, option: _Option) -> Array:
        """The weights as the kernel reads them, in aligned memory."""
        fmt, blocks = option.tactic.format, option.config.blocks
        packed = pack(self.w, self.problem, fmt, blocks, self.epilogue, self.x_zero)
        memory = allocate(packed.nbytes + SLACK_BYTES, huge=True)
        memory[: packed.nbytes] = packed
        return memory

    def arguments(self, option: _Option, weights: Array) -> tuple[int, ...]:
        """Pointers and the whole range of work."""
        pieces, panels = work(self.problem, option.config)
        r = self.r or self.y
        return (self.x.address, address(weights), self.y.address, r.address, 0, pieces, 0, panels)

    def check(self, code: Code, symbol: str, option: _Option, weights: Array) -> None:
        """Runs once and compares everything, guard bytes included."""
        self.y.memory[:] = _GUARD
        before = self.y.memory.copy()
        code.kernel(symbol)(*self.arguments(option, weights))
        got = self.y.values().copy()
        self.y.values()[...] = _guard(got.dtype)
        untouched = bool((self.y.memory == before).all())
        wrong = (
            got != self.expected
            if got.dtype != np.float32
            else ~_close(got, self.expected, self._slack())
        )
        if wrong.any() or not untouched:
            raise self._fault(option, wrong, untouched)

    def _fault(self, option: _Option, wrong: NDArray[np.bool_], untouched: bool) -> WrongResult:
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

    def _slack(self) -> Array | float:
        """Bound on the rounding of float sums.

        K eps sum |x w|, and one step for each operation of the epilogue; none where sums overflow.
        """
        if self.problem.dtype != "float32":
            return 1e-6 * (
                np.abs(self.sums) * np.abs(self.epilogue.scale) + np.abs(self.epilogue.bias) + 8
            )
        k = self.problem.segments * self.problem.segment_k
        window = Window(self.problem.kernel, self.problem.stride, self.problem.dilation)
        size = convolve(np.abs(self.x.values()), np.abs(self.w), window, self.problem.groups)
        size = np.where(size < np.finfo(np.float32).max, size, np.inf)
        return (k + 4) * float(np.finfo(np.float32).eps) * (size + np.abs(self.epilogue.bias) + 8)


def _guard(dtype: Any) -> Any:
    """The guard pattern as one element."""
    return np.frombuffer(bytes([_GUARD] * 4), dtype)[0]


def _close(got: Array, expected: Array, slack: Array | float) -> NDArray[np.bool_]:
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
        self.kind = np.dtype(np.uint8 if dtype == "int8" else np.float32)
        self.shape, self.strides = (
            shape,
            (strides.image, strides.row, strides.pixel, self.kind.itemsize),
        )
        size = (
            sum((n - 1) * s for n, s in zip(shape, self.strides, strict=True)) + self.kind.itemsize
        )
        self.memory = allocate(size + 4096)
        self.address = address(self.memory) + 1024
        self._begin = 1024
        if rng is not None and self.kind == np.uint8:
            self.memory[:] = rng.integers(0, 256, self.memory.size, np.uint8)
        elif rng is not None:
            self.memory.view(np.float32)[:] = rng.standard_normal(self.memory.size // 4, np.float32)

    def values(self) -> Array:
        """The tensor as a view."""
        flat = (
            self.memory[self._begin :].view()
            if self.kind == np.uint8
            else self.memory[self._begin :]
        )
        flat = flat[: flat.size // self.kind.itemsize * self.kind.itemsize].view(self.kind)
        return np.lib.stride_tricks.as_strided(flat, self.shape, self.strides)


def work(problem: ConvProblem, config: Config) -> tuple[int, int]:
    """Row pieces and panels of a kernel."""
    pieces = problem.batch * Pieces.of(problem.out_h, config.tile_h).count
    return pieces, problem.groups * problem.blocks // config.blocks

"""Choosing a kernel by time: legal -> build -> compare with the reference -> time -> choose.

A candidate that gives a wrong result is an error, never a slow candidate. Candidates are timed in
interleaved rounds, so that a disturbance of the machine hits all of them; the fastest median wins.
Times are kept in a cache that may live in a file; its key lists everything a time depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from twofour.compiler.trial import Option, Trial, interleaved, timer_of
from twofour.core.errors import InputError
from twofour.core.numerics import Epilogue
from twofour.core.target import Target
from twofour.engine import Candidate
from twofour.kernels.cpu.llvm import TOOLS, Source, compile_object, renamed
from twofour.kernels.cpu.problem import Config, ConvProblem
from twofour.kernels.cpu.program import imbalance, threads_text
from twofour.kernels.cpu.tactic import Tactic, tactics
from twofour.runtime.cpu import Code

Array = NDArray[Any]


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
        cold: a layer's weights are not in a near cache when its turn comes.
    """

    def __init__(
        self, target: Target, cache: TimingCache, threads: int = 1, *, cold: bool = False
    ) -> None:
        """Measures nothing yet."""
        self.target = target
        self.cache = cache
        self.threads = threads
        self.cold = cold
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
            self._measure(Trial(problem, w, epilogue, x_zero), new)
        choices = [Choice(o.tactic, o.config, self.cache.times_us[o.key], o.text) for o in options]

        def shared_us(c: Choice) -> float:
            work = c.tactic.kernel.work(problem, c.config)
            return c.time_us * imbalance(*work, self.threads)

        choices.sort(key=shared_us)
        timed = [Candidate(c.tactic.name, str(c.config), round(c.time_us, 3)) for c in choices]
        return choices[0], (*timed, *refused)

    def _options(
        self, problem: ConvProblem, w: Array, wanted: Callable[[Tactic], str]
    ) -> tuple[list[Option], list[Candidate]]:
        """What can run the problem, and what cannot with the reason."""
        options, refused = [], []
        for tactic in tactics():
            if (tactic.dtype, tactic.depthwise) != (problem.dtype, problem.depthwise):
                continue
            if reason := wanted(tactic) or tactic.refuse(problem, w, self.target.isa):
                refused.append(Candidate(tactic.name, "", None, reason))
                continue
            for config in tactic.configs(problem, self.target.isa):
                text = self._text(problem, tactic, config)
                key = timing_key(problem, tactic, config, self.target, self._circumstances(text))
                options.append(Option(tactic, config, text, key))
        return options, refused

    def _circumstances(self, text: str) -> str:
        """What else a time depends on: the kernel's text, and whether its weights were near."""
        return f"{hashlib.sha256(text.encode()).hexdigest()} {'cold' if self.cold else 'near'}"

    def _text(self, problem: ConvProblem, tactic: Tactic, config: Config) -> str:
        """The kernel; written once for all layers of one shape."""
        key = (problem, tactic.name, config)
        if key not in self._texts:
            isa = self.target.isa
            self._texts[key] = tactic.kernel.emit("kernel", problem, config, isa)
        return self._texts[key]

    def _measure(self, trial: Trial, options: Sequence[Option]) -> None:
        """Builds, checks and times; results go to the cache."""
        sources = [Source(renamed(o.text, f"kernel{i}_")) for i, o in enumerate(options)]
        code = Code([compile_object([*sources, Source(threads_text())], self.target)])
        runs = {}
        memories = []  # timers hold bare addresses
        for index, option in enumerate(options):
            packed = trial.pack(option, cold=self.cold)
            memories.append(packed)
            trial.check(code, f"kernel{index}_", option, packed)
            runs[option.key] = timer_of(
                code, f"kernel{index}_", trial.arguments(option, packed), packed
            )
        self.cache.times_us.update(interleaved(runs))

"""Choosing a kernel by time: legal -> build -> compare with the reference -> time -> choose.

A candidate that gives a wrong result is an error, never a slow candidate. Candidates take turns,
and the least time of each counts: what disturbs the machine only adds to it. Times are kept in a
cache that may live in a file; its key lists everything a time depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import twofour.kernels.cpu as home
from twofour.compiler.cost import CostModel
from twofour.compiler.timing_cache import TimingCache
from twofour.compiler.trial import (
    Option,
    Timer,
    Trial,
    interleaved,
    shared_calls,
    shared_timer,
    timer_of,
)
from twofour.core.numerics import Epilogue
from twofour.core.target import Target
from twofour.engine import Candidate
from twofour.kernels.cpu.llvm import TOOLS, Source, compile_object, renamed
from twofour.kernels.cpu.problem import Config, ConvProblem
from twofour.kernels.cpu.program import imbalance, program_text, threads_text, waiting
from twofour.kernels.cpu.tactic import Tactic, tactics
from twofour.runtime.cpu import Code, Workers

Array = NDArray[Any]
_USUAL_EFFORT = 2
_LIKELY = ("2:4/pair", "2:4", "4:8", "")  # patterns, the fastest first where nothing is timed
_ROUNDS = (0, 5, 9, 27)  # of timing, for each effort
_SHARED = 3  # choices of one thread that are tried on several
_PROMISING = 1.25  # a tactic whose best guess takes longer than that times the best is left there
_MOST_WAITING = 1.15  # a split less even than this is not worth timing, where there is a better one
_STEADY, _TRIES = 1.25, 3  # of the machine's pace between two measurements
# Threads that share panels read what the others wrote, before and after: half of each tensor, at
# 27 ns for a line of 64 bytes from another core. Threads that share rows have them in their cache.
_HANDOVER_US = 27e-3 / 64 / 2


@dataclass(frozen=True)
class Choice:
    """A tactic with its configuration, as timed.

    Attributes:
        tactic: the tactic.
        config: its configuration.
        time_us: of one run, undisturbed, or an estimate; None where there is neither.
        by_panels: whether several threads share its panels, not its row pieces.
    """

    tactic: Tactic
    config: Config
    time_us: float | None
    by_panels: bool | None = None

    def __str__(self) -> str:
        """The configuration as reports show it."""
        shared = {None: "", False: ", rows shared", True: ", panels shared"}[self.by_panels]
        return f"{self.config}{shared}"


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


@cache
def kernel_sources() -> str:
    """A hash of everything that writes kernels: a change there may change any time."""
    folder = Path(home.__file__).parent
    files = sorted(folder.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def rounds_of(effort: int) -> int:
    """How often candidates take turns."""
    return _ROUNDS[effort]


def rounded(time_us: float | None) -> float | None:
    """To nanoseconds."""
    return None if time_us is None else round(time_us, 3)


class Tuner:
    """Times candidates on this machine and remembers.

    Args:
        target: what to build for.
        cache: times already known.
        threads: that will share the work: a tile that divides it evenly may beat a faster one.
        cold_bytes: of other weights are read between two runs of a layer; 0 where its own stay in
            a near cache.
        effort: 0 takes the best guess of the likeliest tactic, checked but not timed; 1 times the
            best guess of each tactic; 2 several of those that come close; 3 several of each with
            both orders of the loops, three times as long, also of those known to be slow.
    """

    def __init__(
        self,
        target: Target,
        cache: TimingCache,
        threads: int = 1,
        *,
        cold_bytes: int = 0,
        effort: int = 2,
    ) -> None:
        """Measures nothing yet."""
        self.target = target
        self.cache = cache
        self.threads = threads
        self.cold_bytes = cold_bytes
        self.effort = effort
        self.checked: set[str] = set()  # kernels of plugins that were found right, untimed
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
        trial = cache(lambda: Trial(problem, w, epilogue, x_zero))
        if self.target.cpu:
            choices = self._estimated(problem, options)
        elif self.effort == 0:
            return self._guessed(options, trial()), tuple(refused)
        else:
            choices = self._searched(options, trial)
        if self.threads > 1 and not self.target.cpu:
            choices = self._timed(self._shared(problem, choices[:_SHARED]), trial) + choices
        timed = [Candidate(c.tactic.name, str(c), rounded(c.time_us)) for c in choices]
        return choices[0], (*timed, *refused)

    def _estimated(self, problem: ConvProblem, options: Sequence[Option]) -> list[Choice]:
        """All options with times by the cost model, the best one first."""
        model = CostModel(self.target, self.cold_bytes)
        times = [model.time_us(problem, o.tactic, o.config) for o in options]
        choices = [Choice(o.tactic, o.config, t) for o, t in zip(options, times, strict=True)]
        return [choices[i] for i in sorted(range(len(choices)), key=times.__getitem__)]

    def _guessed(self, options: Sequence[Option], trial: Trial) -> Choice:
        """The first configuration of the tactic that should be the fastest, checked."""
        best = min(options, key=lambda o: _LIKELY.index(o.tactic.pattern))
        sources = [Source(self._text(trial.problem, best)), Source(threads_text(self.target.arch))]
        code = Code([compile_object(sources, self.target)])
        trial.check(code, "kernel", best, trial.pack(best, cold_bytes=0))
        return Choice(best.tactic, best.config, None)

    def _searched(self, options: Sequence[Option], trial: Callable[[], Trial]) -> list[Choice]:
        """What the effort allows with its times, the best one first.

        At the usual effort in three steps: the best guess of each tactic; all tiles of those that
        come close; all orders of the loops and ways to prefetch of the best tile.
        """
        if self.effort != _USUAL_EFFORT:
            return self._timed(options, trial)
        tried = list({o.tactic.name: o for o in reversed(options)}.values())

        def add(more: Callable[[Option], bool]) -> Option:
            """Times these too; returns the best so far."""
            tried.extend(o for o in options if o not in tried and more(o))
            return self._best(tried, trial)

        limit = _PROMISING * self._us(self._best(tried, trial))
        near = {o.tactic.name for o in tried if self._us(o) <= limit}
        tiles = {(o.tactic.name, o.config.plain): o for o in reversed(options)}.values()
        best = add(lambda o: o.tactic.name in near and o in tiles)
        add(lambda o: o.tactic is best.tactic and o.config.plain == best.config.plain)
        return self._timed(tried, trial)

    def _us(self, option: Option) -> float:
        """The time of a candidate that was timed."""
        return self.cache.times_us[option.key]

    def _best(self, options: Sequence[Option], trial: Callable[[], Trial]) -> Option:
        """The fastest."""
        self._timed(options, trial)
        return min(options, key=self._us)

    def _timed(self, options: Sequence[Option], trial: Callable[[], Trial]) -> list[Choice]:
        """The options with their times, measured where they are not known, the best one first."""
        new = [o for o in options if o.key not in self.cache.times_us]
        if new:
            known = [o for o in options if o not in new]
            self._measure(trial(), new, min(known, key=self._us, default=None))
        choices = [Choice(o.tactic, o.config, self._us(o), o.by_panels) for o in options]
        handover = [self._us(o) + o.handover_us for o in options]
        return [choices[i] for i in sorted(range(len(choices)), key=handover.__getitem__)]

    def _options(
        self, problem: ConvProblem, w: Array, wanted: Callable[[Tactic], str]
    ) -> tuple[list[Option], list[Candidate]]:
        """What can run the problem, and what cannot with the reason."""
        options, refused = [], []
        for tactic in tactics():
            kind = (tactic.dtype, tactic.depthwise)
            if kind != (problem.dtype, problem.depthwise) or not tactic.is_for(self.target.isa):
                continue
            slow = "" if self.effort > _USUAL_EFFORT else tactic.why_slow(problem)
            if reason := wanted(tactic) or tactic.refuse(problem, w, self.target.isa) or slow:
                refused.append(Candidate(tactic.name, "", None, reason))
                continue
            configs = self._tried(tactic.configs(problem, self.target.isa))
            options += [self._option(problem, tactic, config) for config in configs]
        return options, refused

    def _tried(self, configs: list[Config]) -> list[Config]:
        """As many configurations as the effort allows."""
        if self.effort < _USUAL_EFFORT:
            return configs[:1]
        if self.effort == _USUAL_EFFORT:
            return configs
        other = [replace(c, panels_outside=not c.panels_outside) for c in configs]
        return list(dict.fromkeys([*configs, *other]))

    def _shared(self, problem: ConvProblem, best: Sequence[Choice]) -> list[Option]:
        """The best choices of one thread as several may share them.

        By rows or by panels, whichever divides evenly; with tiles a little lower, where their
        number then does.
        """
        ways: dict[tuple[str, Config, bool], Option] = {}
        for choice in best:
            tactic, config = choice.tactic, choice.config
            pieces = -(-problem.out_h // config.tile_h)
            even = -(-pieces // self.threads) * self.threads
            lower = replace(config, tile_h=max(1, -(-problem.out_h // even)))
            for each in (config, lower):
                work = tactic.kernel.work(problem, each)
                most = max(imbalance(*work, self.threads), _MOST_WAITING)
                for by_panels in (False, True):
                    if waiting(work[by_panels], self.threads) <= most:
                        key = (tactic.name, each, by_panels)
                        ways[key] = self._option(problem, tactic, each, by_panels)
        return list(ways.values())

    def _option(
        self, problem: ConvProblem, tactic: Tactic, config: Config, by_panels: bool | None = None
    ) -> Option:
        """A candidate with its code and the key of its time: all that it depends on."""
        around = f"{kernel_sources()} {self.cold_bytes}"
        if by_panels is not None:
            around += f" {self.threads} share {'panels' if by_panels else 'rows'}"
        around += "" if self.effort == _USUAL_EFFORT else f" effort {self.effort}"
        key = timing_key(problem, tactic, config, self.target, around)
        handover = _HANDOVER_US * (problem.x_size_bytes + problem.y_size_bytes) * bool(by_panels)
        return Option(tactic, config, key, by_panels, handover)

    def text(self, problem: ConvProblem, tactic: Tactic, config: Config) -> str:
        """A kernel as an LLVM module, its function named `kernel`; written once for its shape."""
        key = (problem, tactic.name, config)
        if key not in self._texts:
            isa = self.target.isa
            self._texts[key] = tactic.kernel.emit("kernel", problem, config, isa)
        return self._texts[key]

    def _text(self, problem: ConvProblem, option: Option | Choice) -> str:
        """Of a candidate."""
        return self.text(problem, option.tactic, option.config)

    def _measure(self, trial: Trial, options: Sequence[Option], rival: Option | None) -> None:
        """Builds, checks and times; results go to the cache.

        Args:
            trial: runs the kernels.
            options: what to time.
            rival: of known time. Where it was timed in this trial it is timed again beside the
                others, which then count in its earlier time: the machine may have changed.
        """
        timers = self._timers(trial, options)
        if rival is not None and rival.key in trial.timers:
            timers[rival.key] = trial.timers[rival.key]
        times, change = self._in_pace(timers, rival)
        self.cache.times_us |= {o.key: times[o.key] * change for o in options}
        if options[0].by_panels is None:  # worker threads end with their timers
            trial.timers |= timers

    def _in_pace(
        self, timers: dict[str, Timer], rival: Option | None
    ) -> tuple[dict[str, float], float]:
        """Times, and the machine's pace when the rival's was taken: the earlier one over this.

        A pace far from 1 may be one kernel's bad luck, so that is tried again; the nearest counts.
        """
        tries: list[tuple[float, dict[str, float]]] = []
        for _ in range(_TRIES):
            times = interleaved(timers, _ROUNDS[self.effort])
            before = times.get(rival.key) if rival is not None else None
            change = self._us(rival) / before if rival is not None and before else 1.0
            tries.append((change, times))
            if 1 / _STEADY < change < _STEADY:
                break
        change, times = min(tries, key=lambda each: abs(math.log(each[0])))
        return times, change

    def _timers(self, trial: Trial, options: Sequence[Option]) -> dict[str, Timer]:
        """The candidates, built and checked."""
        written = [self._text(trial.problem, o) for o in options]
        texts = {text: f"kernel{i}_" for i, text in enumerate(written)}
        names = [texts[text] for text in written]
        sources = [Source(renamed(text, name)) for text, name in texts.items()]
        packs = [trial.pack(o, cold_bytes=self.cold_bytes) for o in options]
        shared = options[0].by_panels is not None
        if shared:
            for index, (option, packed) in enumerate(zip(options, packs, strict=True)):
                calls = shared_calls(names[index], option, trial.problem, packed)
                sources.append(Source(program_text(f"program{index}_", calls, self.threads)))
        if shared:  # a program calls kernels and the barrier: one object
            threads = Source(threads_text(self.target.arch))
            code = Code([compile_object([*sources, threads], self.target)])
        else:
            code = Code([compile_object(sources, self.target), _threads_object(self.target)])
        workers = Workers(code, self.threads) if shared else None
        timers: dict[str, Timer] = {}
        for index, (option, packed) in enumerate(zip(options, packs, strict=True)):
            kernel, arguments = names[index], trial.arguments(option, packed, timed=True)
            trial.check(code, kernel, option, packed)
            timers[option.key] = (
                shared_timer(code, f"program{index}_", arguments, packed, workers)
                if workers is not None
                else timer_of(code, kernel, arguments, packed)
            )
        return timers


@cache
def _threads_object(target: Target) -> bytes:
    """What times kernels on one thread."""
    return compile_object([Source(threads_text(target.arch))], target)

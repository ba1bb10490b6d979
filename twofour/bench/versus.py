"""An engine against its peers: same input, same number of threads, same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from twofour.bench import peers
from twofour.bench.energy import Energy, Unavailable, measure, processor_counters
from twofour.bench.gauge import gauge
from twofour.bench.timing import Array, Contestant, Feeds, Ratio, Schedule, Timing, race, ratio
from twofour.core.version import __version__
from twofour.runtime.session import Session

REFERENCE = "onnxruntime"


@dataclass(frozen=True)
class Match:
    """Whom to measure against, and on what.

    Attributes:
        peers: names of `peers.PEERS`.
        model: ONNX file that ONNX Runtime and OpenVINO run; None if there is none.
        program: `.pt2` file that PyTorch runs; None if there is none.
        threads: for everybody.
        callers: so many call at once, everybody.
        energy_s: for how long after the race each one's energy is measured, if there are counters.
    """

    peers: tuple[str, ...]
    model: Path | None
    program: Path | None
    threads: int
    callers: int = 1
    energy_s: float = 0.0

    def source(self, peer: str) -> Path | None:
        """The file that a peer runs."""
        return self.program if peer == "torch" else self.model


@dataclass(frozen=True)
class Difference:
    """How far an output lies from the reference's.

    Attributes:
        name: of the output.
        cosine: of both as vectors; 1 means the same direction.
        max_abs: largest absolute difference of two elements.
        reference_max_abs: largest absolute value of the reference.
    """

    name: str
    cosine: float
    max_abs: float
    reference_max_abs: float


@dataclass(frozen=True)
class Result:
    """One contestant's row.

    Attributes:
        name: of the contestant.
        version: of what ran it.
        setting: in words.
        timing: of single calls.
        ours_is: how many times as fast ours is; None for ours itself.
    """

    name: str
    version: str
    setting: str
    timing: Timing
    ours_is: Ratio | None


@dataclass(frozen=True)
class Outcome:
    """What one race found.

    Attributes:
        rows: ours first.
        differences: of ours from ONNX Runtime on the model, if there is one.
        gauge: how fast the machine was in each round.
        gauge_sha256: which loop that was.
        energy: of each row, one caller's; None if it was not asked for.
    """

    rows: list[Result]
    differences: list[Difference]
    gauge: Timing
    gauge_sha256: str
    energy: tuple[Energy, ...] | Unavailable | None = None


def ours(
    session: Session, feeds: Feeds, name: str = "twofour", others: Sequence[Session] = ()
) -> Contestant:
    """A session as a contestant: `run` as users call it, its checks and copies included.

    Args:
        session: the first caller's.
        feeds: the input.
        name: of the contestant.
        others: sessions on the same engine, one for each further caller.
    """
    call, *more = (partial(each.run, dict(feeds)) for each in (session, *others))
    setting = f"threads {session.threads}, {session.engine.plan.target}, Session.run"
    if others:
        setting += f", {1 + len(others)} sessions that share the weights"
    return Contestant(name, __version__, setting, call, call, tuple(more))


def versus(
    sessions: Sequence[Session],
    feeds: Feeds,
    match: Match,
    schedule: Schedule | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Measures sessions on an engine, its peers, and the gauge in one race.

    Args:
        sessions: ours, one for each caller.
        feeds: the input for all.
        match: whom to measure against.
        schedule: how long.
        progress: called with (rounds done, rounds).

    Raises:
        InputError: a peer is unknown, not installed, or does not take its file.
    """
    contestants = [ours(sessions[0], feeds, others=sessions[1:])]
    for name in match.peers:
        contestants.append(
            peers.prepare(name, match.source(name), feeds, match.threads, callers=match.callers)
        )
    differences = _against_reference(contestants, feeds, match)
    fixed = gauge()
    *timings, gauged = race([*contestants, fixed.contestant], schedule, progress)
    rows = [
        Result(
            contestant.name,
            contestant.version,
            contestant.setting,
            timing,
            None if contestant is contestants[0] else ratio(timings[0], timing),
        )
        for contestant, timing in zip(contestants, timings, strict=True)
    ]
    energy = _energy(contestants, match.energy_s) if match.energy_s else None
    return Outcome(rows, differences, gauged, fixed.sha256, energy)


def _energy(contestants: Sequence[Contestant], seconds: float) -> tuple[Energy, ...] | Unavailable:
    """One after the other: a counter does not tell who consumes."""
    counters = processor_counters()
    found = []
    for contestant in contestants:
        energy = measure(contestant.call, seconds, counters=counters)
        if isinstance(energy, Unavailable):
            return energy
        found.append(energy)
    return tuple(found)


def _against_reference(
    contestants: Sequence[Contestant], feeds: Feeds, match: Match
) -> list[Difference]:
    if match.model is None:
        return []
    if REFERENCE in match.peers:
        reference = contestants[1 + match.peers.index(REFERENCE)]
    else:
        reference = peers.prepare(REFERENCE, match.model, feeds, match.threads)
    return differences(contestants[0].outputs(), reference.outputs())


def differences(got: dict[str, Array], expected: dict[str, Array]) -> list[Difference]:
    """Compares the outputs that both have."""
    return [
        _difference(name, got[name].astype(np.float64), expected[name].astype(np.float64))
        for name in expected
        if name in got and got[name].shape == expected[name].shape
    ]


def _difference(name: str, got: Array, expected: Array) -> Difference:
    norms = float(np.linalg.norm(got) * np.linalg.norm(expected))
    same = bool(np.array_equal(got, expected))
    cosine = 1.0 if same else float(np.vdot(got, expected)) / norms if norms else 0.0
    largest = float(np.abs(got - expected).max(initial=0.0))
    return Difference(name, cosine, largest, float(np.abs(expected).max(initial=0.0)))

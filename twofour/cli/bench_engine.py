"""twofour bench of one engine: what is measured, on which input, and against which earlier run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twofour.cli.bench_report import (
    circumstances,
    consumption,
    document_of,
    memory_data,
    results,
    verdict_data,
    verdict_lines,
    write_document,
)
from twofour.cli.options import is_engine, require_writable
from twofour.cli.output import Output

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from twofour.bench.baseline import Baseline
    from twofour.bench.regression import Judgement, Rounds
    from twofour.bench.timing import Schedule
    from twofour.bench.versus import Match, Outcome
    from twofour.engine import Engine, TensorInfo

_LOAD_SLICE_S, _LOAD_ROUNDS = 0.1, 10
_MOST_ENERGY_S = 1.0  # of each contestant, counters permitting


@dataclass(frozen=True)
class Request:
    """Who is measured, and how.

    Attributes:
        peers: names.
        model: the peers' ONNX file, if it was given.
        program: PyTorch's, if it was given.
        threads: for everybody, if it was given.
        callers: so many call at once.
        duration_s: timed seconds.
    """

    peers: tuple[str, ...]
    model: Path | None
    program: Path | None
    threads: int | None
    callers: int
    duration_s: float

    def schedule(self) -> Schedule:
        """Turns are longer where several callers meet in each."""
        from twofour.bench.timing import Schedule

        if self.callers == 1:
            return Schedule(self.duration_s)
        return Schedule(self.duration_s, slice_s=_LOAD_SLICE_S, min_rounds=_LOAD_ROUNDS)


@dataclass(frozen=True)
class Wanted:
    """The input.

    Attributes:
        batch: size of open first axes, if it was given.
        shapes: of inputs by name.
        arrays: for inputs by name, instead of random values.
    """

    batch: int | None
    shapes: dict[str, tuple[int, ...]]
    arrays: dict[str, NDArray[Any]]

    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those asked for, and those of the arrays.

        Raises:
            InputError: an input has both, and they differ.
        """
        from twofour.core.errors import InputError

        given = {name: array.shape for name, array in self.arrays.items()}
        for name, shape in given.items():
            if self.shapes.get(name, shape) != shape:
                reason = f"--shapes says {list(self.shapes[name])}, --input has {list(shape)}"
                raise InputError(f"two shapes for input {name!r}", [reason], "leave out --shapes")
        return self.shapes | given


@dataclass(frozen=True)
class Stored:
    """Results on disk.

    Attributes:
        save: where this one goes, if anywhere.
        baseline: an earlier one, if there is one to compare with.
        allowed: slowdown that is no regression, as a share.
    """

    save: Path | None
    baseline: Path | None
    allowed: float

    def read(self) -> Baseline | None:
        """The baseline; and whether the result can be written, before it is measured."""
        from twofour.bench.baseline import read_baseline

        if self.save is not None:
            require_writable(self.save)
        return None if self.baseline is None else read_baseline(self.baseline)


@dataclass(frozen=True)
class _Subject:
    """What is measured: our engine on this input, and everybody in `match`."""

    engine: Engine
    feeds: dict[str, NDArray[Any]]
    match: Match
    schedule: Schedule


def bench_engine(
    source: Path, request: Request, wanted: Wanted, stored: Stored, out: Output
) -> None:
    """Measures, shows and stores; exit code 1 for a regression.

    Args:
        source: an engine, or an ONNX file to build.
        request: who is measured, and how.
        wanted: the input.
        stored: where to, and compared with what.
        out: for people and programs.
    """
    from twofour.bench.baseline import SCHEMA, conditions_of, require_comparable
    from twofour.bench.noise import Watch

    earlier = stored.read()
    subject = _subject(source, request, wanted, out)
    if earlier is not None:
        known = circumstances(subject.engine, subject.feeds, subject.match)
        require_comparable(earlier, conditions_of(known))
    watch = Watch.begin()
    outcome = _measured(subject, subject.match, "measuring", out)
    document = document_of(subject.engine, subject.feeds, subject.match, outcome)
    with out.stage("peak memory"):
        document["memory"] = memory_data(subject.engine, subject.feeds, subject.match.threads)
    out.show(*results(outcome, document, out.width), *consumption(document))
    for line in watch.end():
        out.note(f"note: {line}")
    judged = None
    if earlier is not None:
        judged, doubts = _judged(subject, earlier, document, stored.allowed, out)
        document["baseline"] = verdict_data(judged, stored.allowed, str(stored.baseline), doubts)
        out.show(*verdict_lines(document["baseline"]))
    if stored.save is not None:
        write_document(SCHEMA, document, stored.save)
        out.note(f"stored; compare later with --baseline {stored.save}")
    out.data(SCHEMA, document)
    if judged is not None and judged.verdict == "regression":
        out.fail(f"slower than {stored.baseline} by more than {stored.allowed:.1%}")


def _subject(source: Path, request: Request, wanted: Wanted, out: Output) -> _Subject:
    """The engine, built if need be; the input; and whom to measure against."""
    from twofour.bench.versus import Match
    from twofour.engine import Engine

    schedule = request.schedule()
    if is_engine(source):
        engine = Engine.load(source)
        inputs = _inputs(engine, wanted)
        model = request.model or _beside(engine, source)
    else:
        engine = _built(source, wanted, request.threads, out)
        inputs = list(engine.plan.inputs)
        model = request.model or source
    _note_other_source(engine, model, out)
    feeds = _feeds(inputs, wanted.arrays)
    threads = request.threads or engine.plan.threads
    energy_s = min(_MOST_ENERGY_S, request.duration_s)
    match = Match(request.peers, model, request.program, threads, request.callers, energy_s)
    return _Subject(engine, feeds, match, schedule)


def _feeds(inputs: list[TensorInfo], arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays given, and random ones for the other inputs.

    Raises:
        InputError: one has another type than the input.
    """
    from twofour.bench.declared import random_feeds
    from twofour.core.errors import InputError

    for info in inputs:
        if info.name in arrays and arrays[info.name].dtype.name != info.dtype:
            raise InputError(
                f"input {info.name!r} does not fit the engine",
                [f"expected {info.dtype}, got {arrays[info.name].dtype.name}"],
                f"convert it with .astype({info.dtype!r}) before numpy.save",
            )
    feeds = random_feeds([info for info in inputs if info.name not in arrays]) | arrays
    return {info.name: feeds[info.name] for info in inputs}


def _measured(subject: _Subject, match: Match, stage: str, out: Output) -> Outcome:
    """One race, in sessions opened for it."""
    from twofour.bench.versus import versus
    from twofour.runtime.session import Session

    with ExitStack() as sessions, out.stage(stage) as report:
        ours = [
            sessions.enter_context(Session(subject.engine, match.threads))
            for _ in range(match.callers)
        ]
        return versus(
            ours,
            subject.feeds,
            match,
            subject.schedule,
            lambda done, all_: report(done, all_, "rounds"),
        )


def _judged(
    subject: _Subject, earlier: Baseline, document: dict[str, Any], allowed: float, out: Output
) -> tuple[Judgement, list[str]]:
    """The verdict, and what makes it less certain.

    What looks like a regression is measured again, in sessions opened anew.
    """
    from twofour.bench.baseline import Baseline, comparable_rounds, doubts
    from twofour.bench.regression import judge

    now = Baseline.from_document(document)

    def runs() -> Iterator[tuple[Rounds, Rounds]]:
        yield comparable_rounds(earlier, now)
        alone = dataclasses.replace(subject.match, peers=(), model=None, energy_s=0.0)
        while True:
            again = _measured(subject, alone, "measuring again, to be sure", out)
            repeated = document_of(subject.engine, subject.feeds, alone, again)
            yield comparable_rounds(earlier, Baseline.from_document(repeated))

    return judge(runs(), allowed), doubts(earlier, now)


def _inputs(engine: Engine, wanted: Wanted) -> list[TensorInfo]:
    """The engine's inputs at the shapes asked for, else at the usual ones of its first profile."""
    from twofour.core.errors import InputError
    from twofour.runtime.shapes import bind

    given, inputs = wanted.all_shapes(), engine.plan.inputs
    if unknown := set(given) - {info.name for info in inputs}:
        names = ", ".join(info.name for info in inputs)
        raise InputError(f"no input {min(unknown)!r}", [f"the engine has {names}"])
    shapes = {info.name: info.usual_shape for info in inputs}
    if wanted.batch is not None:
        shapes = {name: (wanted.batch, *shape[1:]) for name, shape in shapes.items()}
    shapes |= given
    bind(engine.plan, shapes)
    return [dataclasses.replace(info, shape=shapes[info.name], sizes=()) for info in inputs]


def _built(source: Path, wanted: Wanted, threads: int | None, out: Output) -> Engine:
    from twofour.bench.declared import static_inputs
    from twofour.bench.inputs import model_inputs
    from twofour.compiler.build import build

    inputs = static_inputs(model_inputs(source), wanted.all_shapes(), wanted.batch)
    static = {each.name: each.shape for each in inputs}
    with out.stage("building") as report:
        return build(source, progress=report, shapes=static, threads=threads or 1)


def _beside(engine: Engine, source: Path) -> Path | None:
    """The ONNX file in the engine's folder that it was built from, if it is still the same."""
    name = engine.plan.source_name
    model = source.parent / Path(name).name if name else None
    if model is None or not model.is_file() or _sha256(model) != engine.plan.source_sha256:
        return None
    return model


def _note_other_source(engine: Engine, model: Path | None, out: Output) -> None:
    """Says so when the peers run another file than the engine was built from: it may be wanted."""
    if model is None or not model.is_file() or not engine.plan.source_sha256:
        return
    if _sha256(model) != engine.plan.source_sha256:
        built_from = engine.plan.source_name or "another model"
        out.note(f"note: the engine was built from {built_from}, the peers run {model}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

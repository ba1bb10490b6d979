"""Runs stages in their order: what is there already is reused, what is new is written as a whole.

    for each stage:  hash its inputs -> key -> folder with that key, its files as they were?
                     yes: reused        no: run it into a new folder, then rename that

After each stage `changed` is told, so that the run's result on disk is never older than that.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from twofour.core.errors import Error, UnsupportedError
from twofour.core.progress import Report, unseen
from twofour.core.progress import Stage as Show
from twofour.core.records import to_plain
from twofour.pipeline.folder import RunFolder
from twofour.pipeline.identity import Identity, identity, sha256_of
from twofour.pipeline.stage import (
    KINDS,
    From,
    Given,
    Kept,
    Made,
    Result,
    Source,
    Stage,
    Task,
    folder_of,
)

DONE, REUSED, FAILED, NOT_REACHED, LEFT_OUT = (
    "done",
    "reused",
    "failed",
    "not reached",
    "left out",
)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Ran:
    """What became of a stage.

    Attributes:
        stage: of the plan.
        status: DONE, REUSED, FAILED, NOT_REACHED or LEFT_OUT.
        text: what came of it; why it failed, or was left out.
        result: what it left; None unless done or reused.
    """

    stage: Stage
    status: str
    text: str
    result: Result | None = None


@dataclass(frozen=True)
class Forecast:
    """What would become of a stage.

    Attributes:
        stage: of the plan.
        reused: whether its result is there.
        why: it would run; "" if it would not.
        seconds: that it took when it last ran; None if it never has.
        result: that is there; None if there is none.
    """

    stage: Stage
    reused: bool
    why: str
    seconds: float | None
    result: Result | None


@dataclass
class Runner:
    """Runs the stages of one plan in one folder.

    Attributes:
        folder: of the run, held.
        home: folder of the recipe, where modules are looked for.
        again: stages of this kind, and of those behind it, run even if their results are there;
            "" for none.
        show: opens the display of a stage.
        changed: told after each stage what became of all so far.
        ahead: does work of several build stages at once: gets, by the names of all that are to
            run, the places of their inputs; None where each works by itself.
        why_not: a stage that is to run -> why it is left out; "" if it is not.
    """

    folder: RunFolder
    home: Path
    again: str = ""
    show: Show = unseen
    changed: Callable[[Sequence[Ran]], None] = lambda ran: None
    ahead: Callable[[Mapping[str, Mapping[str, str]], Report], None] | None = None
    why_not: Callable[[Stage, Mapping[str, Result]], str] = lambda stage, results: ""
    _known: dict[str, Identity] = field(default_factory=dict)

    def run(self, stages: Sequence[Stage]) -> list[Ran]:
        """Runs all, or reuses what is there.

        Raises:
            Error: a stage failed; what was done before it is kept, and `changed` was told.
        """
        ran: list[Ran] = []
        results: dict[str, Result] = {}
        for index, stage in enumerate(stages):
            left = stages[index + 1 :]
            try:
                if stage.kind == "build" and self.ahead is not None:
                    self._ahead(stages[index:], results)
                now = self._one(stage, results)
            except BaseException as e:
                failed = Ran(stage, FAILED, _words(e))
                rest = [Ran(each, NOT_REACHED, "") for each in left]
                self._tell([*ran, failed, *rest], failing=True)
                raise
            ran.append(now)
            if now.result is not None:
                results[stage.name] = now.result
            self._tell([*ran, *(Ran(each, NOT_REACHED, "") for each in left)])
        return ran

    def forecast(self, stages: Sequence[Stage]) -> list[Forecast]:
        """What `run` would do; nothing is written.

        Raises:
            InputError: a file of the user's cannot be read.
        """
        found: list[Forecast] = []
        results: dict[str, Result] = {}
        for stage in stages:
            result, why = self._there(stage, results)
            if not why and result is not None:
                results[stage.name] = result
            last = self.folder.last_seconds(stage.name)
            found.append(Forecast(stage, not why, why, last, result))
        return found

    def _there(self, stage: Stage, results: Mapping[str, Result]) -> tuple[Result | None, str]:
        """The result that may be reused; or why there is none."""
        before = [i.stage for i in stage.inputs.values() if isinstance(i, From)]
        missing = [name for name in before if name not in results]
        if missing:
            return None, f"{missing[0]} runs before it"
        given = self._given(stage, results)
        key = stage.key({name: each.sha256 for name, each in given.items()})
        result = self.folder.find(folder_of(stage.name, key))
        if result is None or result.key != key:
            return None, "nothing is there" if result is None else "another key"
        if self._is_forced(stage):
            return result, f"--from {self.again}"
        if not stage.holds(result.facts):
            return result, "what it left outside the run's folder has gone"
        return result, ""

    def _is_forced(self, stage: Stage) -> bool:
        return bool(self.again) and KINDS.index(stage.kind) >= KINDS.index(self.again)

    def _one(self, stage: Stage, results: Mapping[str, Result]) -> Ran:
        if reason := self.why_not(stage, results):
            return Ran(stage, LEFT_OUT, reason)
        given = self._given(stage, results)
        key = stage.key({name: each.sha256 for name, each in given.items()})
        result, why = self._there(stage, results)
        if result is not None and not why:
            return Ran(stage, REUSED, result.text, result)
        with _disk(self.folder.path, stage.name):
            result = self._work(stage, given, key, results)
        return Ran(stage, DONE, result.text, result)

    def _ahead(self, stages: Sequence[Stage], results: Mapping[str, Result]) -> None:
        """Lets all build stages that are to run be worked at together, once."""
        ahead, self.ahead = self.ahead, None
        places = {}
        for stage in (each for each in stages if each.kind == "build"):
            if self._there(stage, results)[1]:
                given = self._given(stage, results)
                places[stage.name] = {n: self._place(i, given[n]) for n, i in stage.inputs.items()}
        if places and ahead is not None:
            with self.show(f"build of {len(places)} engines") as report:
                ahead(places, report)

    def _work(
        self,
        stage: Stage,
        given: Mapping[str, Given],
        key: str,
        results: Mapping[str, Result],
    ) -> Result:
        name = folder_of(stage.name, key)
        part = self.folder.begin()
        try:
            scratch = self.folder.scratch(name)
            scratch.mkdir(parents=True, exist_ok=True)
            inputs = stage.inputs.items()
            facts = {n: results[i.stage].facts for n, i in inputs if isinstance(i, From)}
            places = {n: self._place(i, given[n]) for n, i in inputs}
            began = time.monotonic()
            with self.show(stage.name) as report:
                hashes, cache = {n: each.sha256 for n, each in given.items()}, self.folder.cache
                task = Task(places, hashes, facts, part, scratch, cache, report)
                made = stage.work(task)
            result = _result(stage, key, given, made, part, time.monotonic() - began)
            self.folder.commit(part, name, result)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return result

    def _place(self, source: Source | From, given: Given) -> str:
        return source.place if isinstance(source, Source) else str(self.folder.path / given.place)

    def _given(self, stage: Stage, results: Mapping[str, Result]) -> dict[str, Given]:
        """The inputs with their hashes. Raises InputError."""
        found = {}
        for name, source in stage.inputs.items():
            if isinstance(source, Source):
                if source.place not in self._known:
                    self._known[source.place] = identity(source.place, self.home)
                known = self._known[source.place]
                found[name] = Given(source.place, source.kind, known.sha256, known.size_bytes)
                continue
            result = results[source.stage]
            kept = result.outputs[source.output]
            place = f"stages/{result.folder}/{kept.file}"
            found[name] = Given(place, "", kept.sha256, kept.size_bytes)
        return found

    def _tell(self, ran: Sequence[Ran], failing: bool = False) -> None:
        """Tells `changed`; while another error is on its way, one of its own is of no use."""
        try:
            with _disk(self.folder.path, "run.json"):
                self.changed(ran)
        except (Error, OSError):
            if not failing:
                raise


def _result(
    stage: Stage, key: str, given: Mapping[str, Given], made: Made, part: Path, seconds: float
) -> Result:
    outputs = {
        name: Kept(
            each.file,
            each.kind,
            sha256_of(part / each.file),
            (part / each.file).stat().st_size,
            tuple(stage.inputs) if each.made_from is None else each.made_from,
        )
        for name, each in made.outputs.items()
    }
    settings, facts = to_plain(dict(stage.settings)), to_plain(dict(made.facts))
    return Result(
        stage.name, key, settings, dict(given), outputs, seconds, made.text, facts, made.notes
    )


@contextmanager
def _disk(folder: Path, what: str) -> Iterator[None]:
    """Says what a full disk means for a run. Raises UnsupportedError."""
    try:
        yield
    except Exception as e:
        if not _is_full(e):
            raise
        raise _full(folder, what, e) from e


def _is_full(error: BaseException | None) -> bool:
    """Whether it, or what caused it, says that no space is left; some libraries say it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__
    return False


def _full(folder: Path, what: str, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"no space left for {what}",
        [str(error).splitlines()[0], f"all stages before it are kept in {folder}"],
        "free some space, and run the same command again: it goes on here",
    )


def _words(error: BaseException) -> str:
    """Why a stage failed, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Error):
        return error.what
    return f"{type(error).__name__}: {error}".splitlines()[0]

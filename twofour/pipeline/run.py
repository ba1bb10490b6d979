"""A whole run: the stages of a recipe in a folder, and the result of it on disk after each.

file = read_recipe(Path("recipe.yaml"))
finished = run(file, RunFolder(Path("runs/r20")), Options("twofour pipeline recipe.yaml"))
finished.outcome.verdict, finished.is_open
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from twofour.core.errors import Error
from twofour.core.outcome import Outcome
from twofour.core.progress import Stage as Show
from twofour.core.progress import unseen
from twofour.core.writing import write_whole
from twofour.pipeline import plan
from twofour.pipeline.folder import GATE_MD, GATE_XML, RECIPE, REPORT, RUN, RunFolder
from twofour.pipeline.identity import Identity, identity
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.result import outcome_of, plain_outcome
from twofour.pipeline.runner import DONE, FAILED, Forecast, Ran, Runner
from twofour.pipeline.stage import Made, Stage
from twofour.pipeline.stages import decide
from twofour.pipeline.stages.build import build_away
from twofour.pipeline.stages.means import Means
from twofour.pipeline.surroundings import surroundings_of

WritePage = Callable[[Mapping[str, Any], Path], None]


@dataclass(frozen=True)
class Options:
    """How a recipe is run.

    Attributes:
        command: that started the run.
        again: the kind of stage to begin at, whatever is there; "" for none.
        show: opens the display of a stage.
        spread: workers of a cluster; None for this machine.
        write_page: writes the report; None for none.
    """

    command: str
    again: str = ""
    show: Show = unseen
    spread: Any = None
    write_page: WritePage | None = None


@dataclass(frozen=True)
class Finished:
    """What came of it.

    Attributes:
        outcome: as run.json has it.
        ran: all stages, in order.
        is_open: whether the gate lets the result go on; True without a gate.
    """

    outcome: Outcome
    ran: Sequence[Ran]
    is_open: bool


def run(file: RecipeFile, folder: RunFolder, options: Options) -> Finished:
    """Runs all stages, or reuses what is there.

    Args:
        file: the recipe.
        folder: of the run; made if it is not there.
        options: how.

    Raises:
        Error: a stage failed, or the folder cannot be used; run.json says how far it came.
    """
    with _importing(file.home), folder.held(options.command):
        write_whole(folder.path / RECIPE, file.content)
        record = _Record(file, folder, options)
        means = Means(options.spread, record.document)
        stages = plan.stages_of(file, means)
        plan.require_kind(options.again, stages)
        ahead = None if options.spread is None else partial(build_away, file, means)
        runner = Runner(
            folder, file.home, options.again, options.show, record.changed, ahead, plan.why_not
        )
        ran = runner.run(stages)
        _copy_gate(folder, ran)
        record.report()
        ran = list(record.ran)
    gate = {each.stage.name: each.result for each in ran}.get(decide.NAME)
    return Finished(record.outcome, ran, gate is None or bool(gate.facts["open"]))


def forecast(file: RecipeFile, folder: RunFolder, again: str = "") -> list[Forecast]:
    """What a run would do; nothing is written.

    Raises:
        InputError: something that the recipe names cannot be read, or it has no such stage.
    """
    folder.require_ours()
    with _importing(file.home):
        stages = plan.stages_of(file, Means())
        plan.require_kind(again, stages)
        return Runner(folder, file.home, again).forecast(stages)


@dataclass
class _Record:
    """What stands in run.json."""

    file: RecipeFile
    folder: RunFolder
    options: Options
    ran: Sequence[Ran] = ()
    recipe: Identity = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = identity(str(self.folder.path / RECIPE), self.file.home)
        self.surroundings = surroundings_of(self.file, self.options.command)

    @property
    def outcome(self) -> Outcome:
        """Of what has been done."""
        return outcome_of(self.file, self.ran, self.surroundings, self.recipe)

    def document(self) -> dict[str, Any]:
        """Plain form of it."""
        return plain_outcome(self.outcome)

    def changed(self, ran: Sequence[Ran]) -> None:
        """Writes it anew. Raises OSError."""
        self.ran = ran
        text = json.dumps(self.document(), indent=1, allow_nan=False)
        write_whole(self.folder.path / RUN, text.encode())

    def report(self) -> None:
        """Writes the page for people: the last stage, which is never reused.

        Raises:
            Error, OSError: it cannot be written; run.json says so.
        """
        write_page, before = self.options.write_page, self.ran
        if write_page is None:
            return
        stage = Stage("report", "report", {}, {}, lambda task: Made({}, ""))
        self.changed([*before, Ran(stage, DONE, REPORT)])
        try:
            with self.options.show("report"):
                write_page(self.document(), self.folder.path / REPORT)
        except (Error, OSError) as e:
            self.changed([*before, Ran(stage, FAILED, str(e).splitlines()[0])])
            raise


def _copy_gate(folder: RunFolder, ran: Sequence[Ran]) -> None:
    """What the gate says, where programs look for it; none of an earlier run is left."""
    for name, place in (("xml", GATE_XML), ("markdown", GATE_MD)):
        found = [each.result for each in ran if each.stage.name == decide.NAME and each.result]
        if found:
            source = folder.stages / found[0].folder / found[0].outputs[name].file
            write_whole(folder.path / place, source.read_bytes())
        else:
            (folder.path / place).unlink(missing_ok=True)


@contextmanager
def _importing(home: Path) -> Iterator[None]:
    """Modules beside the recipe are found first."""
    sys.path.insert(0, str(home))
    try:
        yield
    finally:
        if str(home) in sys.path:
            sys.path.remove(str(home))

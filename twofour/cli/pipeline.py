"""twofour pipeline: a recipe carried from a model to a judged, published engine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from twofour.cli.options import require_packages
from twofour.cli.output import Json, Output, Quiet, printable
from twofour.cli.spread import OnRay, RayAddress, spread_of

if TYPE_CHECKING:
    from twofour.core.outcome import Cell, Outcome
    from twofour.pipeline.recipe_file import RecipeFile
    from twofour.pipeline.run import Finished
    from twofour.pipeline.runner import Forecast

_RUNS = Path("runs")


def pipeline(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="See docs/pipeline.md.")],
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the run; by default runs/NAME.")
    ] = None,
    again: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STAGE", help="Run this stage and all after it, whatever is there."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")
    ] = False,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry a model to production, through a gate.

    What is there already is reused; a run that was ended goes on where it stood. Exit code 1 when
    the gate does not let the result go on.

    Example: twofour pipeline recipes/onnx.yaml --run runs/r20
    Example: twofour pipeline recipe.yaml --dry-run
    Example: twofour pipeline recipe.yaml --from quantize
    """
    require_packages("a pipeline", ("pydantic", "yaml", "jinja2"), "pipeline")
    from twofour.pipeline.folder import RunFolder
    from twofour.pipeline.recipe_file import read_recipe

    out = Output(as_json, quiet)
    file = read_recipe(recipe)
    folder = RunFolder(run or _RUNS / file.recipe.name)
    if dry_run:
        _forecast(file, folder.path, again or "", out)
        return
    from twofour.pipeline.run import Options
    from twofour.pipeline.run import run as run_stages
    from twofour.report.run import write_run

    with spread_of(ray, ray_address, None, out) as workers:
        spread = workers if ray else None
        options = Options(_command(), again or "", out.stage, spread, write_run)
        finished = run_stages(file, folder, options)
    _show(finished, folder.path, out)


def _command() -> str:
    """What the user typed; the program's name without its folder."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _show(finished: Finished, folder: Path, out: Output) -> None:
    from twofour.core.records import to_plain

    outcome = finished.outcome
    out.show(_stages(outcome), _cells(outcome))
    out.show(*(f"note: {note}" for note in outcome.notes))
    out.show(*(f"{check.name} {check.verdict}: {check.text}" for check in outcome.checks))
    out.show(f"written: {folder / 'run.json'}, {folder / 'report.html'}")
    plain = to_plain(outcome)
    keys = ("name", "verdict", "checks", "task", "cells", "stages", "notes")
    out.data("pipeline/1", {"run": str(folder), **{key: plain[key] for key in keys}})
    if not finished.is_open:
        out.fail(f"the gate does not let {outcome.name} go on: {outcome.verdict}")


def _stages(outcome: Outcome) -> Table:
    table = Table(title=f"{outcome.name}: stages", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage", overflow="fold", max_width=34)
    table.add_column("", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("what came of it", overflow="fold")
    for each in outcome.stages:
        seconds = f"{each.seconds:.1f}" if each.seconds else ""
        table.add_row(printable(each.name), each.status, seconds, printable(each.text))
    return table


def _cells(outcome: Outcome) -> Table:
    task = outcome.task
    metric = "" if task is None else f"{task.metric.rpartition(':')[2]} {task.unit}".strip()
    table = Table(title="networks", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("weights", "precision"):
        table.add_column(head, no_wrap=True)
    for head in (metric, "us", "engine", "weights", "memory"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for cell in outcome.cells:
        table.add_row(cell.weights, cell.precision, *_figures(cell), printable(cell.note))
    return table


def _figures(cell: Cell) -> list[str]:
    from twofour.pipeline.quantities import size_text

    def size(size_bytes: int | None) -> str:
        return "" if size_bytes is None else size_text(size_bytes)

    figure = "" if cell.figure is None else f"{cell.figure.value:.4g}"
    latency = "" if cell.latency_us is None else f"{cell.latency_us:.4g}"
    sizes = (cell.engine_bytes, cell.weight_bytes, cell.memory_bytes)
    return [figure, latency, *map(size, sizes)]


def _forecast(file: RecipeFile, folder: Path, again: str, out: Output) -> None:
    from twofour.pipeline.folder import RunFolder
    from twofour.pipeline.prediction import predict
    from twofour.pipeline.run import forecast

    with out.stage("looking"):
        found = forecast(file, RunFolder(folder), again)
    predicted = predict(file, folder, found, out.stage)
    out.show(_plan(found), *predicted.lines())
    document: dict[str, Any] = {
        "run": str(folder),
        "stages": [
            {
                "name": each.stage.name,
                "kind": each.stage.kind,
                "reused": each.reused,
                "why": each.why,
                "seconds": each.seconds,
            }
            for each in found
        ],
        **predicted.document(),
    }
    out.data("pipeline.plan/1", document)


def _plan(found: Sequence[Forecast]) -> Table:
    from twofour.pipeline.quantities import time_text

    table = Table(title="what a run would do", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage", overflow="fold", max_width=40)
    table.add_column("", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for each in found:
        seconds = "" if each.reused else time_text(each.seconds)
        does = "reuse" if each.reused else "run"
        table.add_row(printable(each.stage.name), does, seconds, printable(each.why))
    return table

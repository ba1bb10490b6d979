"""twofour report: the page of a run, written again from its run.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofour.cli.options import require_packages, require_writable
from twofour.cli.output import Json, Output, Quiet

_PAGE, _RUN = "report.html", "run.json"


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its run.json.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML page; by default report.html of the run."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the HTML page of a pipeline run.

    One file that needs no network.

    Example: twofour report runs/r20 -o r20.html
    """
    require_packages("an HTML page", ["jinja2"], "report")
    from twofour.registry.lineage import read_run
    from twofour.report.run import write_run

    out = Output(as_json, quiet)
    path = run / _RUN if run.is_dir() else run
    page = output or path.parent / _PAGE
    require_writable(page)
    document = read_run(path)
    wanted = str(document.get("name", ""))
    with out.stage("writing the page"):
        write_run(document, page)
    out.show(f"written: {page}")
    out.data("report/1", {"page": str(page), "name": wanted})

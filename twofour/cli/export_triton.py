"""twofour export-triton: a model folder for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofour.cli.options import require_packages
from twofour.cli.output import Json, Output, Quiet


def export_triton(
    model: Annotated[
        Path,
        typer.Argument(help="An .engine file, or a model's folder: config.yaml and VERSION/."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Triton's model repository; made if need be.")
    ],
    name: Annotated[str | None, typer.Option(help="Of the model; else the file's.")] = None,
    version: Annotated[
        int | None,
        typer.Option(min=1, help="Of an engine file (else 1); of a folder, the only one to take."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.yaml; else the folder's, or all defaults.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a model of this name.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model repository that Triton serves.

    Its Python backend runs them, and has to find twofour[serve].

    Example: twofour export-triton resnet20.engine -o for-triton --config config.yaml
    """
    require_packages("export-triton", ("pydantic", "yaml"), "serve")

    from twofour.serve.triton.export import export, read_source

    out = Output(as_json, quiet)
    with out.stage("writing"):
        done = export(read_source(model, name, version, config), output, force)
    versions = ", ".join(map(str, done.versions))
    out.show(
        f"{done.path}: version {versions}",
        *(f"- {note}" for note in done.notes),
        f"serve it: tritonserver --model-repository {output}",
    )
    document = {"path": str(done.path), "versions": done.versions, "notes": done.notes}
    out.data("export-triton/1", document)

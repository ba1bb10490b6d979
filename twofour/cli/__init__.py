"""The command line: one file a command, each importing what it needs when it runs."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from typing import Annotated, NoReturn, cast

import typer

from twofour.cli import (
    bench,
    build,
    compare,
    demo,
    doctor,
    explain,
    export_triton,
    forecast,
    inspect,
    pipeline,
    prune,
    quantize,
    registry,
    report,
    run,
    search,
    sensitivity,
    serve,
)
from twofour.cli.late import import_late
from twofour.cli.output import command, print_error_document
from twofour.core.version import __version__

app = typer.Typer(
    name="twofour",
    help="Prune 2:4, quantize to INT8, compile, and run networks fast on the CPU at hand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for function in (
    demo.demo,
    doctor.doctor,
    inspect.inspect,
    forecast.forecast,
    sensitivity.sensitivity,
    search.search,
    prune.prune,
    quantize.quantize,
    build.build,
    explain.explain,
    run.run,
    bench.bench,
    compare.compare,
    pipeline.pipeline,
    report.report,
    serve.serve,
    export_triton.export_triton,
):
    app.command()(command(function))
app.add_typer(registry.app, name="registry")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"twofour {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version)
    ] = False,
) -> None:
    """Prune 2:4, quantize to INT8, compile, and run networks fast on the CPU at hand."""


# Of all errors of usage; the name under which typer has it differs between its versions.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])


def main() -> NoReturn:
    """The entry point of the console script."""
    import_late()
    for package in ("onnx_ir", "onnxscript"):  # they log what becomes an error here, with its trace
        logging.getLogger(package).addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± shows ?
    try:
        code = app(standalone_mode=False)
    except _UsageError as e:
        e.show()
        if "--json" in sys.argv:
            print_error_document("UsageError", e.format_message(), [], "see --help")
        code = e.exit_code
    except typer.Abort:
        code = 1
    raise SystemExit(code)

"""twofour demo: the whole flow on real scans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofour.cli.options import require_packages
from twofour.cli.output import Json, Output, Quiet


def demo(
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the models, engines and summary.json.")
    ] = Path("twofour-demo"),
    seed: Annotated[int, typer.Option(help="Of training.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take a small network through the whole flow.

    It is trained, pruned, fine-tuned, quantized, compiled, timed and judged.

    Example: twofour demo --output-dir twofour-demo
    """
    require_packages("the demo", ("torch", "sklearn"), "demo")
    from twofour.bench.table import rich_table
    from twofour.demo.digits import run

    out = Output(as_json, quiet)
    outcome = run(output_dir, seed, out.stage)
    document = outcome.document()
    files = ", ".join(sorted(path.name for path in output_dir.iterdir()))
    out.show(
        rich_table(document["rows"], outcome.baseline, outcome.title),
        f"the gate is {'open' if outcome.verdict.passed else 'shut'}",
        *(f"  {reason}" for reason in outcome.verdict.reasons),
        f"left in {output_dir}: {files}",
    )
    out.data("demo/1", document)
    if not outcome.verdict.passed:
        out.fail("the gate is shut", *outcome.verdict.reasons)

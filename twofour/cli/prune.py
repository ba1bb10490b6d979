"""twofour prune: the weights of an ONNX file, in one shot."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from twofour.cli.options import require_writable
from twofour.cli.output import Json, Output, Quiet, by_reason, printable

if TYPE_CHECKING:
    from twofour.onnx_tools.prune import Pruned

_WIDE = 80
_NAMELESS = re.compile(r"(node(_\d+)?)?")  # as `load_model` fills in


def prune(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    pattern: Annotated[str, typer.Option(help="2:4, 4:8 or 2:4/pair.")] = "2:4",
    skip: Annotated[
        list[str] | None, typer.Option(help="Shell pattern of names to leave dense; repeatable.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set the smallest weights to zero without training, to try speed.

    Accuracy falls; to keep it, prune and fine-tune in PyTorch (twofour.train).

    Example: twofour prune resnet20.onnx -o sparse.onnx --skip conv1 --skip linear
    """
    from twofour.compiler.importer import standardized
    from twofour.core.errors import InputError
    from twofour.onnx_tools.load import load_model, save_model
    from twofour.onnx_tools.prune import prune as prune_model

    out = Output(as_json, quiet)
    require_writable(output)
    with out.stage("pruning"):
        source = standardized(load_model(model))
        pruned, report = prune_model(source, pattern, skip or ())
    if not any(not entry.reason for entry in report):
        counts = Counter(entry.reason for entry in report)
        reasons = [f"{count} of {len(report)}: {reason}" for reason, count in counts.items()]
        raise InputError(
            f"no weight of {model} was pruned",
            reasons or ["expected a Conv, Gemm or MatMul with constant weights"],
            "choose another --pattern or fewer --skip",
        )
    save_model(pruned, output)
    left = [(entry.reason, _name(entry)) for entry in report if entry.reason]
    out.show(
        _table(report, out.width),
        *by_reason("left as it was", left),
        _summary(report, pattern, output),
    )
    layers = [{**vars(entry), "pruned": not entry.reason} for entry in report]
    out.data("prune/1", {"model": str(output), "pattern": pattern, "layers": layers})


def _table(report: Sequence[Pruned], width: int) -> Table:
    """The weights that were pruned; where the terminal is narrow, without their names."""
    caption = "energy: the sum of the squares of a weight's numbers"
    table = Table(title="pruned", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("layer", overflow="fold")
    if width >= _WIDE:
        table.add_column("weight", overflow="fold")
    table.add_column("energy kept", justify="right", no_wrap=True)
    for entry in report:
        if not entry.reason:
            names = (entry.node, entry.weight) if width >= _WIDE else (entry.node,)
            table.add_row(*map(printable, names), f"{100 * entry.energy_kept:.1f} %")
    return table


def _name(entry: Pruned) -> str:
    """What people know the layer by: its own name, or its weight's where it has none."""
    return entry.weight if _NAMELESS.fullmatch(entry.node) else entry.node


def _summary(report: Sequence[Pruned], pattern: str, output: Path) -> str:
    done = [entry for entry in report if not entry.reason]
    kept = min(entry.energy_kept for entry in done)
    return (
        f"{output}: {len(done)} of {len(report)} weights pruned to {pattern}, each with "
        f"{100 * kept:.0f} % of its energy or more; accuracy has to be regained by fine-tuning"
    )

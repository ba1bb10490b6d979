"""twofour quantize --report: how well tensors are represented, in words, document and page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from twofour.cli.options import require_packages, require_writable
from twofour.cli.output import Output, printable, short

if TYPE_CHECKING:
    from twofour.compiler.prunable import Network
    from twofour.evaluate.quality import Quality
    from twofour.onnx_tools.quality import TensorQuality
    from twofour.onnx_tools.quantize import Quantized

_NAME, _WORST = 40, 5

ReportPage = Annotated[
    Path | None,
    typer.Option(
        "--report", help="The HTML page to write: each tensor's quality, layers, moved values."
    ),
]


def require_page(page: Path | None) -> None:
    """Finds before the work that a page could not be written."""
    if page is not None:
        require_packages("an HTML page", ["jinja2"], "report")
        require_writable(page)


def measured(
    result: Quantized, model: Network, data: str | None, page: Path | None, out: Output
) -> Quality:
    """The quality of all tensors; for a page that of layers, and what kernels move, too."""
    from twofour.evaluate.quality import Quality, quality
    from twofour.onnx_tools.quality import tensor_quality

    if page is None:
        return Quality(tensor_quality(model, result.floats, result.histograms))
    return quality(result, model, data, out.stage)


def quality_parts(found: Quality, page: Path | None) -> list[Table | str]:
    """The worst tensors, the outputs, and what was moved."""
    worst = [each for each in found.tensors if each.sqnr_db is not None][:_WORST]
    lines: list[Table | str] = [_table(worst, len(found.tensors))] if worst else []
    lines += [
        f"output {each.layer}: SQNR {_db(each.sqnr_db)}, cosine {each.cosine:.5f} against the "
        f"float model, {found.layer_samples} samples"
        for each in found.layers
        if each.op == "output"
    ]
    if values := sum(each.values for each in found.moved):
        own, more = (sum(getattr(m, k) for m in found.moved) for k in ("own", "own_by_more"))
        lines.append(f"integer kernels move {own} of {values:,} values, {more} by more than a step")
    lines += [f"note: {text}" for text in found.notes]
    return [*lines, *([] if page is None else [f"written: {page}"])]


def quality_document(found: Quality, page: Path | None) -> dict[str, Any]:
    """Plain data; without a page no histograms, which are long."""
    plain = asdict(found)
    if page is None:
        for tensor in plain["tensors"]:
            tensor["bins"] = None
    return plain


def write_page(document: dict[str, Any], page: Path | None) -> None:
    """Writes the page, if there is to be one."""
    from twofour.report.quantize import write_quantize

    if page is not None:
        write_quantize(document, page)


def _table(worst: Sequence[TensorQuality], count: int) -> Table:
    table = Table(
        title=f"lowest SQNR of {count} tensors",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("tensor", overflow="fold")
    table.add_column("of")
    for head in ("SQNR", "clipped", "seen", "kept"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in worst:
        clipped = "" if each.clipped is None else f"{100 * each.clipped:.3g} %"
        seen = "" if each.seen is None else f"{each.seen[0]:.3g} to {each.seen[1]:.3g}"
        table.add_row(
            printable(short(each.name, _NAME)),
            each.kind,
            _db(each.sqnr_db),
            clipped,
            seen,
            f"{each.kept[0]:.3g} to {each.kept[1]:.3g}",
        )
    return table


def _db(value: float | None) -> str:
    return "exact" if value is None or math.isinf(value) else f"{value:.1f} dB"

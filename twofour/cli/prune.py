"""twofour prune: the weights of an ONNX file, in one shot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twofour.cli.options import require_writable
from twofour.cli.output import Json, Output, Quiet

if TYPE_CHECKING:
    from twofour.onnx_tools.prune import Pruned


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
    """Set the smallest weights of an ONNX file to zero, without training: for measuring speed.

    Accuracy falls; to keep it, prune and fine-tune in PyTorch (twofour.train).

    Example: twofour prune resnet20.onnx -o sparse.onnx --skip conv1 --skip linear
    """
    from twofour.core.errors import InputError
    from twofour.onnx_tools.load import load_model, save_model
    from twofour.onnx_tools.prune import prune as prune_model

    out = Output(as_json, quiet)
    require_writable(output)
    with out.stage("pruning"):
        pruned, report = prune_model(load_model(model), pattern, skip or ())
    if not any(not entry.reason for entry in report):
        reasons = [f"{entry.node}: {entry.reason}" for entry in report]
        raise InputError(
            f"no weight of {model} was pruned",
            reasons or ["expected a Conv, Gemm or MatMul with constant weights"],
            "choose another --pattern or fewer --skip",
        )
    save_model(pruned, output)
    out.show("\n".join(_line(entry) for entry in report), f"{output}")
    layers = [{**vars(entry), "pruned": not entry.reason} for entry in report]
    out.data("prune/1", {"model": str(output), "pattern": pattern, "layers": layers})


def _line(entry: Pruned) -> str:
    """One layer in words."""
    if entry.reason:
        return f"left    {entry.node}: {entry.reason}"
    return f"pruned  {entry.node}: {100 * entry.energy_kept:.1f} % of the energy kept"

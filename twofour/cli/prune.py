"""twofour prune: the weights of an ONNX file, in one shot."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from twofour.cli.options import Threads, parse_size, require_writable
from twofour.cli.output import Json, Output, Quiet, by_reason, printable

if TYPE_CHECKING:
    from twofour.onnx_tools.correct import Corrected
    from twofour.onnx_tools.one_shot import Method as DataMethod
    from twofour.onnx_tools.prune import Pruned

_WIDE = 80
_NAMELESS = re.compile(r"(node(_\d+)?)?")  # as `load_model` fills in


class Method(StrEnum):
    """How weights are chosen, "magnitude" and those of `onnx_tools.one_shot.Method`."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"


def prune(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    pattern: Annotated[str, typer.Option(help="2:4, 4:8, 2:4/pair or 2:4/2d.")] = "2:4",
    method: Annotated[
        Method, typer.Option(help="sparsegpt keeps most accuracy; it and wanda need --data.")
    ] = Method.magnitude,
    data: Annotated[
        str | None, typer.Option(help="Samples: .npz, folder of .npy, module:function.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Use so many of them at most.")] = 512,
    include: Annotated[
        list[str] | None, typer.Option(help="Shell pattern of names to prune alone; repeatable.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Shell pattern of names to leave dense; repeatable.")
    ] = None,
    correct: Annotated[
        bool | None,
        typer.Option(
            "--correct/--no-correct",
            help="With --data: give layers their mean and deviation again. If not said: "
            "convolutions, unless sparsegpt pruned them.",
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="For what is kept of the inputs of layers, 512M or 2G.")
    ] = "1G",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune an ONNX file in one shot, without training.

    The more accuracy has to be kept, the more it pays to fine-tune afterwards (twofour.train).

    Example: twofour prune resnet20.onnx -o sparse.onnx --method sparsegpt --data images.npz
    """
    from twofour.compiler.importer import standardized
    from twofour.core.data import as_data
    from twofour.onnx_tools.capture import Samples
    from twofour.onnx_tools.correct import correct as correct_model
    from twofour.onnx_tools.load import load_model, save_model
    from twofour.onnx_tools.one_shot import Calibration
    from twofour.onnx_tools.prune import prune as prune_model

    out = Output(as_json, quiet)
    require_writable(output)
    _require_data(method, data, correct)
    memory_bytes = parse_size(memory) or 0
    source = standardized(load_model(model))
    with out.stage("pruning") as report:
        calibration = None
        if data is not None and method is not Method.magnitude:
            by: DataMethod = "wanda" if method is Method.wanda else "sparsegpt"
            calibration = Calibration(
                data, by, samples, memory_bytes, threads=threads or 0, progress=report
            )
        pruned, entries = prune_model(
            source, pattern, skip or (), include=include or ("*",), calibration=calibration
        )
    _require_pruned(model, entries)
    corrected: Sequence[Corrected] = ()
    operators = _to_correct(method, correct)
    if operators and data is not None:
        given = as_data(data, [str(value.name) for value in source.graph.inputs])
        used = Samples(given, samples, threads or 0)
        with out.stage("correcting") as report:
            pruned, corrected = correct_model(
                source, pruned, used, operators=operators, progress=report
            )
    save_model(pruned, output)
    left = [(entry.reason, _name(entry)) for entry in entries if entry.reason]
    out.show(
        _table(entries, out.width),
        *by_reason("left as it was", left),
        *_corrections(corrected),
        _summary(entries, pattern, output),
    )
    layers = [{**vars(entry), "pruned": not entry.reason} for entry in entries]
    document = {"model": str(output), "pattern": pattern, "method": method.value}
    done = [vars(entry) for entry in corrected]
    out.data("prune/1", {**document, "layers": layers, "corrected": done})


def _to_correct(method: Method, correct: bool | None) -> tuple[str, ...]:
    """Operators of layers to correct. SparseGPT leaves little to do, and LayerNorm does it."""
    from twofour.onnx_tools.eligible import LAYERS

    if correct is None:
        return () if method is Method.sparsegpt else ("Conv",)
    return LAYERS if correct else ()


def _corrections(corrected: Sequence[Corrected]) -> list[str]:
    """What was corrected, and what was not."""
    counts = Counter(entry.done for entry in corrected if entry.done)
    done = ", ".join(f"{count} by {how}" for how, count in counts.items())
    left = [(entry.reason, entry.node) for entry in corrected if not entry.done]
    return [*([f"corrected: {done}"] if done else []), *by_reason("not corrected", left)]


def _require_data(method: Method, data: str | None, correct: bool | None) -> None:
    """Refuses data that would not be used, and methods that lack it."""
    from twofour.core.errors import InputError

    if method is Method.magnitude and data is not None and correct is False:
        raise InputError(
            "--data is not used by --method magnitude --no-correct",
            ["expected --method wanda or sparsegpt with it, or --correct"],
            "add --method sparsegpt, or leave --data out",
        )
    if method is not Method.magnitude and data is None:
        raise InputError(
            f"--method {method.value} needs --data",
            ["expected samples of what the model will see, got none"],
            "add --data samples.npz, or choose --method magnitude",
        )


def _require_pruned(model: Path, entries: Sequence[Pruned]) -> None:
    from twofour.core.errors import InputError

    if any(not entry.reason for entry in entries):
        return
    counts = Counter(entry.reason for entry in entries)
    raise InputError(
        f"no weight of {model} was pruned",
        [f"{count} of {len(entries)}: {reason}" for reason, count in counts.items()]
        or ["expected a Conv, Gemm or MatMul with constant weights"],
        "choose another --pattern, fewer --skip or more --include",
    )


def _table(report: Sequence[Pruned], width: int) -> Table:
    """The weights that were pruned; where the terminal is narrow, without their names."""
    done = [entry for entry in report if not entry.reason]
    wide, errors = width >= _WIDE, any(entry.output_error is not None for entry in done)
    caption = "energy: the sum of the squares of a weight's numbers"
    if errors:
        caption += "\noutput error: of what the layer computes from the samples, as a share of it"
    table = Table(title="pruned", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("layer", overflow="fold")
    if wide:
        table.add_column("weight", overflow="fold")
    for title in ("energy kept", *["output error"] * errors):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in done:
        numbers = [entry.energy_kept, entry.output_error or 0.0][: 1 + errors]
        names = [entry.node, entry.weight][: 1 + wide]
        table.add_row(*map(printable, names), *(f"{100 * each:.1f} %" for each in numbers))
    return table


def _name(entry: Pruned) -> str:
    """What people know the layer by: its own name, or its weight's where it has none."""
    return entry.weight if _NAMELESS.fullmatch(entry.node) else entry.node


def _summary(report: Sequence[Pruned], pattern: str, output: Path) -> str:
    done = [entry for entry in report if not entry.reason]
    kept = min(entry.energy_kept for entry in done)
    return (
        f"{output}: {len(done)} of {len(report)} weights pruned to {pattern} by {done[0].method}, "
        f"each with {100 * kept:.0f} % of its energy or more; measure the accuracy (twofour "
        "compare), and regain what is missing by fine-tuning"
    )

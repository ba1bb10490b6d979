"""twofour compare: a model and its engine side by side."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from twofour.cli.output import Json, Output, Quiet, printable, short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twofour.evaluate import Blame, Blamed, Comparison, Difference, Layers, Scores

_NAMED = 3  # layers of a group that are named
_BAR = 10
_NAME = 30
_TYPES = {"float32": "f32", "bfloat16": "bf16"}


def compare(
    model: Annotated[Path, typer.Argument(help="The ONNX file that says what is right.")],
    engine: Annotated[Path, typer.Argument(help="The .engine file that is judged.")],
    data: Annotated[
        str, typer.Option(help="Samples, and labels: .npz, folder of .npy, module:function.")
    ],
    metric: Annotated[
        str | None,
        typer.Option(help="top1, top5, f1, loss, spearman, pearson, mse, mae or module:function."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The output that the metric reads; by default the first.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Exit code 1 if the metric is worse by more than this.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="The first so many only.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Every tensor that the fused engine writes, too.")
    ] = False,
    blame: Annotated[
        bool, typer.Option("--blame", help="Rank layers by what they cost, one switched at a time.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(help="For --blame: the file the engine was built from, if not MODEL."),
    ] = None,
    dense: Annotated[
        Path | None, typer.Option(help="For --blame: a model with dense weights, if not MODEL.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="For --blame: the --data of `build --int8`, if that made the engine."),
    ] = None,
    runs: Annotated[
        int, typer.Option(min=8, help="For --blame: engines built and judged at most.")
    ] = 48,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare an engine with its model on your data.

    Outputs side by side, the metric of the task, and the layers to blame.

    Example: twofour compare resnet20.onnx resnet20.engine --data test.npz --metric top1
    Example: twofour compare resnet20.onnx resnet20.engine --data test.npz --layers
    Example: twofour compare r20.onnx r20.engine --data test.npz --blame --source r20_int8.onnx
    """
    from twofour.core.errors import GateError, InputError
    from twofour.evaluate import BlameOptions, CompareOptions
    from twofour.evaluate import compare as compare_both

    out = Output(as_json, quiet)
    if max_drop is not None and metric is None:
        raise InputError(
            "--max-drop needs a metric", ["expected --metric, got none"], "add --metric top1"
        )
    wanted = BlameOptions(source, dense, calibration, runs) if blame else None
    options = CompareOptions(metric, output, samples, layers, wanted)
    found = compare_both(model, engine, data, options, out.stage)
    out.show(f"{engine} against {model} as written, {found.samples} samples")
    out.show(_outputs(found.outputs))
    if found.scores is not None:
        out.show(_scores(found.scores))
    if found.layers is not None:
        out.show(*_layers(found.layers))
    if found.blame is not None:
        out.show(*_blame(found.blame, found.scores))
    out.data("compare/1", _document(model, engine, found, max_drop))
    if max_drop is not None:
        try:
            found.require(max_drop)
        except GateError as e:
            out.fail(str(e))


def _document(
    model: Path, engine: Path, found: Comparison, max_drop: float | None
) -> dict[str, Any]:
    return {
        "model": str(model),
        "engine": str(engine),
        **dataclasses.asdict(found),
        "max_drop": max_drop,
        "passed": None if max_drop is None else found.holds(max_drop),
    }


def _outputs(rows: Sequence[Difference]) -> Table:
    table = Table(
        caption="SQNR: energy of the model's values over that of the differences.",
        caption_justify="left",
    )
    table.add_column("output", overflow="fold")
    for header in ("SQNR", "cosine", "largest diff.", "mean diff.", "of at most", "equal", "worst"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            printable(row.name),
            _decibels(row.sqnr_db),
            f"{row.cosine:.6f}",
            f"{row.max_abs:.3g}",
            f"{row.mean_abs:.3g}",
            f"{row.reference_max_abs:.3g}",
            f"{row.equal:.1%}",
            "" if row.worst_sample is None else f"#{row.worst_sample}",
        )
        if row.not_finite:
            table.add_row(printable(f"  {row.not_finite} values NaN or infinite in one of both"))
    return table


def _decibels(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def _scores(scores: Scores) -> str:
    less = "" if scores.higher_is_better else " (less is better)"
    unit = f" {scores.unit}" if scores.unit else ""
    if scores.drop == 0:
        change = "no difference"
    else:
        change = f"{abs(scores.drop):.4g} {'worse' if scores.drop > 0 else 'better'}"
    if scores.drop_error is not None:
        change += f" (standard error {scores.drop_error:.2g})"
    return (
        f"{scores.name}{less}: model {scores.reference:.4f}{unit}, "
        f"engine {scores.engine:.4f}{unit}: {change}"
    )


def _layers(found: Layers) -> list[Table | str]:
    from twofour.evaluate.layers import marked

    table = Table(
        caption="lost: SQNR less than that of the worst tensor that the layer reads.",
        caption_justify="left",
    )
    for header in ("layer", "tensor"):
        table.add_column(header, overflow="fold")
    for header in ("type", "SQNR", "", "cosine", "lost"):
        table.add_column(header, justify="left" if header == "" else "right", no_wrap=True)
    guilty = marked(found.rows)
    for index, row in enumerate(found.rows):
        lost = "" if row.lost_db is None else f"{row.lost_db:.1f} dB"
        table.add_row(
            printable(short(row.layer, _NAME)),
            printable(short(row.value, _NAME)),
            _TYPES.get(row.precision, row.precision),
            _decibels(row.sqnr_db),
            _bar(row.sqnr_db),
            f"{row.cosine:.5f}",
            f"{lost} <" if index in guilty else lost,
            style="red" if index in guilty else None,
        )
    worst = sorted(guilty, key=lambda i: -(found.rows[i].lost_db or 0.0))
    words = [
        f"- {short(found.rows[i].value, _NAME)} loses {found.rows[i].lost_db:.1f} dB" for i in worst
    ]
    notes = [f"- {text}" for text in found.without]
    head = f"{len(notes)} tensors of the engine cannot be compared"
    return [table, *words, *([head, *notes] if notes else [])]


def _bar(sqnr_db: float) -> str:
    """One sign for 6 dB, one bit."""
    return "=" * round(min(max(sqnr_db / 6, 0), _BAR))


def _blame(found: Blame, scores: Scores | None) -> list[Table | str]:
    parts: list[Table | str] = []
    name = scores.name if scores else "SQNR"
    kinds = [("floats", found.int8, found.all_int8), ("dense", found.sparse, found.all_sparse)]
    for form, rows, whole in kinds:
        if whole is not None:
            parts.append(_blamed(f"what {name} gains when a layer is {form} again", rows, whole))
    parts.append(
        f"{found.runs} engines built and judged; the one built again agrees with the given one: "
        f"{_decibels(found.agreement_db)}"
    )
    if any(row.gain_error for row in (*found.int8, *found.sparse)):
        parts.append("±: standard error; a gain below twice of it may be chance")
    return [*parts, *(f"- {note}" for note in found.notes)]


def _blamed(title: str, rows: Sequence[Blamed], whole: Blamed) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    for header in ("is", "gain", "SQNR", "price", "guess"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        _add_blamed(table, _layer_text(row), row)
    table.add_section()
    _add_blamed(table, f"all {len(whole.layers)} at once", whole)
    return table


def _add_blamed(table: Table, text: str, row: Blamed) -> None:
    table.add_row(
        printable(text),
        row.kind,
        _gain(row),
        f"{row.sqnr_gain_db:+.1f} dB",
        f"{row.price_us:+.2f} us",
        f"{row.guess:.1e}",
    )


def _gain(row: Blamed) -> str:
    if row.gain is None:
        return ""
    error = "" if row.gain_error is None else f" ±{row.gain_error:.2g}"
    return f"{row.gain:+.4g}{error}"


def _layer_text(row: Blamed) -> str:
    if len(row.layers) == 1:
        return f"{short(row.layers[0], _NAME)} ({row.ops[0]})"
    shown = ", ".join(short(name, _NAME // 2) for name in row.layers[:_NAMED])
    return f"{len(row.layers)} together: {shown}{', ...' if row.layers[_NAMED:] else ''}"

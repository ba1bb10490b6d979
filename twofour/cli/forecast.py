"""twofour forecast: what pruning and quantizing will gain on this machine, before either."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from twofour.cli.options import Shapes, Threads, parse_shapes
from twofour.cli.output import Json, Output, Quiet, by_reason, printable, short

if TYPE_CHECKING:
    from twofour.predict.layers import LayerTimes
    from twofour.predict.results import Forecast, Run
    from twofour.predict.verdicts import Verdict

_WIDE = 96
_NAME, _LONG = 34, 60  # characters of a name, in the table and in lists
_Row = tuple["LayerTimes", "Verdict | None"]


class Precision(StrEnum):
    """Those of `compiler.forms.GPU_PRECISIONS`; a CPU has three of them."""

    f32 = "f32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


class PatternName(StrEnum):
    """Those of `compiler.forms.PATTERNS`."""

    free = "2:4"
    pair = "2:4/pair"


def forecast(
    model: Annotated[Path, typer.Argument(help="An ONNX file, as a rule dense and float32.")],
    shapes: Shapes = None,
    precision: Annotated[
        list[Precision] | None, typer.Option(help="Only this one; repeatable.")
    ] = None,
    pattern: Annotated[
        list[PatternName] | None, typer.Option(help="Only this one; repeatable.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="cpu, or cuda: the GPU of this machine. Runs include all copies.")
    ] = "cpu",
    threads: Threads = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File with measured times, shared with twofour build.")
    ] = None,
    tuning_effort: Annotated[
        int, typer.Option(min=1, max=3, help="As of twofour build; 1 is quick, and rough.")
    ] = 2,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what pruning and quantizing would gain.

    Before either: without data, training or calibration.

    Example: twofour forecast resnet50.onnx --shapes x:1x3x224x224
    Example: twofour forecast bert.onnx --precision int8 --pattern 2:4
    Example: twofour forecast resnet50.onnx --target cuda --shapes x:32x3x224x224
    """
    from twofour.compiler.forms import PATTERNS
    from twofour.predict.forecast import forecast as look_ahead

    out = Output(as_json, quiet)
    found = look_ahead(
        model,
        stage=out.stage,
        shapes=parse_shapes(shapes),
        threads=threads or 1,
        timing_cache=timing_cache,
        tuning_effort=tuning_effort,
        target=target,
        precisions=[each.value for each in precision or ()],
        patterns=[each for each in PATTERNS if not pattern or each in pattern],
    )
    out.show(_heading(found), *(f"note: {note}" for note in found.notes))
    rows = _rows(found)
    if rows:
        out.show(_layers(found, rows, out.width), *_key(found))
    out.show(_runs(found.runs), *_advice(found))
    out.data("forecast/1", found.to_json())


def _heading(found: Forecast) -> str:
    shapes = ", ".join(f"{n} {'x'.join(map(str, s)) or '()'}" for n, s in found.inputs.items())
    return (
        f"{found.model} at {shapes}, {found.threads} thread{'s' * (found.threads > 1)} on "
        f"{found.cpu} ({found.target})"
    )


def _rows(found: Forecast) -> list[list[_Row]]:
    """The layers, those of one shape together."""
    groups: dict[tuple[str, ...], list[_Row]] = {}
    verdicts = found.verdicts or (None,) * len(found.layers)
    for layer, verdict in zip(found.layers, verdicts, strict=True):
        key = layer.shape or layer.name, layer.op, verdict.reason if verdict else ""
        groups.setdefault(key, []).append((layer, verdict))
    return list(groups.values())


def _layers(found: Forecast, rows: Sequence[Sequence[_Row]], width: int) -> Table:
    """Each kind of layer with its times; on a narrow terminal of the judged precision only."""
    shown = _columns(found)
    if width < _WIDE:
        shown = {p: v for p, v in shown.items() if found.judged and p == found.judged.precision}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("\nlayer", overflow="fold", ratio=1)
    table.add_column("\nn", justify="right", no_wrap=True)
    table.add_column("\nshare", justify="right", no_wrap=True)
    for precision, patterns in shown.items():
        table.add_column(f"{precision}\nus", justify="right", no_wrap=True)
        for pattern in patterns:
            head = pattern.partition("/")[2] or pattern
            table.add_column(f"\n{head}", justify="right", no_wrap=True)
    table.add_column("pruned\nsaves", justify="right", no_wrap=True)
    for group in rows:
        layer, verdict = group[0]
        table.add_row(
            printable(f"{short(layer.name, _NAME)}\n  {layer.shape or layer.op}"),
            str(len(group)),
            _share(sum(each.share or 0.0 for each, _ in group)),
            *(cell for p, names in shown.items() for cell in _cells(group, p, names)),
            _saved([v for _, v in group if v]) if verdict else "",
        )
    return table


def _columns(found: Forecast) -> dict[str, list[str]]:
    """The patterns of each precision."""
    shown: dict[str, list[str]] = {}
    for run in found.runs:
        patterns = shown.setdefault(run.precision, [])
        if run.pattern and run.pattern not in patterns:
            patterns.append(run.pattern)
    return shown


def _cells(group: Sequence[_Row], precision: str, patterns: Sequence[str]) -> list[str]:
    """The mean dense time of a group, and how many times as fast each pattern is."""
    every = [times for layer, _ in group if (times := layer.at(precision))]
    dense_us = [times.dense_us for times in every if times.dense_us]
    if not dense_us or len(dense_us) < len(group):
        return [""] * (1 + len(patterns))
    gains = []
    for pattern in patterns:
        sparse_us = [us for times in every if (us := times.to(pattern).sparse_us)]
        whole = len(sparse_us) == len(dense_us)
        gains.append(f"{sum(dense_us) / sum(sparse_us):.2f}" if whole else "-")
    return [_microseconds(sum(dense_us) / len(dense_us)), *gains]


def _microseconds(us: float) -> str:
    """Three digits."""
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def _share(share: float) -> str:
    return f"{share:.1%}" if share else ""


def _saved(verdicts: Sequence[Verdict]) -> str:
    """Of a dense run, by all layers of a kind."""
    return f"{sum(v.saves for v in verdicts):.1%}" if verdicts[0].pays else "no"


def _key(found: Forecast) -> list[str]:
    """What the columns mean."""
    text = (
        "us: the dense kernel, the mean of n layers. 2:4, pair: times as fast with that pattern, - "
        f"where it cannot be. share: of the time of all layers, {found.runs[0].name}."
    )
    if found.judged is not None:
        text += f" saves: of a dense run, if {found.judged}."
    return [text]


def _runs(runs: Sequence[Run]) -> Table:
    """Whole runs."""
    table = Table(
        caption="vs: times as fast as the dense form. dense: layers that could be pruned and run "
        "dense, because that is as fast. by: a run of such an engine, measured; or that, and the "
        "times of the layers that differ.",
        caption_justify="left",
    )
    table.add_column("the whole model in", overflow="fold")
    versus = {"vs float32": [r.vs_f32 for r in runs], "vs INT8": [r.vs_int8 for r in runs]}
    versus = {header: ratios for header, ratios in versus.items() if any(ratios)}
    for header in ("ms", *versus, "dense"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for index, run in enumerate(runs):
        ratios = [f"{each[index] or 0.0:.2f}x" for each in versus.values()]
        left = str(len(run.dense)) if run.pattern else ""
        how = "a run" if run.measured else "its layers"
        table.add_row(run.name, f"{run.time_us / 1e3:.3f}", *ratios, left, how)
    return table


def _advice(found: Forecast) -> list[str]:
    """What to prune, what not and why, and how to go on."""
    if found.judged is None:
        return []
    many = f"{len(found.worth)} of {len(found.layers)} layers"
    lines = [f"worth pruning, to {found.judged}: {many}"]
    lines += [f"  {', '.join(short(name, _LONG) for name in found.worth)}"] if found.worth else []
    left = [(v.reason, _with_times(v)) for v in found.verdicts if not v.pays]
    lines += by_reason("not worth it", left)
    if not found.worth:
        return [*lines, "pruning does not pay here"]
    measure, train = found.commands()
    return [
        *lines,
        f"measure it:  {measure}",
        f"train it, if its modules are named like this:  {train}",
    ]


def _with_times(verdict: Verdict) -> str:
    if verdict.dense_us is None or verdict.sparse_us is None:
        return short(verdict.layer, _LONG)
    dense, sparse = map(_microseconds, (verdict.dense_us, verdict.sparse_us))
    return f"{short(verdict.layer, _LONG)} ({dense} us, sparse {sparse})"

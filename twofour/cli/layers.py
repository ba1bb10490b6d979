"""What explain shows: tables and lines about the layers of an engine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Table

from twofour.cli.output import printable

if TYPE_CHECKING:
    from twofour.compiler.explain import Explained, Total
    from twofour.compiler.summary import Conversion, Part
    from twofour.engine import Layer, Write

_WIDE, _NARROW = 110, 80
_MOST_NAMES, _MOST_REASONS = 8, 15
_NAMES = re.compile(r"'[^']*'|\S*\d\S*")
"""What tells reasons of one kind apart."""
_KINDS = {
    "sparse": "sparse products",
    "dense": "dense products",
    "later": "products whose kernels are chosen when loaded",
    "other": "other kernels",
    "conversion": "conversions",
    "onnxruntime": "ONNX Runtime",
}


def layer_table(rows: Sequence[Explained], width: int, model: str = "") -> Table:
    """A narrow terminal shows fewer columns, never broken numbers.

    Args:
        rows: the layers.
        width: of the terminal.
        model: the CPU that times are estimated for; "" where they were measured.
    """
    wide = width >= _WIDE
    table = Table(
        caption=f"{_unit(model)}: {_origin(model)}. "
        "dense, sparse: the best candidate of each kind, gain: their ratio; "
        "a kind that its first candidate left behind was not tried further. "
        "kB: activations and weights that it reads and writes.",
        caption_justify="left",
    )
    for header in ("layer", "operator", "shape") if wide else ("layer",):
        table.add_column(header, overflow="fold")
    table.add_column("runs as", overflow="fold")
    numbers = [
        _unit(model),
        "share",
        "dense",
        "sparse",
        "gain",
        *(["kB"] if width >= _NARROW else []),
    ]
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in _by_step(rows):
        middle = [printable(row.op), printable(row.shape)] if wide else []
        table.add_row(
            printable(row.name),
            *middle,
            printable(row.runs_as),
            _number(row.time_us, "{:.2f}"),
            _number(row.share, "{:.0%}"),
            _number(row.best_dense_us, "{:.2f}"),
            _number(row.best_sparse_us, "{:.2f}"),
            _number(row.gain, "{:.2f}x"),
            *([_number(row.moved_bytes / 1e3 or None, "{:.4g}")] if width >= _NARROW else []),
        )
    return table


def _unit(model: str) -> str:
    """Over a column of times."""
    return "us (est.)" if model else "us"


def _origin(model: str) -> str:
    """Where times come from."""
    return f"estimated by the cost model for {model}" if model else "measured at build"


def _by_step(rows: Sequence[Explained]) -> list[Explained]:
    """All that one call of ONNX Runtime computes as one row: it has one time."""
    steps: dict[int, list[Explained]] = {}
    for row in rows:
        if row.fallback:
            steps.setdefault(row.step, []).append(row)
    found = []
    for row in rows:
        together = steps.get(row.step, [row]) if row.fallback else [row]
        timed = max(together, key=lambda each: each.time_us or 0.0)
        if row is not timed:
            continue
        kinds = ", ".join(dict.fromkeys(each.op for each in together))
        more = f" and {len(together) - 1} more" * (len(together) > 1)
        found.append(replace(row, name=f"{row.name}{more}", op=kinds))
    return found


def summary(parts: Sequence[Part], advice: Sequence[str]) -> list[str]:
    """What takes the time, and what is worth doing next."""
    shares = [
        f"{_KINDS[part.kind]} {part.share:.0%} ({part.time_us:.1f} us, {part.layers} "
        f"layer{'s' * (part.layers > 1)})"
        for part in parts
    ]
    ideas = [f"next: {text}" for text in advice]
    if parts and not any(part.time_us for part in parts):
        counts = [f"{part.layers} {_KINDS[part.kind]}" for part in parts]
        return [f"layers: {', '.join(counts)}; none was timed", *ideas]
    return [f"of the time: {', '.join(shares)}", *(ideas or ["next: nothing stands out"])]


def conversion_table(found: Sequence[Conversion]) -> list[Table | str]:
    """Every conversion with its cost and who caused it."""
    if not found:
        return ["no conversions: every layer reads what the one before it wrote"]
    table = Table(title="conversions", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("what")
    for header in ("us", "share", "kB"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("because", overflow="fold", ratio=1)
    for each in found:
        table.add_row(
            printable(each.name),
            printable(each.op),
            _number(each.time_us, "{:.2f}"),
            _number(each.share, "{:.1%}"),
            f"{each.moved_bytes / 1e3:.4g}",
            printable(each.cause),
        )
    return [table]


def reasons(rows: tuple[Explained, ...]) -> list[str]:
    """Each kind of reason once, with the layers it holds for, what takes longest first."""
    found: dict[str, dict[str, list[Explained]]] = {}
    for row in rows:
        for reason in row.why:
            found.setdefault(_NAMES.sub("", reason), {}).setdefault(reason, []).append(row)

    def weight(alike: dict[str, list[Explained]]) -> float:
        return -sum(row.time_us or 0.0 for layers in alike.values() for row in layers)

    lines = []
    for alike in sorted(found.values(), key=weight)[:_MOST_REASONS]:
        names = list(dict.fromkeys(row.name for layers in alike.values() for row in layers))
        more = f" (and {len(alike) - 1} like it)" * (len(alike) > 1)
        lines.append(f"- {next(iter(alike))}{more}\n  {_some(names)}")
    if len(found) > _MOST_REASONS:
        lines.append(f"and {len(found) - _MOST_REASONS} more: --layer NAME, or --json for all")
    return ["why some layers are not sparse, not integer, or not our own", *lines] if lines else []


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def total_table(totals: tuple[Total, ...], model: str = "") -> Table:
    """The layers summed by tactic; `model` as of `layer_table`."""
    table = Table(title="by tactic", title_justify="left")
    table.add_column("tactic")
    for header in ("layers", _unit(model), "share", "million multiply-adds"):
        table.add_column(header, justify="right")
    for total in totals:
        table.add_row(
            printable(total.tactic),
            str(total.layers),
            _number(total.time_us, "{:.1f}"),
            _number(total.share if total.time_us else None, "{:.0%}"),
            f"{total.macs / 1e6:.2f}",
        )
    return table


def fallbacks(rows: tuple[Explained, ...]) -> list[str]:
    """What runs on ONNX Runtime."""
    names = [f"{row.name} ({row.op})" for row in rows if row.fallback]
    if not names:
        return ["every layer runs on a kernel of its own; none on ONNX Runtime"]
    return [f"on ONNX Runtime, for want of a kernel: {_some(names)}"]


def detail(layer: Layer, model: str = "") -> list[Table | str]:
    """One layer with its candidates and reasons; `model` as of `layer_table`."""
    from twofour.compiler.explain import verdict

    facts = (
        f"{layer.name}: {layer.op}, {layer.shape or 'no shape'}\n"
        f"runs as {layer.tactic} {layer.precision} {layer.config}".rstrip()
        + f"\nweights: {layer.pattern or 'none'}, {layer.weight_bytes} bytes packed, "
        f"{layer.macs} multiply-adds"
        f"\nmoves {layer.work.moved_bytes} bytes of activations"
        f"\ncomputes {_some(layer.source) or 'nothing of the source model: a conversion'}"
    )
    if layer.cause:
        facts += f"\ncaused by: {layer.cause}"
    for write in layer.writes:
        facts += f"\nwrites {_written(write)}"
    table = Table(title="candidates", title_justify="left")
    for header in ("tactic", "configuration"):
        table.add_column(header, overflow="fold")
    table.add_column(_unit(model), justify="right")
    table.add_column("verdict", overflow="fold", ratio=1)
    best_first = sorted(layer.candidates, key=lambda c: (c.time_us is None, c.time_us or 0.0))
    for candidate in best_first:
        table.add_row(
            printable(candidate.tactic),
            printable(candidate.config),
            _number(candidate.time_us, "{:.2f}"),
            printable(verdict(candidate, layer)),
        )
    notes = [f"note: {note}" for note in layer.notes]
    return [facts, *([table] if layer.candidates else []), *notes]


def _written(write: Write) -> str:
    """A value, what it stands for, and how it is stored."""
    shape = "x".join(map(str, write.tensor.shape))
    text = f"{write.tensor.name}: {write.tensor.dtype} {shape}"
    if write.scale:
        text += f", scale {write.scale[0]:.4g}{' and more' * (len(write.scale) > 1)}"
        text += f", zero point {write.zero_point}"
    return text + (f", for {write.source}" if write.source not in ("", write.tensor.name) else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)

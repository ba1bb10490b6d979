"""twofour explain --sizes: bytes of an engine, of each layer's weight, and of other forms of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from twofour.cli.output import Output, printable, short

if TYPE_CHECKING:
    from twofour.bench.sizes import LayerRow, Saved, Size

_NAME = 34


def show_sizes(paths: Sequence[Path], out: Output) -> None:
    """Shows all forms in one table, and the layers of the first in another.

    Args:
        paths: of the engine, then of what stands beside it.
        out: for people and programs.

    Raises:
        InputError, EngineError: a file is no form of the network.
    """
    from twofour.bench.sizes import compare, saved, size_of

    with out.stage("reading") as report:
        sizes: list[Size] = []
        for path in paths:
            report(len(sizes), len(paths), path.name)
            sizes.append(size_of(path))
    rows = compare(sizes)
    gains = [(other, found) for other in sizes[1:] if (found := saved(sizes[0], other))]
    out.show(_files(sizes), _layers(rows, sizes), *(_gain(*each) for each in gains))
    document = {
        "files": [_plain(size) for size in sizes],
        "layers": [dataclasses.asdict(row) for row in rows],
        "sparse_int8": [
            {
                "beside": other.name,
                **dataclasses.asdict(found),
                "ratio": found.ratio,
                "weights_alone": found.weights_alone,
            }
            for other, found in gains
        ],
    }
    out.data("explain.sizes/1", document)


def _plain(size: Size) -> dict[str, Any]:
    return {
        "name": size.name,
        "kind": size.kind,
        "weights": size.weights,
        "file_bytes": size.file_bytes,
        "weight_bytes": size.weight_bytes,
    }


def _files(sizes: Sequence[Size]) -> Table:
    table = Table(
        caption="of weights: as packed; of an ONNX file, as stored", caption_justify="left"
    )
    table.add_column("", no_wrap=True)
    for header in ("file", "mostly"):
        table.add_column(header, overflow="fold")
    for header in ("kB", "kB of weights", "A/this"):
        table.add_column(header, justify="right", no_wrap=True)
    for index, size in enumerate(sizes):
        ratio = sizes[0].weight_bytes / size.weight_bytes if index and size.weight_bytes else None
        table.add_row(
            _letter(index),
            printable(size.name),
            size.weights,
            _kilobytes(size.file_bytes),
            _kilobytes(size.weight_bytes),
            "" if ratio is None else f"{ratio:.3f}",
        )
    return table


def _layers(rows: Sequence[LayerRow], sizes: Sequence[Size]) -> Table:
    ratios = "; then the first's bytes over those of each other" if len(sizes) > 1 else ""
    table = Table(caption=f"kB of each layer's weight{ratios}", caption_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("packed as", no_wrap=True)
    for index in range(len(sizes)):
        table.add_column(_letter(index), justify="right", no_wrap=True)
    for index in range(1, len(sizes)):
        table.add_column(f"A/{_letter(index)}", justify="right", no_wrap=True)
    for row in rows:
        own, *others = row.weight_bytes
        table.add_row(
            printable(short(row.name, _NAME)),
            f"{row.tactic or row.pattern} {row.precision}",
            *("" if each is None else _kilobytes(each) for each in row.weight_bytes),
            *(f"{own / each:.3f}" if own and each else "" for each in others),
        )
    return table


def _gain(other: Size, found: Saved) -> str:
    return (
        f"{found.layers} layers are 2:4 int8, and dense int8 in {other.name}: they take "
        f"{found.ratio:.3f} times its bytes; {found.weights_alone:.3f} times without scales, "
        "biases and padding, which are the same in both"
    )


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _kilobytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e3:.1f}"

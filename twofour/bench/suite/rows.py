"""The rows of each suite: a network at a batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twofour.core.errors import InputError

LENGTH = 128


@dataclass(frozen=True)
class SuiteRow:
    """One row.

    Attributes:
        name: of the row.
        network: a key of the catalog of networks, or a name for `file`.
        batch: samples a call.
        length: tokens a sample, for a network that takes text.
        cold_start: whether starting a process is measured too.
        similarity: whether its text similarity is scored (see `text.py`).
        file: an ONNX file in the folder of data, in the place of a network of the catalog.
    """

    name: str
    network: str
    batch: int
    length: int = LENGTH
    cold_start: bool = False
    similarity: bool = False
    file: str = ""


@dataclass(frozen=True)
class SuiteOptions:
    """What holds for all rows.

    Attributes:
        peers: names of `twofour.bench.peers.PEERS`.
        threads: for everybody.
        duration_s: timed seconds a row, shared by all contestants.
        cache: folder of models and engines, kept between runs.
        data: folder with `stsb/stsb-en-dev.csv` and the files of rows; None if there is none.
        pairs: score so many pairs of sentences at most; None for all.
    """

    peers: tuple[str, ...]
    threads: int
    duration_s: float
    cache: Path
    data: Path | None = None
    pairs: int | None = None


SUITES: Mapping[str, tuple[SuiteRow, ...]] = {
    "cpu": (
        SuiteRow("cifar_resnet20_b1", "cifar_resnet20", 1),
        SuiteRow("cifar_resnet20_b16", "cifar_resnet20", 16),
        SuiteRow("resnet18_b1", "resnet18", 1),
        SuiteRow("resnet34_b1", "resnet34", 1),
        SuiteRow("resnet50_b1", "resnet50", 1, cold_start=True),
        SuiteRow("resnet50_b8", "resnet50", 8),
        SuiteRow("minilm_b1", "minilm", 1, similarity=True),
        SuiteRow("minilm_b8", "minilm", 8),
        SuiteRow("bert_base_b1", "bert_base", 1),
        SuiteRow("bert_base_b8", "bert_base", 8),
        SuiteRow("mobilenetv2_b1", "mobilenetv2", 1),
        SuiteRow("vit_b16_b1", "vit_b16", 1),
    ),
    "detection": (
        SuiteRow("yolov8n_b1", "yolov8n", 1),
        SuiteRow("fastestdet_b1", "fastestdet", 1, file="onnx/fastestdet.onnx"),
        SuiteRow("ultraface_slim_b1", "ultraface_slim", 1, file="onnx/ultraface_slim_320.onnx"),
        SuiteRow(
            "ultraface_rfb_b1", "ultraface_rfb", 1, file="onnx/ultraface_rfb_320_simplified.onnx"
        ),
    ),
}


def select(suite: str, only: Sequence[str] = ()) -> tuple[SuiteRow, ...]:
    """The rows of a suite, in its order.

    Args:
        suite: a key of `SUITES`.
        only: names of rows; all if empty.

    Raises:
        InputError: no such suite or row.
    """
    if suite not in SUITES:
        known = ", ".join(SUITES)
        raise InputError(f"no suite {suite!r}", [f"expected one of {known}"], "check --suite")
    rows = SUITES[suite]
    unknown = set(only) - {row.name for row in rows}
    if unknown:
        names = ", ".join(row.name for row in rows)
        raise InputError(f"no row {min(unknown)!r}", [f"{suite} has {names}"], "check --only")
    return tuple(row for row in rows if not only or row.name in only)

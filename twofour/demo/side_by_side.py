"""One network in several forms, each on its own engine: accuracy and latency side by side.

An entry joins what the two measurements need: a function that predicts a batch, and a contestant
that runs one prepared input. All entries are timed in one race.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twofour.bench.peers import onnxruntime, torch
from twofour.bench.table import Row, plain
from twofour.bench.timing import Contestant, Schedule, race
from twofour.bench.versus import ours
from twofour.core.progress import Stage
from twofour.core.records import to_plain
from twofour.core.target import detect_host, host_target
from twofour.core.version import __version__
from twofour.evaluate.accuracy import Verdict, top1
from twofour.runtime.session import Session, load

Array = NDArray[Any]

PEER_BATCH = 250


class Module(Protocol):
    """What is used of a `torch.nn.Module`."""

    def __call__(self, *inputs: Any) -> Any:
        """Computes the outputs."""

    def state_dict(self) -> dict[str, Any]:
        """Name -> tensor."""


@dataclass(frozen=True)
class Samples:
    """A test set of a classifier with one input.

    Attributes:
        name: of the input.
        x: float32 [S, ...].
        labels: int64 [S].
    """

    name: str
    x: Array
    labels: Array

    def first(self) -> dict[str, Array]:
        """The first sample as the input of an engine for batch 1."""
        return {self.name: np.ascontiguousarray(self.x[:1])}


@dataclass(frozen=True)
class Entry:
    """One row before it is measured.

    Attributes:
        name: what runs it; no two entries share it.
        weights: what it runs, in words.
        size_bytes: of its file.
        predict: x [B, ...] -> scores [B, classes].
        batch: the B that `predict` takes.
        contestant: runs one sample.
    """

    name: str
    weights: str
    size_bytes: int
    predict: Callable[[Array], Array]
    batch: int
    contestant: Contestant


@dataclass(frozen=True)
class Outcome:
    """What a flow ends with.

    Attributes:
        title: what was measured, in words.
        command: reproduces it.
        rows: one for each entry, from one race.
        baseline: name of the row that speeds refer to.
        settings: row name -> how it was set up.
        verdict: of the gate.
    """

    title: str
    command: str
    rows: list[Row]
    baseline: str
    settings: dict[str, str]
    verdict: Verdict

    def document(self) -> dict[str, Any]:
        """As `summary.json` has it."""
        return {
            "title": self.title,
            "command": self.command,
            "version": __version__,
            "cpu": detect_host().model,
            "target": str(host_target()),
            "baseline": self.baseline,
            "rows": plain(self.rows, self.baseline),
            "settings": self.settings,
            "gate": to_plain(self.verdict),
        }

    def save(self, path: Path) -> None:
        """Writes the document, under a temporary name first."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.document(), indent=2) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def torch_entry(name: str, weights: str, module: Module, samples: Samples, threads: int) -> Entry:
    """PyTorch in eager mode; its size is that of its parameters and buffers."""
    size_bytes = sum(int(tensor.nbytes) for tensor in module.state_dict().values())
    runner = torch.contestant(module, samples.first(), threads)
    return Entry(name, weights, size_bytes, torch.predictor(module), PEER_BATCH, runner)


def onnxruntime_entry(
    name: str, weights: str, model: Path, samples: Samples, threads: int
) -> Entry:
    """ONNX Runtime on a file with an open batch size."""
    return Entry(
        name,
        weights,
        model.stat().st_size,
        onnxruntime.predictor(model, samples.name, threads),
        PEER_BATCH,
        onnxruntime.prepare(model, samples.first(), threads),
    )


def engine_entry(name: str, weights: str, engine: Path, samples: Samples, threads: int) -> Entry:
    """Ours on an engine file; its session stays open as long as the entry lives."""
    session: Session = load(engine, threads)
    (output,) = (info.name for info in session.outputs)

    def predict(x: Array) -> Array:
        return session.run({samples.name: np.ascontiguousarray(x)})[output]

    runner = ours(session, samples.first(), name)
    batch = session.inputs[0].shape[0]
    return Entry(name, weights, engine.stat().st_size, predict, batch, runner)


def measure(
    entries: Sequence[Entry], samples: Samples, stage: Stage, schedule: Schedule | None = None
) -> list[Row]:
    """Accuracy of each entry on all samples, then the latency of all in one race.

    Args:
        entries: in the order of the rows.
        samples: the test set.
        stage: shows progress.
        schedule: of the race.
    """
    accuracies = []
    with stage("evaluate") as report:
        for entry in entries:
            accuracies.append(
                top1(
                    entry.predict,
                    samples.x,
                    samples.labels,
                    entry.batch,
                    lambda done, total, entry=entry: report(done, total, entry.name),  # type: ignore[misc]
                )
            )
    with stage("measure latency") as report:
        timings = race(
            [entry.contestant for entry in entries],
            schedule,
            lambda done, total: report(done, total, "rounds, all engines taking turns"),
        )
    return [
        Row(entry.name, entry.weights, accuracy, timing, entry.size_bytes)
        for entry, accuracy, timing in zip(entries, accuracies, timings, strict=True)
    ]

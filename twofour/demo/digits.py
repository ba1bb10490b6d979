"""The demo: from scans to a judged engine.

    scans -> train -> prune 2:4 -> fine-tune, mask held -> ONNX -> calibrate, INT8 -> still 2:4?
          -> engine -> top-1, latency, size beside PyTorch and ONNX Runtime -> gate

Three networks go through it: the dense one, a 2:4 one and a pair-shared 2:4 one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from twofour.bench.table import Row
from twofour.compiler.build import BuildOptions, build
from twofour.core.errors import InputError
from twofour.core.progress import Report, Stage
from twofour.demo.side_by_side import (
    Entry,
    Outcome,
    Samples,
    engine_entry,
    measure,
    onnxruntime_entry,
    torch_entry,
)
from twofour.evaluate.accuracy import Limits, Verdict, gate
from twofour.onnx_tools.inspect import require_patterns
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.quantize import quantize
from twofour.train import Progress, export_onnx
from twofour.train.digits import (
    RECOVERY,
    TRAINING,
    Digits,
    DigitsNet,
    finetune_digits,
    load_digits,
    train_digits,
)

REFERENCE, BASELINE, JUDGED = "PyTorch f32", "ONNX Runtime INT8", "twofour 2:4 INT8"
THREADS = 1
LIMITS = Limits(max_drop_points=1.5, min_speedup=1.0)
SUMMARY = "summary.json"
TITLE = "Handwritten digits (scikit-learn), 500 test scans, batch 1, one thread"
# Network -> the stem of its files.
STEMS = {"dense": "digits-dense", "2:4": "digits-24", "2:4/pair": "digits-24pair"}


def run(folder: Path, seed: int, stage: Stage) -> Outcome:
    """Runs everything and leaves `.onnx`, `.engine` and `summary.json` in the folder.

    Args:
        folder: made if need be; files of an earlier run are replaced.
        seed: of training.
        stage: shows the progress of a stage.

    Raises:
        InputError: the folder cannot be written.
        GateError: a weight lost its pattern on the way.
    """
    _make(folder)
    digits = load_digits()
    dense = networks(digits, seed, folder, stage)
    for name in STEMS:
        compress(name, digits, folder, stage)
    samples = Samples("x", digits.test_x, digits.test_y)
    listed = entries(dense, samples, folder)
    rows = measure(listed, samples, stage)
    settings = {entry.name: entry.contestant.setting for entry in listed}
    outcome = Outcome(TITLE, f"twofour demo --seed {seed}", rows, BASELINE, settings, judge(rows))
    outcome.save(folder / SUMMARY)
    return outcome


def networks(digits: Digits, seed: int, folder: Path, stage: Stage) -> DigitsNet:
    """Trains, prunes, fine-tunes and exports; returns the dense network."""
    with stage("train") as report:
        dense = train_digits(digits, seed, _training(report, TRAINING.epochs))
    example = torch.from_numpy(digits.train_x[:1])
    export_onnx(dense, example, _path(folder, "dense", "f32.onnx"))
    for pattern in ("2:4", "2:4/pair"):
        with stage(f"prune {pattern}, fine-tune") as report:
            shown = _training(report, RECOVERY.epochs)
            sparse, _ = finetune_digits(dense, digits, pattern, seed, shown)
        export_onnx(sparse, example, _path(folder, pattern, "f32.onnx"))
    return dense


def compress(name: str, digits: Digits, folder: Path, stage: Stage) -> None:
    """Quantizes one network's file, checks that its weights kept their pattern, and builds it."""
    with stage(f"quantize {name}") as report:
        model = load_model(_path(folder, name, "f32.onnx"))
        before = patterns_of(model)
        int8 = quantize(model, {"x": digits.calibration_x}, None, report)
        path = save_model(int8, _path(folder, name, "int8.onnx"))
        require_patterns(load_model(path), before)
    with stage(f"build {name}") as report:
        engine = build(path, BuildOptions(threads=THREADS), progress=report)
        engine.save(_path(folder, name, "engine"))


def entries(dense: DigitsNet, samples: Samples, folder: Path) -> list[Entry]:
    """The six rows of the table."""
    listed = [
        torch_entry(REFERENCE, "dense float32", dense, samples, THREADS),
        onnxruntime_entry(
            "ONNX Runtime f32",
            "dense float32",
            _path(folder, "dense", "f32.onnx"),
            samples,
            THREADS,
        ),
        onnxruntime_entry(
            BASELINE, "2:4 int8", _path(folder, "2:4", "int8.onnx"), samples, THREADS
        ),
    ]
    for name in STEMS:
        path = _path(folder, name, "engine")
        listed.append(engine_entry(f"twofour {name} INT8", f"{name} int8", path, samples, THREADS))
    return listed


def judge(rows: list[Row]) -> Verdict:
    """The gate on the 2:4 INT8 engine: against PyTorch in accuracy, ONNX Runtime INT8 in speed."""
    named = {row.name: row for row in rows}
    reference, baseline, judged = (named[name] for name in (REFERENCE, BASELINE, JUDGED))
    if reference.top1 is None or judged.top1 is None:
        raise ValueError("the gate needs both accuracies")
    if baseline.timing is None or judged.timing is None:
        raise ValueError("the gate needs both times")
    times = baseline.timing.median_us, judged.timing.median_us
    return gate(reference.top1, judged.top1, *times, LIMITS)


def _path(folder: Path, name: str, suffix: str) -> Path:
    return folder / f"{STEMS[name]}.{suffix}"


def _training(report: Report, epochs: int) -> Callable[[Progress], None]:
    """Shows batches done, and what the epoch is like."""

    def show(at: Progress) -> None:
        done = at.epoch * at.batches + at.batch
        report(done, epochs * at.batches, f"loss {at.loss:.3f}, top-1 {at.accuracy:.1%}")

    return show


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"cannot make the folder {folder}", [str(e)], "choose another --output-dir"
        ) from e

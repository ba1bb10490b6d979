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
from twofour.compiler.build import build
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
from twofour.onnx_tools.options import QuantizeOptions
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

REFERENCE, JUDGED = "PyTorch f32", "twofour 2:4 INT8"
SAME_FILE = "ONNX Runtime INT8, same file"
BASELINE = "ONNX Runtime INT8, its best"
# ONNX Runtime is several times faster on uint8 activations with both inputs of an Add quantized
# than on the file that the engines are built from; the gate compares with what it does best.
SYMMETRIC = QuantizeOptions(activation="int8")
BEST_FOR_BASELINE = QuantizeOptions(activation="uint8", add_inputs="both")
THREADS = 1
LIMITS = Limits(max_drop_points=1.5, min_speedup=1.0)
SUMMARY = "summary.json"
FLOAT, INT8, UINT8, ENGINE = "f32.onnx", "int8.onnx", "uint8.onnx", "engine"
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
    dense, held = networks(digits, seed, folder, stage)
    for name in STEMS:
        quantize_file(name, digits, held[name], folder, stage)
        with stage(f"build {name}") as report:
            engine = build(_path(folder, name, INT8), progress=report, threads=THREADS)
            engine.save(_path(folder, name, ENGINE))
    samples = Samples("x", digits.test_x, digits.test_y)
    listed = entries(dense, samples, folder)
    rows = measure(listed, samples, stage)
    settings = {entry.name: entry.contestant.setting for entry in listed}
    outcome = Outcome(TITLE, f"twofour demo --seed {seed}", rows, BASELINE, settings, judge(rows))
    outcome.save(folder / SUMMARY)
    return outcome


def networks(
    digits: Digits, seed: int, folder: Path, stage: Stage
) -> tuple[DigitsNet, dict[str, dict[str, str]]]:
    """Trains, prunes, fine-tunes and exports.

    Returns:
        The dense network; for each network, layer name -> pattern that its weight has in the file.
    """
    with stage("train") as report:
        dense = train_digits(digits, seed, _training(report, TRAINING.epochs))
    example = torch.from_numpy(digits.train_x[:1])
    held = {"dense": export_onnx(dense, example, _path(folder, "dense", FLOAT))}
    for pattern in ("2:4", "2:4/pair"):
        with stage(f"prune {pattern}, fine-tune") as report:
            shown = _training(report, RECOVERY.epochs)
            sparse, _ = finetune_digits(dense, digits, pattern, seed, shown)
        held[pattern] = export_onnx(sparse, example, _path(folder, pattern, FLOAT))
    return dense, held


def quantize_file(
    name: str, digits: Digits, held: dict[str, str], folder: Path, stage: Stage
) -> None:
    """Quantizes one network's file, and checks that its weights kept their pattern.

    Raises:
        GateError: a weight lost it.
    """
    with stage(f"quantize {name}") as report:
        model = load_model(_path(folder, name, FLOAT))
        data = {"x": digits.calibration_x}
        path = save_model(quantize(model, data, SYMMETRIC, report), _path(folder, name, INT8))
        require_patterns(load_model(path), held)
        if name == "2:4":
            best = quantize(model, data, BEST_FOR_BASELINE, report)
            save_model(best, _path(folder, name, UINT8))


def entries(dense: DigitsNet, samples: Samples, folder: Path) -> list[Entry]:
    """The rows of the table before they are measured."""
    peers = {
        "ONNX Runtime f32": ("dense float32", _path(folder, "dense", FLOAT)),
        SAME_FILE: ("2:4 int8", _path(folder, "2:4", INT8)),
        BASELINE: ("2:4 int8", _path(folder, "2:4", UINT8)),
    }
    listed = [torch_entry(REFERENCE, "dense float32", dense, samples, THREADS)]
    for name, (weights, path) in peers.items():
        listed.append(onnxruntime_entry(name, weights, path, samples, THREADS))
    for name in STEMS:
        path = _path(folder, name, ENGINE)
        listed.append(engine_entry(f"twofour {name} INT8", f"{name} int8", path, samples, THREADS))
    return listed


def judge(rows: list[Row]) -> Verdict:
    """The gate: the 2:4 INT8 engine against PyTorch in accuracy, ONNX Runtime INT8 in speed."""
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

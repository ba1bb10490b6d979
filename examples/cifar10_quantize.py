"""The six cells: a CIFAR-10 ResNet dense and 2:4, in float32, after PTQ and after QAT.

    python examples/cifar10_quantize.py --bf16                       # ResNet-20: hours on two cores
    python examples/cifar10_quantize.py --device cuda --only train   # on a GPU, then here:
    python examples/cifar10_quantize.py --only judge --table benchmarks/cifar10_quantize.md

The published network is taken dense, and pruned to 2:4 and fine-tuned with its dense self as
teacher. Each is exported and quantized after training (PTQ), and trained on with fake quantizers,
masks held, same teacher (QAT). Every cell is an ONNX file that this machine's engine is built from;
its top-1 on the 10,000 test images is that of the engine. The files of 2:4 networks are checked to
be 2:4. Training resumes after a stop. The dataset and the published checkpoints are read from the
folder that TWOFOUR_DATA names.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cifar10.data import load_images
from cifar10.page import write, write_json
from cifar10.parts import share
from cifar10.quantization import CELLS, WEIGHTS, Bench, Job, Options, facts
from cifar10.resume import versions

from twofour.cli.output import Output
from twofour.core.errors import Error
from twofour.core.target import detect_host
from twofour.core.version import __version__
from twofour.train import Schedule, Sgd

TITLES = {"f32": "float32", "ptq": "INT8, PTQ", "qat": "INT8, QAT"}


def run(args: argparse.Namespace, out: Output) -> None:
    """Trains what is not trained, judges what is not judged, and writes the table."""
    every = [
        Job(depth, weights, seed)
        for depth in args.depth or [20]
        for weights in WEIGHTS
        for seed in range(args.seeds)
    ]
    part, parts = share(args.part)
    bench = Bench(options(args), load_images(args.short), out)
    for job in every[part - 1 :: parts]:
        folder, found = job.folder(args.out), job.folder(args.out) / "cells.json"
        if args.only != "judge":
            bench.train(job, folder)
        if args.only != "train" and not found.is_file():
            write_json(found, facts(job, bench.judge(job, folder)))
    if args.only != "train" and parts == 1:
        results = [json.loads((job.folder(args.out) / "cells.json").read_text()) for job in every]
        finish(args, results, out)


def options(args: argparse.Namespace) -> Options:
    """What the command line chose."""
    epochs = (1, 1) if args.short else (args.epochs, args.qat_epochs)
    tuning, qat = (
        Schedule(count, rate, optimizer=Sgd(), bf16=args.bf16)
        for count, rate in zip(epochs, (args.lr, args.qat_lr), strict=True)
    )
    return Options(tuning, qat, args.batch_size, args.recipe, args.learned_scales, args.device)


def finish(args: argparse.Namespace, results: Sequence[Mapping[str, Any]], out: Output) -> None:
    """Writes and prints the table."""
    host = detect_host()
    summary = {
        "title": "CIFAR-10 ResNets: dense and 2:4, in float32, after PTQ and after QAT",
        "command": command(args),
        "version": __version__,
        "device": [f"{host.model}, {host.cores} cores; trained on {args.trained_on}"],
        "tools": {"python": platform.python_version(), **versions()},
        "options": {k: str(v) for k, v in asdict(options(args)).items() if k != "device"},
        "rows": list(results),
    }
    write_json(args.out / "summary.json", summary)
    if args.table is not None:
        write(args.table, page(summary))
        write_json(args.table.with_suffix(".json"), summary)
    print(page(summary))
    out.note(f"left in {args.out}")


def page(summary: Mapping[str, Any]) -> str:
    """The summary as markdown."""
    lines = [
        f"# {summary['title']}",
        "",
        f"    {summary['command']}",
        "",
        f"Run on: {'; '.join(summary['device'])}; twofour {summary['version']}",
        "",
        "Top-1 in percent of engines on the 10,000 test images, mean of all seeds; in brackets "
        "against dense float32, and each seed:",
        "",
        "| network | weights | " + " | ".join(TITLES[cell] for cell in CELLS) + " |",
        "| --- | --- | --: | --: | --: |",
    ]
    for depth in sorted({row["depth"] for row in summary["rows"]}):
        here = [row for row in summary["rows"] if row["depth"] == depth]
        dense = _mean([row["f32"] for row in here if row["weights"] == WEIGHTS[0]])
        for weights in WEIGHTS:
            rows = [row for row in here if row["weights"] == weights]
            cells = [_cell([row[cell] for row in rows], dense) for cell in CELLS]
            lines.append(f"| ResNet-{depth} | {weights} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(values: Sequence[float], dense: float) -> str:
    mean = _mean(values)
    each = "" if len(set(values)) == 1 else "; " + ", ".join(f"{100 * v:.2f}" for v in values)
    return f"{100 * mean:.2f} ({100 * (mean - dense):+.2f}{each})"


def command(args: argparse.Namespace) -> str:
    """Reproduces the figures, wherever its files go."""
    words = ["python examples/cifar10_quantize.py"]
    words += [f"--depth {depth}" for depth in args.depth or ()]
    for name in ("epochs", "lr", "qat_epochs", "qat_lr", "batch_size", "seeds", "recipe"):
        if getattr(args, name) != parser().get_default(name):
            words.append(f"--{name.replace('_', '-')} {getattr(args, name)}")
    flags = ("bf16", "learned_scales", "short")
    words += [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag)]
    return " ".join(words)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("runs/quantize"), help="folder for everything made")
    add("--depth", type=int, choices=(20, 56), action="append", help="default 20; repeatable")
    add("--seeds", type=int, default=3, help="trainings of each network")
    add("--epochs", type=int, default=10, help="of the pruned network")
    add("--lr", type=float, default=0.02, help="of the pruned network")
    add("--qat-epochs", type=int, default=10)
    add("--qat-lr", type=float, default=0.01)
    add("--batch-size", type=int, default=128)
    add("--recipe", choices=("fast", "balanced", "best"), default="balanced", help="of PTQ")
    add("--learned-scales", action="store_true", help="QAT trains the scales, too (LSQ)")
    add("--part", default="1/1", help="which share of the jobs this process does")
    add("--only", choices=("train", "judge"), help="one half, where it is quick")
    add("--device", default="cpu", help="cpu or cuda, for training")
    add("--trained-on", default="this machine", help="what the table says of a split run")
    add("--bf16", action="store_true", help="train under bfloat16 autocast")
    add("--table", type=Path, help="write the table here as markdown, and as .json beside it")
    add("--short", action="store_true", help="a few hundred images, one epoch; proves nothing")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    args, out = parser().parse_args(arguments), Output()
    try:
        run(args, out)
    except Error as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""ResNet-20 on CIFAR-10: prune 2:4, fine-tune, quantize, export, compile, prove.

    python examples/cifar10_resnet20.py --bf16                  # both patterns: about 40 minutes
    python examples/cifar10_resnet20.py --bf16 --pattern 2:4
    python examples/cifar10_resnet20.py --short                 # under a minute, proves nothing

For each pattern: the published network is pruned (all convolutions but the first) and fine-tuned
with the masks held and its dense self as teacher; exported to ONNX; calibrated on training images
and quantized; checked to be still 2:4 in the file; and built. Then all networks are evaluated on
the test images and timed in one race beside PyTorch, ONNX Runtime and OpenVINO. The exit code is 1
if one of our sparse engines lost more than half a point of top-1, or is not faster than ONNX
Runtime.

The dataset and the published checkpoint are read from the folder that TWOFOUR_DATA names, by
default `../shared/data` beside the repository. A run that was stopped goes on where it was when it
is started again; what is finished and still up to date is not made again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cifar10.compress import build_stage, quantize_stage
from cifar10.data import Images, load_images
from cifar10.measure import PRECISIONS, judge, measure_stage
from cifar10.page import Result, document, page, write, write_json
from cifar10.settings import CALIBRATION, DENSE, DEPTH, EPOCHS, FOLDERS, LR, Settings
from cifar10.training import accuracy_stage, export_stage, finetune_stage

from twofour.bench.table import rich_table
from twofour.bench.timing import Schedule as Race
from twofour.cli.output import Output
from twofour.core.errors import Error, GateError, InputError
from twofour.core.patterns import Pattern
from twofour.train import Schedule

SUMMARY = "summary.json"


def run(settings: Settings, out: Output) -> Result:
    """Runs all stages.

    Raises:
        InputError: the data is missing, or a file belongs to another run.
        GateError: a weight lost its pattern on the way.
    """
    images = load_images(settings.short)
    training = {name: train(settings, name, images, out) for name in settings.patterns}
    export_stage(settings, settings.network(DENSE), images, out)
    for name in (DENSE, *settings.patterns):
        compress(settings, name, images, out)
    samples = images.samples()
    rows = measure_stage(settings, samples, out)
    verdicts = {} if settings.short else judge(rows, settings.patterns)
    return Result(len(samples.x), rows, training, verdicts)


def train(settings: Settings, pattern: str, images: Images, out: Output) -> dict[str, float]:
    """From the published network to a sparse one in an ONNX file; returns its accuracies."""
    network = settings.network(pattern)
    finetune_stage(settings, network, images, out)
    figures = accuracy_stage(settings, network, images, out)
    export_stage(settings, network, images, out)
    return figures


def compress(settings: Settings, name: str, images: Images, out: Output) -> None:
    """From one network's ONNX file to its engines."""
    network = settings.network(name)
    quantize_stage(settings, network, "int8", images, out)
    if name == settings.patterns[0]:  # the one that other engines run too
        quantize_stage(settings, network, "uint8", images, out)
    for kind in PRECISIONS:
        build_stage(network, kind, out)


def report(settings: Settings, result: Result, table: Path | None, out: Output) -> None:
    """Writes and prints the table.

    Raises:
        GateError: the gate is shut.
    """
    summary = document(settings, result)
    write_json(settings.out / SUMMARY, summary)
    if table is not None:
        write(table, page(summary))
        write_json(table.with_suffix(".json"), summary)
    out.show(rich_table(summary["rows"], summary["baseline"], summary["title"]))
    if settings.short:
        out.show("a short run: no verdict")
    reasons = [f"{name}: {r}" for name, v in result.verdicts.items() for r in v.reasons]
    out.show(*reasons, f"left in {settings.out}")
    if not all(verdict.passed for verdict in result.verdicts.values()):
        raise GateError("the gate is shut", reasons, "fine-tune longer; read `twofour explain`")


def settings_from(args: argparse.Namespace) -> Settings:
    """Reads the options.

    Raises:
        InputError: an unknown pattern, or a number that means nothing.
    """
    known = tuple(name for name in FOLDERS if name != DENSE)
    patterns = known if args.pattern == "all" else (str(Pattern.parse(args.pattern)),)
    if not set(patterns) <= set(known):
        raise InputError(f"no {args.pattern} here", [f"expected all or one of {', '.join(known)}"])
    if min(args.epochs, args.batch_size, args.calibration) < 1:
        raise InputError("--epochs, --batch-size and --calibration must be at least 1")
    Race(duration_s=args.duration)  # refuses what cannot be measured, before hours of training
    schedule = Schedule(1 if args.short else args.epochs, args.lr, seed=args.seed, bf16=args.bf16)
    return Settings(
        args.out,
        args.depth,
        patterns,
        schedule,
        args.batch_size,
        args.calibration,
        args.duration,
        args.short,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("runs/cifar10"), help="folder for all files")
    add("--depth", type=int, choices=(20, 56), default=DEPTH)
    add("--pattern", default="all", help="2:4, 2:4/pair, or all (default)")
    add("--epochs", type=int, default=EPOCHS)
    add("--lr", type=float, default=LR)
    add("--batch-size", type=int, default=128)
    add("--seed", type=int, default=0, help="of the order and augmentation of training images")
    add("--bf16", action="store_true", help="train under bfloat16 autocast")
    add(
        "--calibration",
        type=int,
        default=CALIBRATION,
        help="training images for quantization",
    )
    add("--duration", type=float, default=20.0, help="timed seconds, shared by all rows")
    add("--table", type=Path, help="write the table here as markdown, and as .json beside it")
    add("--short", action="store_true", help="a few hundred images, one epoch")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    out = Output()
    try:
        settings = settings_from(args)
        report(settings, run(settings, out), args.table, out)
    except Error as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

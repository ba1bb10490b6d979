"""What sparsity costs the CIFAR-10 ResNets, and what brings the accuracy back.

    python examples/cifar10_recovery.py --bf16                  # ResNet-20: some hours on two cores
    python examples/cifar10_recovery.py --device cuda --depth 20 --depth 56
    python examples/cifar10_recovery.py --only one-shot         # no training: minutes

For each pattern the published network is pruned everywhere but in the first convolution and the
last layer: in one shot, by each criterion, with and without channel permutation, before and after
BatchNorm statistics are estimated anew; and fine-tuned with the masks held and its dense self as
teacher, with several seeds. All figures are top-1 on the 10,000 test images.

Every job leaves a file in `--out`; a run that was stopped goes on with what is missing, and
`--part 1/4` does a quarter of the jobs, so that several processes can share the work. The dataset
and the published checkpoints are read from the folder that TWOFOUR_DATA names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cifar10.data import load_images
from cifar10.page import write, write_json
from cifar10.parts import share
from cifar10.recovery import PATTERNS, STARTS, Bench, Job, Options, jobs
from cifar10.recovery_page import document, page

from twofour.cli.output import Output
from twofour.core.errors import Error


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    out = Output()
    try:
        run(args, out)
    except Error as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def run(args: argparse.Namespace, out: Output) -> None:
    """Does the jobs of this part, and writes the tables when none is missing."""
    options = Options(
        args.epochs, args.lr, args.batch_size, args.ema, args.bf16, args.device, args.short
    )
    patterns = args.pattern or PATTERNS
    every = jobs(args.depth or [20], patterns, args.seeds, args.only, args.start)
    part, parts = share(args.part)
    todo = [job for job in every[part - 1 :: parts] if not job.file(args.out).is_file()]
    if todo:
        bench = Bench(options, load_images(args.short), out)
        for job in todo:
            write_json(job.file(args.out), bench.do(job))
    missing = [job for job in every if not job.file(args.out).is_file()]
    if missing:
        out.note(f"{len(missing)} jobs are left, such as {missing[0].name}: no table yet")
        return
    finish(args, every, out)


def finish(args: argparse.Namespace, every: list[Job], out: Output) -> None:
    """Puts the results of all jobs into one document, and prints it."""
    summary = document([job.read(args.out) for job in every], command(args))
    write_json(args.out / "summary.json", summary)
    text = page(summary)
    if args.table is not None:
        write(args.table, text)
        write_json(args.table.with_suffix(".json"), summary)
    print(text)
    out.note(f"left in {args.out}")


def command(args: argparse.Namespace) -> str:
    """Reproduces the figures, wherever its files go."""
    words = ["python examples/cifar10_recovery.py"]
    words += [f"--depth {depth}" for depth in args.depth or ()]
    words += [f"--pattern {pattern}" for pattern in args.pattern or ()]
    for name in ("start", "epochs", "lr", "ema", "batch_size", "seeds", "only", "device"):
        if getattr(args, name) != parser().get_default(name):
            words.append(f"--{name.replace('_', '-')} {getattr(args, name)}")
    words += [f"--{flag}" for flag in ("bf16", "short") if getattr(args, flag)]
    return " ".join(words)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("runs/recovery"), help="folder for the jobs' files")
    add("--depth", type=int, choices=(20, 56), action="append", help="default 20; repeatable")
    add("--pattern", choices=PATTERNS, action="append", help="default all; repeatable")
    add("--only", choices=("one-shot", "tuned"), help="without training, or with it alone")
    add("--start", choices=tuple(STARTS), default="magnitude", help="of what is fine-tuned")
    add("--epochs", type=int, default=10)
    add("--lr", type=float, default=0.02)
    add("--batch-size", type=int, default=128)
    add("--ema", type=float, default=0.0, help="decay of an average of the weights, which counts")
    add("--seeds", type=int, default=3, help="fine-tunings of each network")
    add("--device", default="cpu", help="cpu or cuda")
    add("--bf16", action="store_true", help="train under bfloat16 autocast")
    add("--part", default="1/1", help="which share of the jobs this process does")
    add("--table", type=Path, help="write the tables here as markdown, and as .json beside it")
    add("--short", action="store_true", help="a few hundred images, one epoch; proves nothing")
    return made


if __name__ == "__main__":
    sys.exit(main())

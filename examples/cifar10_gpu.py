"""A CIFAR-10 ResNet from its published weights to 2:4 INT8, on a GPU in minutes.

    python examples/cifar10_gpu.py --device cuda --amp --table benchmarks/cifar10_gpu.md
    python examples/cifar10_gpu.py --short     # on a CPU in a minute, proves nothing

The published network (ResNet-56) is pruned to 2:4 in one shot, all convolutions but the first;
fine-tuned with the masks held and its dense self as teacher; and trained on with fake quantizers.
`--amp` runs forward passes in half precision: bf16, or `--amp fp16` with scaled gradients. Images
lie on the device as bytes and are shifted and mirrored there. At the end the network is exported
from the device and the file checked: its patterns, and what it says of some test images beside
PyTorch. The exit code is 1 if more than `--max-drop` points of top-1 are lost.

The dataset and the published checkpoints are read from the folder that TWOFOUR_DATA names.
"""

from __future__ import annotations

import argparse
import copy
import platform
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from cifar10.data import INPUT, AugmentedEpoch, Images, load_images, load_model
from cifar10.page import write, write_json
from cifar10.resume import versions
from cifar10.settings import DENSE_LAYERS
from torch import nn

from twofour.cli.output import Output
from twofour.core.errors import Error, GateError, InputError
from twofour.core.target import detect_host
from twofour.core.version import __version__
from twofour.train import (
    Distiller,
    Progress,
    Quantizer,
    Schedule,
    Sparsifier,
    evaluate,
    export_onnx,
    finetune,
)

CALIBRATION, CALIBRATION_BATCH, COMPARED = 512, 128, 256
TEST_BATCH = 1000


@dataclass
class Run:
    """The data on a device, and what came of each stage.

    Attributes:
        args: of the command line.
        images: on the device.
        out: told of progress.
        stages: name -> figures, in the order they were done.
    """

    args: argparse.Namespace
    images: Images
    out: Output
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def all(self) -> None:
        """From the published network to the exported one."""
        args = self.args
        began = time.monotonic()
        dense = load_model(args.depth).to(args.device)
        self._note("dense", dense, began)
        model = copy.deepcopy(dense)
        began = time.monotonic()
        sparsifier = Sparsifier(model, "2:4", exclude=DENSE_LAYERS).prune()
        self._note("2:4, one shot", model, began)
        self._trained("2:4, fine-tuned", model, (dense, sparsifier), (args.epochs, args.lr))
        self._exported("24.onnx", model)
        quantizer = Quantizer(model, self._calibration()[0]).calibrate(self._calibration())
        self._note("2:4 INT8, calibrated", model, time.monotonic())
        self._trained(
            "2:4 INT8, trained", model, (dense, sparsifier), (args.qat_epochs, args.qat_lr)
        )
        quantizer.verify()
        self._exported("qat.onnx", model)

    def _trained(
        self,
        name: str,
        model: nn.Module,
        held: tuple[nn.Module, Sparsifier],
        how: tuple[int, float],
    ) -> None:
        began, (teacher, sparsifier), (epochs, lr) = time.monotonic(), held, how
        amp = {} if self.args.amp is None else {self.args.amp: True}
        schedule = Schedule(epochs, lr, warmup=0.02, seed=self.args.seed, **amp)

        def batches(epoch: int) -> AugmentedEpoch:
            return AugmentedEpoch(self.images, self.args.batch_size, self.args.seed * 1000 + epoch)

        with self.out.stage(name) as report:

            def shown(at: Progress) -> None:
                report(at.epoch * at.batches + at.batch, epochs * at.batches, f"loss {at.loss:.3f}")

            with Distiller(model, copy.deepcopy(teacher)) as loss:
                finetune(model, batches, schedule, method=sparsifier, loss=loss, progress=shown)
        steps = epochs * len(batches(0))
        self._note(name, model, began, epochs=epochs, steps=steps)

    def _exported(self, name: str, model: nn.Module) -> None:
        """Writes the file, and compares it with the model."""
        began = time.monotonic()
        path = self.args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        x = self.images.normalised(self.images.test_x[:COMPARED])
        held = Counter(export_onnx(model, x[:2], path).values())
        with torch.no_grad():
            wanted = model(x).cpu().numpy()
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {INPUT: np.ascontiguousarray(x.cpu().numpy())})
        self.stages[name] = {
            "patterns": dict(held),
            "same_class": float((got.argmax(1) == wanted.argmax(1)).mean()),
            "images": len(x),
            "seconds": round(time.monotonic() - began, 1),
        }

    def _calibration(self) -> list[torch.Tensor]:
        images = self.images.train_x[:CALIBRATION].split(CALIBRATION_BATCH)
        return [self.images.normalised(each) for each in images]

    def _note(self, name: str, model: nn.Module, began: float, **more: Any) -> None:
        seconds = time.monotonic() - began
        images, labels = self.images.test_x, self.images.test_y
        hits = [
            evaluate(model, self.images.normalised(x), y, TEST_BATCH) * len(x)
            for x, y in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True)
        ]
        top1 = sum(hits) / len(images)
        self.stages[name] = {"top1": top1, "seconds": round(seconds, 1), **more}
        self.out.note(f"{name}: top-1 {top1:.2%}, {seconds:.1f} s")


def document(run: Run, seconds: float) -> dict[str, Any]:
    """Everything that was found, as plain data."""
    args, host = run.args, detect_host()
    gpu = [torch.cuda.get_device_name()] if args.device == "cuda" else []
    return {
        "title": f"ResNet-{args.depth} on CIFAR-10: 2:4 and INT8, trained in minutes",
        "command": args.command,
        "version": __version__,
        "device": [*gpu, f"{host.model}, {host.cores} cores"],
        "tools": {"python": platform.python_version(), **versions(("torch", "numpy"))},
        "train_images": len(run.images.train_x),
        "test_images": len(run.images.test_x),
        "amp": args.amp or "none",
        "stages": run.stages,
        "minutes": round(seconds / 60, 2),
    }


def page(found: dict[str, Any]) -> str:
    """The document as markdown."""
    lines = [
        f"# {found['title']}",
        "",
        f"    {found['command']}",
        "",
        f"Run on: {', '.join(found['device'])}; twofour {found['version']}, "
        f"torch {found['tools'].get('torch', '?')}.",
        "",
        f"{found['train_images']:,} training images, {found['test_images']:,} test images, "
        f"half precision: {found['amp']}. {found['minutes']:.2f} minutes for all, reading the "
        "images included.",
        "",
        "| network | top-1 | against dense | epochs | steps | seconds |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    dense = found["stages"]["dense"]["top1"]
    for name, stage in found["stages"].items():
        if "top1" not in stage:
            continue
        figures = [f"{100 * stage['top1']:.2f} %", f"{100 * (stage['top1'] - dense):+.2f}"]
        rest = [str(stage.get(key, "")) for key in ("epochs", "steps", "seconds")]
        lines.append(f"| {name} | {' | '.join([*figures, *rest])} |")
    lines.append("")
    for name, made in found["stages"].items():
        if "patterns" not in made:
            continue
        held = ", ".join(f"{n} weights {pattern}" for pattern, n in made["patterns"].items())
        lines.append(
            f"- `{name}`, exported in {made['seconds']} s: {held}; gives "
            f"{100 * made['same_class']:.1f} % of {made['images']} test images the class that "
            "PyTorch does."
        )
    return "\n".join([*lines, ""])


def prepared(args: argparse.Namespace) -> Images:
    """The images on the device.

    Raises:
        InputError: there is no such device, or the data is missing.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        fix = "leave --device out, or install PyTorch for CUDA"
        raise InputError("--device cuda: PyTorch has no GPU here", fix=fix)
    images = load_images(args.short)
    if args.samples is not None:
        count = args.samples
        cut = {f.name: getattr(images, f.name) for f in fields(images)}
        cut |= {name: cut[name][:count] for name in ("train_x", "train_y", "test_x", "test_y")}
        images = Images(**cut)
    return images.to(args.device)


def _command(words: list[str]) -> str:
    """As it was called, but for where it writes."""
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not {before, word} & {"--out", "--table"}
    ]
    return f"python examples/cifar10_gpu.py {shlex.join(kept)}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    args, out = parser().parse_args(arguments), Output()
    args.command = _command(sys.argv[1:] if arguments is None else arguments)
    began = time.monotonic()
    try:
        run = Run(args, prepared(args), out)
        run.all()
        found = document(run, time.monotonic() - began)
        write_json(args.out / "summary.json", found)
        if args.table is not None:
            write(args.table, page(found))
            write_json(args.table.with_suffix(".json"), found)
        print(page(found))
        lost = run.stages["dense"]["top1"] - run.stages["2:4 INT8, trained"]["top1"]
        if 100 * lost > args.max_drop and not args.short:
            reasons = [f"expected at most {args.max_drop:g} points, lost {100 * lost:.2f}"]
            raise GateError("too much accuracy was lost", reasons, "train for more epochs")
    except Error as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="folder for what is made")
    add("--depth", type=int, choices=(20, 56), default=56)
    add("--epochs", type=int, default=20, help="of the pruned network")
    add("--lr", type=float, default=0.04)
    add("--qat-epochs", type=int, default=8)
    add("--qat-lr", type=float, default=0.01)
    add("--batch-size", type=int, default=256)
    add("--samples", type=int, help="so many images at most, of training and of test")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--amp", nargs="?", const="bf16", choices=("bf16", "fp16"), help="half precision")
    add("--max-drop", type=float, default=1.0, help="points of top-1 that may be lost")
    add("--table", type=Path, help="write the table here as markdown, and as .json beside it")
    add("--short", action="store_true", help="a few hundred images; proves nothing")
    return made


if __name__ == "__main__":
    sys.exit(main())

"""ResNet-20 on CIFAR-10: prune 2:4, fine-tune with the masks held, export to ONNX.

    python examples/cifar10_resnet20.py --out runs/cifar10
    python examples/cifar10_resnet20.py --out runs/pair --pattern 2:4/pair
    python examples/cifar10_resnet20.py --out runs/short --short       # seconds, proves nothing

The dataset and the published checkpoint are read from the folder that TWOFOUR_DATA names, by
default `../shared/data` beside the repository. A run that was stopped goes on where it was when it
is started again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor, nn

from twofour.core.errors import Error, InputError
from twofour.core.patterns import Pattern
from twofour.train import Progress as TrainingProgress
from twofour.train import (
    Schedule,
    Sparsifier,
    evaluate,
    export_onnx,
    finetune,
    load_checkpoint,
)

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKPOINT = "finetune.pt"
ONNX = "model.onnx"
PAD = 4
console = Console()


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    out: Path
    depth: int
    pattern: str
    schedule: Schedule
    batch_size: int
    short: bool


@dataclass(frozen=True)
class Images:
    """CIFAR-10 as uint8 [S, 32, 32, 3] with labels [S], and what the checkpoints expect."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor

    def normalised(self, x: Tensor) -> Tensor:
        """uint8 [B, 32, 32, 3] -> float32 [B, 3, 32, 32] in channels-last memory."""
        return ((x.float() / 255.0 - self.mean) / self.std).permute(0, 3, 1, 2)


class AugmentedEpoch:
    """One pass over the training images: shuffled, shifted by up to 4 pixels, half mirrored.

    Args:
        images: the data.
        batch_size: images in a batch; the last batch may be smaller.
        seed: decides order, shifts and mirrors; equal seeds give equal batches.
    """

    def __init__(self, images: Images, batch_size: int, seed: int) -> None:
        """Draws the randomness of the whole epoch."""
        self.images = images
        self.batch_size = batch_size
        count = len(images.train_x)
        random = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(count, generator=random)
        self.shift = torch.randint(0, 2 * PAD + 1, (2, count), generator=random)
        self.mirror = torch.rand(count, generator=random) < 0.5
        self.padded = nn.functional.pad(images.train_x, (0, 0, PAD, PAD, PAD, PAD))

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (x float32 [B, 3, 32, 32], labels int64 [B])."""
        size = self.images.train_x.shape[1]
        along = torch.arange(size)
        for chosen in self.order.split(self.batch_size):
            rows = self.shift[0, chosen, None] + along
            columns = torch.where(self.mirror[chosen, None], along.flip(0), along)
            columns = columns + self.shift[1, chosen, None]
            x = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield self.images.normalised(x), self.images.train_y[chosen]


def data_folder() -> Path:
    """The folder with the dataset and the checkpoints.

    Raises:
        InputError: it is not there.
    """
    root = Path(os.environ.get("TWOFOUR_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / "cifar10"
    needed = ("load_cifar10.py", "resnet_cifar.py", "cifar10_train.tar", "cifar10_test.tar")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"no CIFAR-10 data in {folder}",
            ["missing: " + ", ".join(missing)],
            "set TWOFOUR_DATA to the folder that holds cifar10/",
        )
    return folder


def imported(path: Path) -> ModuleType:
    """The Python file at this path as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_images(short: bool) -> Images:
    """Reads the dataset; a short run trains on 256 test images and evaluates on 300 others."""
    loader = imported(data_folder() / "load_cifar10.py")
    test_x, test_y = (torch.from_numpy(a) for a in loader.load("test"))
    if short:
        train_x, train_y = test_x[:256], test_y[:256]
        test_x, test_y = test_x[256:556], test_y[256:556]
    else:
        train_x, train_y = (torch.from_numpy(a) for a in loader.load("train"))
    return Images(
        train_x,
        train_y.long(),
        test_x,
        test_y.long(),
        torch.tensor(loader.MEAN),
        torch.tensor(loader.STD),
    )


def load_model(depth: int) -> nn.Module:
    """The published ResNet, in eval mode and channels-last memory."""
    folder = data_folder()
    weights = folder / f"resnet{depth}.safetensors"
    if not weights.is_file():
        raise InputError(f"no checkpoint {weights}", fix="choose --depth 20 or 56")
    model: nn.Module = imported(folder / "resnet_cifar.py").build(depth)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise InputError(f"{weights} does not fit the model", [f"{missing} {unexpected}"])
    return model.eval().to(memory_format=torch.channels_last)


def pruned_model(settings: Settings) -> tuple[nn.Module, Sparsifier]:
    """The published model, every convolution but the first pruned in one shot."""
    model = load_model(settings.depth)
    sparsifier = Sparsifier(model, settings.pattern, exclude=["conv1", "linear"])
    return model, sparsifier.prune()


def finetuned_model(settings: Settings) -> nn.Module:
    """What `finetune_stage` left behind."""
    model, sparsifier = pruned_model(settings)
    load_checkpoint(settings.out / CHECKPOINT, model)
    sparsifier.verify()
    return model


def finetune_stage(settings: Settings, images: Images) -> dict[str, float]:
    """Prunes, then trains with the masks held; leaves the checkpoint `finetune.pt`."""
    test_x = images.normalised(images.test_x)
    model, sparsifier = pruned_model(settings)
    top1 = {
        "top1_dense_f32": evaluate(load_model(settings.depth), test_x, images.test_y),
        "top1_one_shot_f32": evaluate(model, test_x, images.test_y),
    }
    console.print(top1)
    seed = settings.schedule.seed

    def batches(epoch: int) -> AugmentedEpoch:
        return AugmentedEpoch(images, settings.batch_size, seed * 1000 + epoch)

    with progress_bar() as bar:
        finetune(
            model,
            batches,
            settings.schedule,
            sparsifier,
            settings.out / CHECKPOINT,
            training_display(bar, settings.schedule.epochs),
        )
    top1["top1_sparse_f32"] = evaluate(model, test_x, images.test_y)
    return top1


def export_stage(settings: Settings, images: Images) -> dict[str, float]:
    """Writes `model.onnx`: float32, the masks' zeros in the weights, batch size open."""
    model = finetuned_model(settings)
    checked = export_onnx(model, images.normalised(images.test_x[:1]), settings.out / ONNX)
    held = ", ".join(f"{n} weights {name}" for name, n in Counter(checked.values()).items())
    console.print(f"{settings.out / ONNX}: {held}")
    return {"sparse_weights": len(checked)}


# The stages, in order. Each takes (settings, images), reads what earlier ones left in
# `settings.out`, leaves its own files there, and returns figures for `summary.json`.
STAGES: tuple[Callable[[Settings, Images], dict[str, float]], ...] = (
    finetune_stage,
    export_stage,
)


def progress_bar() -> Progress:
    """A bar with a count and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def training_display(bar: Progress, epochs: int) -> Callable[[TrainingProgress], None]:
    """A callback that moves the bar after each batch and prints a line after each epoch."""
    task = bar.add_task("fine-tune", total=None)

    def show(at: TrainingProgress) -> None:
        done = at.epoch * at.batches + at.batch
        bar.update(task, completed=done, total=epochs * at.batches)
        if at.batch == at.batches:
            bar.console.print(
                f"epoch {at.epoch + 1}/{epochs}  loss {at.loss:.4f}  train top-1 {at.accuracy:.4f}"
            )

    return show


def run(settings: Settings) -> dict[str, float]:
    """Runs all stages and writes `summary.json`."""
    Pattern.parse(settings.pattern)
    images = load_images(settings.short)
    settings.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, float] = {}
    for stage in STAGES:
        summary.update(stage(settings, images))
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(summary)
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_resnet20"))
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20)
    parser.add_argument("--pattern", default="2:4", help="2:4 or 2:4/pair")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--short", action="store_true", help="a few hundred images, one epoch")
    args = parser.parse_args(arguments)
    epochs = 1 if args.short else args.epochs
    schedule = Schedule(epochs, args.lr, seed=args.seed, bf16=args.bf16)
    settings = Settings(args.out, args.depth, args.pattern, schedule, args.batch_size, args.short)
    try:
        run(settings)
    except Error as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

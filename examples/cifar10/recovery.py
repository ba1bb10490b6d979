"""The jobs of `cifar10_recovery.py`: one network pruned in one way, and its top-1."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.data import AugmentedEpoch, Images, load_model
from cifar10.settings import DENSE_LAYERS
from twofour.cli.output import Output
from twofour.train import (
    Distiller,
    Progress,
    Schedule,
    Sgd,
    Sparsifier,
    evaluate,
    finetune,
    permute,
    reestimate_batchnorm,
)

DENSE = "dense"
PATTERNS = ("2:4", "4:8", "2:4/pair")
CRITERIA = ("magnitude", "wanda", "taylor", "sparsegpt")
STARTS = {"magnitude": ("magnitude", False), "sparsegpt": ("sparsegpt", True)}
"""Before fine-tuning: the criterion, and whether channels are permuted first."""
CALIBRATION, CALIBRATION_BATCH = 1024, 128
"""Training images without augmentation, for criteria."""
STATISTICS_BATCHES = 32
"""Batches of augmented training images, for BatchNorm statistics."""


@dataclass(frozen=True)
class Options:
    """What all jobs share.

    Attributes:
        epochs: of fine-tuning.
        lr: its highest rate.
        batch_size: of fine-tuning.
        ema: decay of an average of the weights, which is what is judged; 0 for none.
        bf16: whether it runs under autocast.
        device: where everything runs.
        short: one epoch, to try the script.
    """

    epochs: int
    lr: float
    batch_size: int
    ema: float
    bf16: bool
    device: str
    short: bool


@dataclass(frozen=True)
class Job:
    """One network, pruned in one way.

    Attributes:
        depth: of the ResNet.
        pattern: of its weights, or "dense".
        criterion: that chooses the masks.
        permuted: whether channels are put into a better order first.
        seed: of fine-tuning; None for one shot.
    """

    depth: int
    pattern: str
    criterion: str = "magnitude"
    permuted: bool = False
    seed: int | None = None

    @property
    def name(self) -> str:
        """In one word."""
        words = [f"resnet{self.depth}", self.pattern, self.criterion]
        words += ["permuted"] if self.permuted else []
        words += [] if self.seed is None else [f"seed{self.seed}"]
        return "-".join(re.sub(r"\W+", "_", word) for word in words)

    def file(self, folder: Path) -> Path:
        """Where its result is left."""
        return folder / f"{self.name}.json"

    def read(self, folder: Path) -> dict[str, Any]:
        """The result."""
        content: dict[str, Any] = json.loads(self.file(folder).read_text())
        return content


def jobs(
    depths: Sequence[int], patterns: Sequence[str], seeds: int, only: str | None, start: str
) -> list[Job]:
    """All jobs, the long ones first so that parts end together.

    Args:
        depths: of the networks.
        patterns: of their weights.
        seeds: fine-tunings of each.
        only: "one-shot" or "tuned"; None for both.
        start: how networks are pruned that are fine-tuned; a key of `STARTS`.
    """
    tuned = [
        job
        for depth in sorted(depths, reverse=True)
        for seed in range(seeds)
        for job in (
            *(Job(depth, pattern, *STARTS[start], seed) for pattern in patterns),
            Job(depth, DENSE, seed=seed),
        )
    ]
    one_shot = [
        Job(depth, pattern, criterion, permuted)
        for depth in depths
        for pattern in patterns
        for criterion in CRITERIA
        for permuted in (False, True)
    ]
    dense = [Job(depth, DENSE) for depth in depths]
    return [*([] if only == "one-shot" else tuned), *([] if only == "tuned" else one_shot), *dense]


class Bench:
    """The data on a device, and what is done with it."""

    def __init__(self, options: Options, images: Images, out: Output) -> None:
        """Moves the images to the device."""
        self.options, self.out = options, out
        self.images = images.to(options.device)
        self.test_x = self.images.normalised(self.images.test_x)
        count = min(CALIBRATION, len(images.train_x))
        self.calibration = [
            (self.images.normalised(x), y)
            for x, y in zip(
                self.images.train_x[:count].split(CALIBRATION_BATCH),
                self.images.train_y[:count].split(CALIBRATION_BATCH),
                strict=True,
            )
        ]
        augmented = AugmentedEpoch(self.images, CALIBRATION_BATCH, 0)
        self.augmented = list(islice(augmented, STATISTICS_BATCHES))

    def do(self, job: Job) -> dict[str, Any]:
        """The job's figures, with times in seconds."""
        begin_s = time.monotonic()
        with self.out.stage(job.name) as report:
            if job.pattern == DENSE and job.seed is None:
                figures: dict[str, Any] = {"top1": self._top1(self._model(job.depth))}
            elif job.seed is None:
                figures = self._one_shot(job)
            else:
                figures = self._tuned(job, job.seed, report)
        figures["seconds"] = round(time.monotonic() - begin_s, 1)
        self.out.note(f"{job.name}: {figures}")
        machine = torch.cuda.get_device_name() if self.options.device == "cuda" else "cpu"
        facts = {"options": asdict(self.options), "device": machine, "torch": torch.__version__}
        return {**asdict(job), **figures, **facts}

    def _one_shot(self, job: Job) -> dict[str, Any]:
        model = self._model(job.depth)
        sparsifier = self._pruned(model, job)
        top1 = self._top1(model)
        reestimate_batchnorm(model, self.augmented)
        sparsifier.verify()
        return {"top1": top1, "top1_batchnorm": self._top1(model)}

    def _tuned(self, job: Job, seed: int, report: Any) -> dict[str, Any]:
        teacher = self._model(job.depth)
        model = copy.deepcopy(teacher)
        sparsifier = None if job.pattern == DENSE else self._pruned(model, job)
        options = self.options
        epochs = 1 if options.short else options.epochs
        schedule = Schedule(
            epochs, options.lr, optimizer=Sgd(), ema=options.ema, seed=seed, bf16=options.bf16
        )

        def shown(at: Progress) -> None:
            report(at.epoch * at.batches + at.batch, epochs * at.batches, f"loss {at.loss:.3f}")

        def batches(epoch: int) -> AugmentedEpoch:
            return AugmentedEpoch(self.images, options.batch_size, seed * 1000 + epoch)

        with Distiller(model, teacher) as loss:
            finetune(model, batches, schedule, method=sparsifier, loss=loss, progress=shown)
        return {"top1": self._top1(model)}

    def _pruned(self, model: nn.Module, job: Job) -> Sparsifier:
        if job.permuted:
            permute(model, (self.test_x[:2],), job.pattern, exclude=DENSE_LAYERS)
        sparsifier = Sparsifier(model, job.pattern, job.criterion, exclude=DENSE_LAYERS)
        if job.criterion == "magnitude":
            return sparsifier.prune()
        loss = _cross_entropy if job.criterion == "taylor" else None
        return sparsifier.prune(self.calibration, loss=loss)

    def _model(self, depth: int) -> nn.Module:
        return load_model(depth).to(self.options.device)

    def _top1(self, model: nn.Module) -> float:
        return evaluate(model, self.test_x, self.images.test_y)


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    return nn.functional.cross_entropy(model(x), labels)

"""The cells of `cifar10_quantize.py`: a ResNet, dense or 2:4, in float32, after PTQ and after QAT.

published network --[prune, fine-tune]--> f32.onnx --[calibrate]--> ptq.onnx
`--[prune, fine-tune]--> fake-quantized --[fine-tune]--> qat.onnx
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cifar10.data import INPUT, AugmentedEpoch, Images, load_model
from cifar10.settings import DENSE, DENSE_LAYERS, FOLDERS
from twofour.cli.output import Output
from twofour.compiler.build import build
from twofour.compiler.importer import standardized
from twofour.core.errors import GateError
from twofour.core.progress import Report
from twofour.onnx_tools.inspect import verify_pattern
from twofour.onnx_tools.load import load_model as load_onnx
from twofour.onnx_tools.load import save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session
from twofour.train import (
    Distiller,
    Progress,
    Quantizer,
    QuantizerOptions,
    Schedule,
    Sparsifier,
    export_onnx,
    finetune,
    load_checkpoint,
)

WEIGHTS = (DENSE, "2:4")
CELLS = ("f32", "ptq", "qat")
CALIBRATION, CALIBRATION_BATCH = 512, 64


@dataclass(frozen=True)
class Options:
    """What all cells share.

    Attributes:
        tuning: of the pruned network.
        qat: of the fake-quantized one.
        batch_size: of both.
        recipe: of `twofour quantize`.
        learned_scales: whether QAT trains scales, too.
        device: where training runs.
    """

    tuning: Schedule
    qat: Schedule
    batch_size: int
    recipe: str
    learned_scales: bool
    device: str


@dataclass(frozen=True)
class Job:
    """One network.

    Attributes:
        depth: of the ResNet.
        weights: "dense" or "2:4".
        seed: of the training.
    """

    depth: int
    weights: str
    seed: int

    @property
    def name(self) -> str:
        """In words."""
        return f"ResNet-{self.depth} {self.weights}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Where its files are."""
        return out / f"resnet{self.depth}-{FOLDERS[self.weights]}-seed{self.seed}"


class Bench:
    """The data, and what is done with it."""

    def __init__(self, options: Options, images: Images, out: Output) -> None:
        """Moves the images to the device."""
        self.options, self.out = options, out
        self.images = images.to(options.device)
        self.example = self.images.normalised(self.images.test_x[:2])

    def train(self, job: Job, folder: Path) -> None:
        """Leaves `finetune.pt` of a pruned network, and `qat.pt`."""
        folder.mkdir(parents=True, exist_ok=True)
        teacher = self._published(job)
        model, sparsifier = self._network(job, folder)
        if sparsifier is not None:
            schedule = self.options.tuning
            self._finetune(job, model, teacher, sparsifier, (schedule, folder / "finetune.pt"))
        self._quantized(model)
        self._finetune(job, model, teacher, sparsifier, (self.options.qat, folder / "qat.pt"))
        if sparsifier is not None:
            sparsifier.verify()

    def judge(self, job: Job, folder: Path) -> dict[str, float]:
        """Exports, quantizes and builds; top-1 of each cell's engine on the test images."""
        model, sparsifier = self._network(job, folder)
        if sparsifier is not None:
            load_checkpoint(folder / "finetune.pt", model)
        floats, ptq, qat = (folder / f"{cell}.onnx" for cell in CELLS)
        export_onnx(model, self.example, floats)
        options = QuantizeOptions(recipe=self.options.recipe)
        data = {INPUT: self.images.calibration(CALIBRATION)}
        save_model(quantize(standardized(load_onnx(floats)), data, options), ptq)
        self._quantized(model)
        load_checkpoint(folder / "qat.pt", model)
        export_onnx(model, self.example, qat)
        return {cell: self._top1(job, folder / f"{cell}.onnx") for cell in CELLS}

    def _network(self, job: Job, folder: Path) -> tuple[nn.Module, Sparsifier | None]:
        """The published network, pruned if the job says so."""
        model = self._published(job)
        if job.weights == DENSE:
            return model, None
        return model, Sparsifier(model, job.weights, exclude=DENSE_LAYERS).prune()

    def _published(self, job: Job) -> nn.Module:
        return load_model(job.depth).to(self.options.device)

    def _quantized(self, model: nn.Module) -> Quantizer:
        """Fake quantizers put in, their scales from training images."""
        options = QuantizerOptions(learned_scales=self.options.learned_scales)
        images = self.images.train_x[:CALIBRATION].split(CALIBRATION_BATCH)
        batches = [self.images.normalised(x) for x in images]
        return Quantizer(model, self.example, options).calibrate(batches)

    def _finetune(
        self,
        job: Job,
        model: nn.Module,
        teacher: nn.Module,
        sparsifier: Sparsifier | None,
        how: tuple[Schedule, Path],
    ) -> None:
        schedule, checkpoint = how

        def batches(epoch: int) -> AugmentedEpoch:
            return AugmentedEpoch(self.images, self.options.batch_size, job.seed * 1000 + epoch)

        with self.out.stage(f"{job.name}: {checkpoint.stem}") as report:
            with Distiller(model, copy.deepcopy(teacher)) as loss:
                finetune(
                    model,
                    batches,
                    schedule,
                    method=sparsifier,
                    loss=loss,
                    checkpoint=checkpoint,
                    progress=_shown(report, schedule.epochs),
                )

    def _top1(self, job: Job, path: Path) -> float:
        """Of the engine that is built from a file, whose patterns are checked first."""
        if job.weights != DENSE:
            lost = verify_pattern(load_onnx(path), job.weights, DENSE_LAYERS)
            if lost:
                raise GateError(f"{path} is not {job.weights}", lost)
        samples = self.images.to("cpu").samples()
        with self.out.stage(f"{job.name}: {path.stem}") as report:
            session = Session(build(path, progress=report, tuning_effort=0, race=False))
            hits = 0
            for i, label in enumerate(samples.labels):
                (logits,) = session.run({INPUT: samples.x[i : i + 1]}).values()
                hits += int(logits.argmax() == label)
        return hits / len(samples.labels)


def _shown(report: Report, epochs: int) -> Callable[[Progress], None]:
    def show(at: Progress) -> None:
        report(at.epoch * at.batches + at.batch, epochs * at.batches, f"loss {at.loss:.3f}")

    return show


def facts(job: Job, cells: dict[str, float]) -> dict[str, Any]:
    """A job's result, as its file has it."""
    return {"depth": job.depth, "weights": job.weights, "seed": job.seed, **cells}

"""The PyTorch half: prune in one shot, fine-tune with the masks held, export."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

from torch import nn

from cifar10.data import AugmentedEpoch, Images, load_model
from cifar10.resume import once
from cifar10.settings import DENSE_LAYERS, Network, Settings
from twofour.cli.output import Output
from twofour.core.progress import Report
from twofour.train import (
    Distiller,
    Progress,
    Sparsifier,
    evaluate,
    export_onnx,
    finetune,
    load_checkpoint,
)


def pruned_model(settings: Settings, pattern: str) -> tuple[nn.Module, Sparsifier]:
    """The published model, every convolution but the first pruned in one shot."""
    model = load_model(settings.depth)
    sparsifier = Sparsifier(model, pattern, exclude=DENSE_LAYERS)
    return model, sparsifier.prune()


def network_model(settings: Settings, network: Network) -> nn.Module:
    """The published model, or what `finetune_stage` made of it."""
    if not network.sparse:
        return load_model(settings.depth)
    model, sparsifier = pruned_model(settings, network.name)
    load_checkpoint(network.checkpoint, model)
    sparsifier.verify()
    return model.eval()


def finetune_stage(settings: Settings, network: Network, images: Images, out: Output) -> None:
    """Prunes, then trains with the masks held, the published network as teacher.

    Leaves the checkpoint; goes on after a stop.
    """
    model, sparsifier = pruned_model(settings, network.name)
    seed = settings.schedule.seed

    def batches(epoch: int) -> AugmentedEpoch:
        return AugmentedEpoch(images, settings.batch_size, seed * 1000 + epoch)

    with out.stage(f"{network.name}: fine-tune") as report:
        shown = _display(report, settings.schedule.epochs, out)
        finetune(
            model,
            batches,
            settings.schedule,
            method=sparsifier,
            loss=Distiller(model, load_model(settings.depth)),
            checkpoint=network.checkpoint,
            progress=shown,
        )


def accuracy_stage(
    settings: Settings, network: Network, images: Images, out: Output
) -> dict[str, float]:
    """Top-1 in PyTorch right after pruning and after fine-tuning; leaves `training.json`."""
    path = network.folder / "training.json"
    test_x = images.normalised(images.test_x)

    def make() -> None:
        pruned = pruned_model(settings, network.name)[0].eval()
        tuned = network_model(settings, network)
        figures = {
            "one_shot_top1": evaluate(pruned, test_x, images.test_y),
            "finetuned_top1": evaluate(tuned, test_x, images.test_y),
        }
        path.write_text(json.dumps(figures, indent=2) + "\n")

    with out.stage(f"{network.name}: evaluate in PyTorch"):
        once(path, [network.checkpoint], f"short {settings.short}", make)
    figures: dict[str, float] = json.loads(path.read_text())
    out.note(f"{network.name}: " + ", ".join(f"{k} {v:.2%}" for k, v in figures.items()))
    return figures


def export_stage(settings: Settings, network: Network, images: Images, out: Output) -> None:
    """Writes `f32.onnx`: the masks' zeros in the weights, batch size open, patterns checked."""
    path = network.onnx("f32")
    sources = [network.checkpoint] if network.sparse else []

    def make() -> None:
        model = network_model(settings, network)
        checked = export_onnx(model, images.normalised(images.test_x[:1]), path)
        held = ", ".join(f"{n} weights {name}" for name, n in Counter(checked.values()).items())
        out.note(f"{path.name}: {held or 'dense'}")

    with out.stage(f"{network.name}: export"):
        once(path, sources, f"depth {settings.depth}", make)


def _display(report: Report, epochs: int, out: Output) -> Callable[[Progress], None]:
    """Moves the bar after each batch and prints a line after each epoch."""

    def show(at: Progress) -> None:
        done = at.epoch * at.batches + at.batch
        so_far = f"loss {at.loss:.4f}, train top-1 {at.accuracy:.2%}"
        report(done, epochs * at.batches, so_far)
        if at.batch == at.batches:
            out.note(f"epoch {at.epoch + 1}/{epochs}: {so_far}")

    return show

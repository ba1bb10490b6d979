"""Estimates anew the statistics of BatchNorm layers, which pruning the layers before them moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from twofour.core.errors import InputError
from twofour.core.progress import Report, silent
from twofour.train.batches import forward as call
from twofour.train.calibration import (
    Batches,
    Forward,
    as_it_was,
    bare,
    batches_of,
    count_of,
)
from twofour.train.ranks import several, sum_over_ranks

_NAME = "BatchNorm re-estimation"


def reestimate_batchnorm(
    model: nn.Module,
    batches: Batches,
    forward: Forward = call,
    report: Report = silent,
) -> list[str]:
    """Replaces running means and variances by their averages over the batches.

    All BatchNorm layers normalize each batch by its own statistics meanwhile, everything else runs
    in eval mode. Every batch counts alike, so let them be of one size, 32 or more samples. They
    have to look as they did in training, with its augmentation: statistics of plain images cost
    a dense CIFAR-10 ResNet-20 that was trained on shifted ones more than 3 points of top-1.

    Modes, momentum and the state of the random generators stay as they were, and after an error
    the statistics too. Under `torch.distributed` each process brings its own batches, and all get
    the average over all of them.

    Args:
        model: changed in place.
        batches: of training data, augmented as in training; run through once, moved to the model's
            device.
        forward: runs the model on a batch.
        report: told of each batch.

    Returns:
        The names of the layers that have new statistics: those with running statistics that at
        least one batch went through. None where the model has no such layer.

    Raises:
        InputError: there are no batches, or new statistics are not finite.

    Source: Li et al. 2020, arXiv:2007.02491 (for pruned networks); Wu and Johnson 2021,
    arXiv:2105.07576, section 3 (averages over batches instead of moving ones).
    """
    model = bare(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)
    }
    if not layers:
        return []
    with as_it_was(model), torch.no_grad(), _averaging(layers):
        for index, batch in enumerate(batches_of(batches, model, _NAME)):
            forward(model, batch)
            report(index + 1, count_of(batches), f"{_NAME}: batch")
        for layer in layers.values():
            _average_over_ranks(layer)
        _require_finite(layers)
        return [name for name, layer in layers.items() if _seen(layer)]


def _seen(layer: nn.Module) -> int:
    """How many batches the statistics are of."""
    return int(layer.get_buffer("num_batches_tracked"))


@contextmanager
def _averaging(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """The layers average all they see inside; those that see nothing keep what they had."""
    momentum = {name: layer.momentum for name, layer in layers.items()}
    before = {n: [b.clone() for b in layer.buffers(recurse=False)] for n, layer in layers.items()}
    finished = False
    try:
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        yield
        finished = True
    finally:
        for name, layer in layers.items():
            layer.momentum = momentum[name]
            if not finished or not _seen(layer):
                for buffer, value in zip(layer.buffers(recurse=False), before[name], strict=True):
                    buffer.copy_(value)


def _average_over_ranks(layer: nn.Module) -> None:
    """The averages over all batches of all processes."""
    if not several():
        return
    statistics = [layer.get_buffer("running_mean"), layer.get_buffer("running_var")]
    count = layer.get_buffer("num_batches_tracked")
    sums = [value.double() * count for value in statistics]
    sum_over_ranks([*sums, count])
    for value, total in zip(statistics, sums, strict=True):
        value.copy_(total / count.clamp(min=1))


def _require_finite(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        for buffer in ("running_mean", "running_var"):
            if not bool(layer.get_buffer(buffer).isfinite().all()):
                raise InputError(
                    f"the {buffer} of {name} is not finite",
                    ["the inputs of this layer hold NaN or infinity"],
                    "look for NaN in the batches and in the weights before this layer",
                )

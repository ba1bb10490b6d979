"""The criteria: which weights a mask keeps.

- `magnitude`: the largest. No data.
- `wanda`: the largest |w| * norm(x) over the inputs x of calibration data (arXiv:2306.11695).
- `taylor`: those that a loss depends on most, to first order: |w * gradient| (arXiv:1906.10771).
- `sparsegpt`: those that the layer's outputs on calibration data depend on most, and the weights
  that stay make up for the others (arXiv:2301.00774).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twofour.core import criteria
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.patterns import Pattern
from twofour.train.batches import forward
from twofour.train.calibration import Calibration
from twofour.train.holding import whole
from twofour.train.layers import WeightRef
from twofour.train.masks import mask_of
from twofour.train.reconstruct import Pruned, ReconstructOptions, reconstruct
from twofour.train.statistics import collect

CRITERIA = ("magnitude", "wanda", "taylor", "sparsegpt")


def choose(
    model: nn.Module,
    weights: Sequence[WeightRef],
    patterns: Mapping[str, Pattern],
    criterion: str,
    data: Calibration,
    options: ReconstructOptions | None = None,
) -> Pruned:
    """Chooses the masks by one of `CRITERIA`; SparseGPT also sets the weights.

    Args:
        model: whose weights they are.
        weights: that get masks.
        patterns: name of each weight -> the pattern that it gets.
        criterion: one of `CRITERIA`.
        data: for the criteria that look at data.
        options: of SparseGPT.

    Raises:
        InputError: a value is not finite, or the data or the options are not what the criterion
            needs; see `collect` and `reconstruct`. The model is left as it was.
        UnsupportedError: data is needed, and the weights are distributed already (FSDP2).
    """
    _require_inputs(criterion, data, options)
    _require_finite(weights)
    if criterion == "magnitude":
        return Pruned({w.name: mask_of(_magnitude(w), patterns[w.name]) for w in weights})
    _require_here(weights, criterion)
    if criterion == "sparsegpt":
        return reconstruct(model, weights, patterns, data, options)
    statistics = collect(model, weights, criterion, data)
    return Pruned({w.name: mask_of(statistics.energy(w), patterns[w.name]) for w in weights})


def _magnitude(weight: WeightRef) -> Tensor:
    values = whole(weight.parameter.detach())
    return criteria.magnitude(values.to(torch.promote_types(values.dtype, torch.float32)))


def _require_inputs(criterion: str, data: Calibration, options: ReconstructOptions | None) -> None:
    """Refuses what would be ignored."""
    unused = {
        "batches": data.batches is not None and criterion == "magnitude",
        "forward": data.forward is not forward and criterion in ("magnitude", "taylor"),
        "loss": data.loss is not None and criterion != "taylor",
        "options": options is not None and criterion != "sparsegpt",
    }
    given = [name for name, ignored in unused.items() if ignored]
    if given:
        raise InputError(
            f"the criterion {criterion} takes no {' and no '.join(given)}",
            fix="leave them out, or make the Sparsifier with the criterion that takes them",
        )


def _require_finite(weights: Sequence[WeightRef]) -> None:
    broken = []
    for weight in weights:
        finite = whole(weight.parameter.detach()).isfinite()
        if not finite.all():
            unusable = finite.numel() - int(finite.sum())
            broken.append(f"{weight.name}: {unusable} of its values are NaN or infinite")
    if broken:
        raise InputError(
            "cannot rank weights that are not finite",
            broken,
            "load a checkpoint from before training diverged",
        )


def _require_here(weights: Sequence[WeightRef], criterion: str) -> None:
    apart = [weight.name for weight in weights if isinstance(weight.parameter, DTensor)]
    if apart:
        raise UnsupportedError(
            f"{criterion} cannot look at the inputs of distributed weights",
            ["each process holds a part of: " + ", ".join(apart)],
            "prune before fully_shard or distribute_tensor: the masks go with the model",
        )

"""What pruning criteria take from data: sums over the inputs of a layer, or over its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twofour.core import criteria
from twofour.core.errors import InputError
from twofour.train.calibration import (
    Calibration,
    as_it_was,
    bare,
    batches_of,
    count_of,
)
from twofour.train.capture import Read, exact_device, input_squares, parts_of, watch
from twofour.train.layers import WeightRef
from twofour.train.ranks import over_all_ranks, sum_over_ranks

_Added = tuple[dict[str, Tensor], list[str]]
"""Sums by weight in the given order, and the names of the used weights in the order of use."""


@dataclass(frozen=True)
class Statistics:
    """Sums over calibration data, by the names of the weights.

    Args:
        criterion: `wanda` or `taylor`.
        sums: float64; for Wanda [parts, C, taps...], for Taylor the shape of the weight.
    """

    criterion: str
    sums: dict[str, Tensor]

    def energy(self, weight: WeightRef) -> Tensor:
        """What a mask should keep as much of as it can: float64, the shape of the weight.

        Args:
            weight: one of those that the statistics were collected for, with its values as they
                are now.
        """
        sums = self.sums[weight.name]
        if self.criterion == "taylor":
            return sums
        squares = sums.repeat_interleave(weight.shape[0] // len(sums), dim=0)
        return criteria.wanda(weight.parameter.detach().to(sums), squares)


def collect(
    model: nn.Module, weights: Sequence[WeightRef], criterion: str, data: Calibration
) -> Statistics:
    """Runs the model once on all batches, in eval mode, and adds up what a criterion needs.

    - `wanda`: the square of each input feature of each weight, over all samples and, for a
      convolution, all positions: exactly those that each tap sees.
    - `taylor`: the square of w * gradient of the loss of a batch, over the batches. Each batch is
      one sample of the gradient, so more and smaller batches tell more.

    Under `torch.distributed` each process brings its own batches and all get the same sums. The
    model, its gradients and modes, and the state of the random generators stay as they were.

    Args:
        model: whose weights they are.
        weights: in the model's order.
        criterion: `wanda` or `taylor`.
        data: `forward` runs the model for Wanda, `loss` for Taylor.

    Raises:
        InputError: there are no batches, a weight is never used, a loss is no finite scalar with a
            gradient, or the inputs or gradients of a weight are not finite.

    Source: Sun et al. 2023, arXiv:2306.11695; Molchanov et al. 2019, arXiv:1906.10771, eq. 8.
    """
    if criterion == "wanda":
        name, what, add = "Wanda", "inputs", _add_squares
    else:
        name, what, add = "Taylor", "gradients", _add_gradients
    with as_it_was(bare(model)):
        sums, used = add(bare(model), weights, data)
    used = over_all_ranks(used)
    require_used(weights, set(used), name)
    sum_over_ranks(sums.values())
    for weight in used:
        require_finite(weight, [sums[weight]], what)
    return Statistics(criterion, sums)


def require_used(weights: Sequence[WeightRef], used: set[str], criterion: str) -> None:
    """Refuses weights that the calibration data says nothing about.

    Args:
        weights: all that should have been used.
        used: the names of those that were.
        criterion: for the message.

    Raises:
        InputError: names the others.
    """
    unused = [weight.name for weight in weights if weight.name not in used]
    if unused:
        raise InputError(
            f"{criterion} knows nothing of {len(unused)} layers that no batch goes through",
            ["never used: " + ", ".join(unused)],
            "exclude them, prune them by magnitude, or pass a forward that uses them",
        )


def require_finite(name: str, sums: Sequence[Tensor], what: str) -> None:
    """Refuses sums that hold NaN or infinity.

    Args:
        name: of the weight.
        sums: over its calibration data.
        what: was added up, for the message.

    Raises:
        InputError: names the layer.
    """
    if not all(bool(value.isfinite().all()) for value in sums):
        raise InputError(
            f"the {what} of {name} are not finite",
            ["their sum over the calibration data is NaN or infinite"],
            "look for NaN in the batches and in the weights of this and earlier layers; the model "
            "runs in eval mode, with the running statistics that its normalizations have",
        )


def _add_squares(model: nn.Module, weights: Sequence[WeightRef], data: Calibration) -> _Added:
    sums = {w.name: _zeros(w, (parts_of(w), *w.shape[1:])) for w in weights}
    used: dict[str, None] = {}

    def add(read: Read) -> None:
        used[read.weight.name] = None
        for part, squares in input_squares(read):
            sums[read.weight.name][part] += squares

    with torch.no_grad(), watch(model, weights, add):
        for batch in _reported(model, data, "Wanda"):
            data.forward(model, batch)
    return sums, list(used)


def _add_gradients(model: nn.Module, weights: Sequence[WeightRef], data: Calibration) -> _Added:
    if data.loss is None:
        raise InputError(
            "Taylor needs the loss whose gradient it looks at",
            fix="pass loss, a function of model and batch that returns a scalar",
        )
    sums = {w.name: _zeros(w, w.shape) for w in weights}
    parameters = [w.parameter for w in weights]
    used: dict[str, None] = {}
    with torch.enable_grad(), _all_with_gradient(parameters):
        for index, batch in enumerate(_reported(model, data, "Taylor")):
            loss = data.loss(model, batch)
            _require_loss(loss, index)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for weight, value, gradient in zip(weights, parameters, gradients, strict=True):
                if gradient is not None:
                    used[weight.name] = None
                    total = sums[weight.name]
                    total += criteria.taylor(value.detach().to(total), gradient.to(total))
    return sums, list(used)


def _zeros(weight: WeightRef, shape: tuple[int, ...]) -> Tensor:
    device = exact_device(weight.parameter.device)
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _reported(model: nn.Module, data: Calibration, name: str) -> Iterator[Any]:
    """The batches, each told of when it is done with."""
    total = count_of(data.batches)
    for index, batch in enumerate(batches_of(data.batches, model, name)):
        yield batch
        data.report(index + 1, total, f"{name}: batch")


@contextmanager
def _all_with_gradient(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters have gradients inside."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _require_loss(loss: object, index: int) -> None:
    fix = "let loss return what training would call backward() on"
    what = f"the loss of batch {index} cannot rank weights"
    if not isinstance(loss, Tensor):
        raise InputError(what, [f"expected a tensor, got a {type(loss).__name__}"], fix)
    if loss.ndim:
        raise InputError(what, [f"expected a scalar, got shape {list(loss.shape)}"], fix)
    if not loss.requires_grad:
        raise InputError(what, ["it has no gradient: it was detached or made under no_grad"], fix)
    if not bool(loss.isfinite()):
        raise InputError(what, [f"it is {loss.item()}"], "look for NaN in the batch or the weights")

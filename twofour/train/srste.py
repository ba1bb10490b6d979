"""Training from dense with masks that move: SR-STE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from twofour.core.errors import InputError
from twofour.train import holding
from twofour.train.checkpoint import DENSE
from twofour.train.layers import WeightRef
from twofour.train.method import Method
from twofour.train.sparsify import Sparsifier


class SrSte(Method):
    """Trains dense weights through the sparse ones, and chooses the masks anew after each step.

    Between steps the model has sparse weights: its outputs, a checkpoint and an evaluation are
    those of the sparse network. Inside `optimizer.step()` it has the dense ones w, which get

        gradient of the loss by the sparse weights + decay * w where the mask removes it

    and then the mask of the new w is taken. So a removed weight can come back, and the decay keeps
    it from doing so all the time. The dense weights are a buffer beside each weight, such as
    `conv1.weight_dense`, until `finish()`. Weight decay of the optimizer acts on them.

        srste = SrSte(Sparsifier(model), steps=len(loader) * epochs)
        srste.attach(optimizer)       # then train as before
        srste.finish()

    Args:
        sparsifier: not pruned yet.
        steps: of the optimizer in the whole training.
        decay: of the removed weights, added to their gradient.
        freeze: share of the steps after which the masks stay as they are and removed weights are
            gone, 0 to 1; the rest is plain fine-tuning.

    Raises:
        InputError: `decay` is below 0, `freeze` not in 0 to 1, or as for every `Method`.

    Source: Zhou et al. 2021, arXiv:2102.04010, eq. 9; Hu et al. 2024, arXiv:2404.01847 (flip rate).
    """

    def __init__(
        self, sparsifier: Sparsifier, steps: int, *, decay: float = 2e-4, freeze: float = 0.8
    ) -> None:
        """Checks; changes nothing yet."""
        super().__init__(sparsifier, steps)
        if decay < 0 or not 0 <= freeze <= 1:
            raise InputError(
                "cannot train with SR-STE like this",
                [f"expected decay 0 or more, freeze 0 to 1; got decay {decay}, freeze {freeze}"],
            )
        self.decay, self.freeze = decay, freeze
        self._freeze_step = round(freeze * steps)
        self._flips: Tensor | None = None
        self._flip_steps = 0

    @property
    def frozen(self) -> bool:
        """Whether the masks stay as they are from now on."""
        return self.step >= self._freeze_step

    def flip_rate(self) -> float:
        """The share of all mask entries that a step changed, on average since the last call.

        Healthy training begins with a high rate that falls towards 0; a rate that stays high says
        that `decay` is too low. Waits for the device.
        """
        steps, self._flip_steps = self._flip_steps, 0
        flips, self._flips = self._flips, None
        entries = sum(weight.parameter.numel() for weight in self.sparsifier.weights)
        return 0.0 if flips is None else int(flips) / (entries * steps)

    def dense(self, name: str) -> Tensor:
        """The dense weight [N, C, ...] behind a sparse one.

        Args:
            name: of a weight of the sparsifier.

        Raises:
            InputError: there is no such weight, or it is not trained with this now.
        """
        for weight in self.sparsifier.weights:
            if weight.name == name and _buffer_name(weight) in weight.module._buffers:
                return _dense(weight)
        raise InputError(f"{name!r} has no dense weight now")

    def _settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "decay": self.decay, "freeze": self.freeze}

    def _begin(self) -> None:
        for weight in self.sparsifier.weights:
            for place in self._everywhere(weight):
                values = place.parameter.detach().clone()
                place.module.register_buffer(_buffer_name(weight), values)
            holding.set_mask(weight, self._best_mask(weight, weight.parameter))
        if self.frozen:
            self._freeze()
        holding.hold(self.sparsifier.weights)

    def _before_step(self) -> None:
        if self.frozen:
            return
        for weight, mask in self._masked():
            dense, parameter = _dense(weight), weight.parameter
            self._pull(parameter, dense.masked_fill(mask, 0.0), self.decay)
            parameter.copy_(dense)

    def _after_step(self) -> None:
        if self.step > self._freeze_step:
            self._hold()
            return
        flips = [self._move(weight, mask) for weight, mask in self._masked()]
        # One number, so that a long training keeps no long list.
        total = torch.stack([count.to(flips[0].device) for count in flips]).sum()
        self._flips = total if self._flips is None else self._flips + total
        self._flip_steps += 1
        if self.frozen:
            self._freeze()
        self._hold() if self.frozen else holding.hold(self.sparsifier.weights)

    def _move(self, weight: WeightRef, mask: Tensor) -> Tensor:
        """Keeps the dense weight that the step has left, and takes its mask; how much flipped."""
        _dense(weight).copy_(weight.parameter)
        new = self._best_mask(weight, weight.parameter)
        flipped = (new != mask).sum()
        mask.copy_(new)
        return flipped

    def _freeze(self) -> None:
        """The masks as they are now become those of the sparsifier, weights being dense still."""
        self.sparsifier.set_masks({weight.name: mask for weight, mask in self._masked()})

    def _last_step(self) -> int:
        return self._freeze_step

    def _end(self) -> None:
        for weight in self.sparsifier.weights:
            for place in self._everywhere(weight):
                delattr(place.module, _buffer_name(weight))

    def _everywhere(self, weight: WeightRef) -> Iterator[WeightRef]:
        """The weight in the model and in its averages, whose buffers are compared one by one."""
        yield weight
        yield from (copied[weight.name] for copied in self._followers)


def _buffer_name(weight: WeightRef) -> str:
    return weight.attribute + DENSE


def _dense(weight: WeightRef) -> Tensor:
    return weight.module.get_buffer(_buffer_name(weight))

"""Regularization that makes a model ready to be pruned: what the mask will remove is shrunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from twofour.core.errors import InputError
from twofour.train.method import Method
from twofour.train.sparsify import Sparsifier

# The weights that are shrunk are chosen anew so often before they are removed.
CHOICES = 50


class Shrink(Method):
    """A growing penalty on the weights that a mask would remove now; then it removes them.

        shrink = Shrink(Sparsifier(model), steps=len(loader) * epochs, end=0.5)
        shrink.attach(optimizer)       # then train as before
        shrink.finish()

    Until `end` the gradient of such a weight w gets `penalty(step) * w`, the penalty rising from 0
    along a line. Which weights these are is asked again 50 times, so one that grows is let go. At
    `end` the masks are set; the rest is plain fine-tuning. With SGD choose `ceiling` so that
    rate * ceiling / (1 - momentum) is at most about 1.

    Args:
        sparsifier: not pruned yet.
        steps: of the optimizer in the whole training.
        end: share of the steps after which the weights are removed, above 0, up to 1.
        ceiling: the highest penalty, above 0.

    Raises:
        InputError: an option is out of its range, or as for every `Method`.

    Source: Wang et al. 2021, arXiv:2012.09243 (a growing penalty on what will be removed).
    """

    def __init__(
        self, sparsifier: Sparsifier, steps: int, end: float = 0.5, *, ceiling: float = 1.0
    ) -> None:
        """Checks; changes nothing yet."""
        super().__init__(sparsifier, steps)
        if not (end <= 1 and round(end * steps) >= 1 and ceiling > 0):
            raise InputError(
                "cannot shrink weights like this",
                [
                    f"expected end to be a share of a step or more, ceiling above 0; got end "
                    f"{end} of {steps} steps, ceiling {ceiling}"
                ],
            )
        self.end, self.ceiling = end, ceiling
        self._removed: dict[str, Tensor] = {}

    def penalty(self, step: int) -> float:
        """What step `step`, counted from 0, multiplies the weights with; 0 from `end` on."""
        last = self._last_step()
        return self.ceiling * (step + 1) / last if step < last else 0.0

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and which weights it shrinks."""
        return {**super().state_dict(), "removed": dict(self._removed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        super().load_state_dict(state)
        devices = {weight.name: weight.parameter.device for weight in self.sparsifier.weights}
        removed = state["removed"].items()
        self._removed = {name: mask.to(devices[name]) for name, mask in removed}

    def _settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "end": self.end, "ceiling": self.ceiling}

    def _begin(self) -> None:
        self._leave_dense()

    def _before_step(self) -> None:
        if self.step >= self._last_step():
            return
        if self.step % max(1, self._last_step() // CHOICES) == 0:
            self._removed = {
                weight.name: ~self._best_mask(weight, weight.parameter)
                for weight in self.sparsifier.weights
            }
        penalty = self.penalty(self.step)
        for weight in self.sparsifier.weights:
            parameter = weight.parameter
            self._pull(parameter, parameter * self._removed[weight.name], penalty)

    def _after_step(self) -> None:
        if self.step == self._last_step():
            self._removed = {}
            self.sparsifier.set_masks(
                {w.name: self._best_mask(w, w.parameter) for w in self.sparsifier.weights}
            )
        if self.step >= self._last_step():
            self._hold()

    def _last_step(self) -> int:
        return round(self.end * self.steps)

    def _end(self) -> None:
        return

"""Methods that make a model sparse while it is trained, and what they have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from twofour.core.criteria import magnitude
from twofour.core.errors import InputError, UnsupportedError
from twofour.train import holding
from twofour.train.layers import WeightRef
from twofour.train.masks import mask_of
from twofour.train.sparsify import Sparsifier


class Method(ABC):
    """Works by hooks around each step of an optimizer; needs two lines in a training loop.

        method.attach(optimizer)      # before the first step, and before a checkpoint is loaded
        ...                           # train for `steps` steps
        method.finish()

    To resume, attach it to the same optimizer of the same model, then load the states of the model,
    of the optimizer, and of this.

    Args:
        sparsifier: which weights, and the pattern of each; by magnitude, and it does not lock
            its masks.
        steps: of the optimizer in the whole training.

    Raises:
        InputError: `steps` is not above 0, the sparsifier locks masks, has no weights, or
            has another criterion.
        UnsupportedError: weights are spread over processes, as FSDP does.

    Attributes:
        sparsifier: as given.
        steps: as given.
        step: how many were done.
    """

    def __init__(self, sparsifier: Sparsifier, steps: int) -> None:
        """Checks; changes nothing yet."""
        _require_fit(type(self).__name__, sparsifier, steps)
        self.sparsifier, self.steps, self.step = sparsifier, steps, 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._copies: tuple[nn.Module, ...] = ()
        self._followers: list[dict[str, WeightRef]] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizer: torch.optim.Optimizer, *copies: nn.Module) -> None:
        """Works around each step of this optimizer from now on.

        Args:
            optimizer: holds all weights of the sparsifier; stepped without a closure.
            copies: averaged models, which get the masks too.

        Raises:
            InputError: the optimizer lacks weights, or this is attached already.
        """
        if self._optimizer is not None or self.step:
            raise InputError(
                f"this {type(self).__name__} is attached already, or was before",
                fix="make a new one for another training; to train on with the masks that it "
                "ended with, use its sparsifier",
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [w.name for w in self.sparsifier.weights if id(w.parameter) not in held]
        if missing:
            raise InputError(
                f"the optimizer lacks {len(missing)} of the weights to prune",
                [", ".join(missing)],
                "build it from model.parameters(), or exclude them from the Sparsifier",
            )
        self._optimizer, self._copies = optimizer, copies
        self._followers = [holding.find_copies(self.sparsifier.weights, copy) for copy in copies]
        with torch.no_grad():
            self._begin()
            self._follow()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def skip(self) -> None:
        """Counts a step that was left out, as `torch.amp.GradScaler` does: no weight moved.

        For loops whose number of steps is fixed; without it such a step comes later.

        Raises:
            InputError: it is not attached.
        """
        if self._optimizer is None:
            raise InputError(f"this {type(self).__name__} is not attached to an optimizer")
        with torch.no_grad():
            self._before_step()
        self._after(self._optimizer, (), {})

    def finish(self) -> Sparsifier:
        """Ends it: all weights are masked, the masks are locked, and held by the optimizer.

        Returns:
            The sparsifier.

        Raises:
            InputError: it was not attached, or its steps were not all done.
        """
        if self._optimizer is None:
            raise InputError(f"this {type(self).__name__} was never attached to an optimizer")
        if self.step < self._last_step():
            raise InputError(
                f"this {type(self).__name__} needs {self._last_step()} steps of the optimizer",
                [f"{self.step} were done; a GradScaler skips some, which do not count"],
                "train on for the missing ones, give it the steps that training really has, or "
                "call skip() where one was left out",
            )
        for handle in self._handles:
            handle.remove()
        self._end()
        self.sparsifier.lock()
        self.sparsifier.attach(self._optimizer, *self._copies)
        self._optimizer, self._handles = None, []
        return self.sparsifier

    def state_dict(self) -> dict[str, Any]:
        """How far it is; masks and dense weights are in the state of the model."""
        return {"settings": self._settings(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Raises:
            InputError: it was saved by one with other settings.
        """
        there, here = state["settings"], self._settings()
        differ = [
            f"{name}: {there.get(name)} there, {here.get(name)} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if differ:
            raise InputError(f"this state is of another {type(self).__name__}", differ)
        self.step = int(state["step"])

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one before."""

    @abstractmethod
    def _begin(self) -> None:
        """Before the first step."""

    @abstractmethod
    def _before_step(self) -> None:
        """After the gradients, before the optimizer uses them."""

    @abstractmethod
    def _after_step(self) -> None:
        """After the optimizer changed the weights; `step` counts it already."""

    @abstractmethod
    def _last_step(self) -> int:
        """The step after which it may be finished."""

    @abstractmethod
    def _end(self) -> None:
        """After the last step, when all weights are masked."""

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(callable(each) for each in (*args[1:], *kwargs.values())):
            raise UnsupportedError(
                f"{type(self).__name__} cannot work around a step with a closure",
                fix="compute the gradients before optimizer.step()",
            )
        self._before_step()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        self._after_step()
        self._follow()

    def _follow(self) -> None:
        for follower in self._followers:
            holding.follow(self.sparsifier.weights, follower)

    def _pull(self, parameter: nn.Parameter, values: Tensor, strength: float) -> None:
        """Adds strength * values to the gradient, in its scale: fused steps undo a GradScaler's."""
        if parameter.grad is None:
            return
        scale = getattr(self._optimizer, "grad_scale", None)
        if scale is not None:
            values = values * scale.to(values.device)
        parameter.grad.add_(values, alpha=strength)

    def _hold(self) -> None:
        """Zeros what the masks remove, of weights and of what the optimizer keeps for them."""
        holding.hold(self.sparsifier.weights, self._optimizer)

    def _masked(self) -> Iterator[tuple[WeightRef, Tensor]]:
        """The weights with their masks."""
        for weight in self.sparsifier.weights:
            mask = weight.mask
            if mask is None:
                raise InputError(
                    f"{weight.name} lost its mask while it was trained",
                    fix="do not call Sparsifier.remove() before finish()",
                )
            yield weight, mask

    def _best_mask(self, weight: WeightRef, values: Tensor) -> Tensor:
        """The mask that keeps most of these values' squares."""
        half = values.dtype in (torch.float16, torch.bfloat16)
        values = values.detach().float() if half else values.detach()
        return mask_of(magnitude(values), self.sparsifier.patterns[weight.name], check=False)

    def _leave_dense(self) -> None:
        """Masks that remove nothing, so that the names in `state_dict` are those of the end."""
        for weight in self.sparsifier.weights:
            holding.set_mask(weight, torch.ones_like(weight.parameter, dtype=torch.bool))


def _require_fit(name: str, sparsifier: Sparsifier, steps: int) -> None:
    """Refuses what no method can work with."""
    if steps < 1:
        raise InputError(
            f"{name} needs the number of training steps", [f"expected above 0; got {steps}"]
        )
    if not sparsifier.weights:
        raise InputError(f"{name} has no weights: the sparsifier prunes none")
    if sparsifier.locked:
        raise InputError(
            f"{name} changes masks, and this sparsifier locks them",
            fix="make a Sparsifier of the dense model without locked=True; finish() locks it",
        )
    if sparsifier.criterion != "magnitude":
        raise InputError(
            f"{name} chooses masks by magnitude, and this sparsifier by {sparsifier.criterion}",
            fix="make the Sparsifier with criterion='magnitude', or prune first and fine-tune",
        )
    if any(isinstance(weight.parameter, DTensor) for weight in sparsifier.weights):
        raise UnsupportedError(
            f"{name} needs whole weights on each process, and these are sharded",
            fix="train with DistributedDataParallel, or prune first and hold the masks",
        )

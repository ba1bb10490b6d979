"""An exponential moving average of a model's weights and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from twofour.train.calibration import bare

_STATISTICS = ("running_mean", "running_var")


class Average:
    """average += (1 - decay) * (value - average), for each parameter and running statistic.

    The first steps count more: the decay of update t (from 0) is min(decay, (1 + t) / (10 + t)).
    The average of half-precision values is float32: a step of it is often too small for theirs.
    Other buffers are not averaged; they may hold what has no mean, such as the -inf of a mask.

    Args:
        model: its values are what the average begins with.
        decay: 0 to 1, 1 excluded.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copies the values."""
        self.decay = decay
        self.updates = 0
        state = bare(model).state_dict(keep_vars=True)
        averaged = {name: value for name, value in state.items() if _is_averaged(name, value)}
        firsts: dict[int, str] = {}  # a shared value is averaged once, under its first name
        self._names = {n: firsts.setdefault(id(value), n) for n, value in averaged.items()}
        self._live = {name: averaged[name].detach() for name in firsts.values()}
        self._values = {n: value.to(_dtype(value), copy=True) for n, value in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the values that the model has now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = [value.to(_dtype(value)) for value in self._live.values()]
        torch._foreach_lerp_(list(self._values.values()), live, 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Puts the average into the model, and the model's values here."""
        for name, value in self._live.items():
            kept = value.clone()
            value.copy_(self._values[name])
            self._values[name].copy_(kept)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The model has the average in this context; what the context changes of it is kept."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def state_dict(self) -> dict[str, object]:
        """The average, by all names of each value, and how often it was updated."""
        values = {name: self._values[first] for name, first in self._names.items()}
        return {"updates": self.updates, "values": values}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Goes on from a saved average.

        Raises:
            KeyError: it is one of another model.
        """
        values, updates = state["values"], state["updates"]
        if not isinstance(values, dict) or not isinstance(updates, int):
            raise KeyError("values")
        for name, value in self._values.items():
            value.copy_(values[name])
        self.updates = updates


def _dtype(value: Tensor) -> torch.dtype:
    """That of its average."""
    return torch.promote_types(value.dtype, torch.float32)


def _is_averaged(name: str, value: object) -> bool:
    """Whether what a `state_dict` holds under this name has a mean."""
    moves = isinstance(value, nn.Parameter) or name.endswith(_STATISTICS)
    return moves and isinstance(value, Tensor) and value.is_floating_point()

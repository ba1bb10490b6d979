"""An exponential moving average of a model's weights and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from twofour.train.calibration import bare


class Average:
    """average += (1 - decay) * (value - average), for each floating-point parameter and buffer.

    The first steps count more: the decay of update t (from 0) is min(decay, (1 + t) / (10 + t)).

    Args:
        model: its values are what the average begins with.
        decay: 0 to 1, 1 excluded.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copies the values."""
        self.decay = decay
        self.updates = 0
        state = bare(model).state_dict(keep_vars=True)
        self._live = {name: v.detach() for name, v in state.items() if v.is_floating_point()}
        self._values = {name: value.clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the values that the model has now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._all(self._values), self._all(self._live), 1 - decay)

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
        """The average and how often it was updated."""
        return {"updates": self.updates, "values": dict(self._values)}

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

    @staticmethod
    def _all(values: dict[str, Tensor]) -> list[Tensor]:
        return list(values.values())

"""Forward passes in half precision, while weights, momentum and gradients stay float32.

float16 has few exponents: small gradients would become zero. So the loss is multiplied before the
backward pass, and the gradients divided after it (`torch.amp.GradScaler`). Where a gradient still
became infinite the step is left out, and the factor halved. bfloat16 needs none of that.

Source: Micikevicius et al. 2018, arXiv:1710.03740.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twofour.train.schedule import Schedule


class HalfPrecision:
    """How one step of training is computed, for the precision that a schedule asks for.

    Args:
        schedule: has `bf16`, `fp16` and `clip_norm`.
        optimizer: whose steps these are.
        device: of the model.

    Attributes:
        scaler: of the gradients; None but for float16.
    """

    def __init__(
        self, schedule: Schedule, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        """Makes the scaler; watches whether a step is done."""
        self.scaler = torch.amp.GradScaler(device.type) if schedule.fp16 else None
        self._optimizer, self._device, self._clip_norm = optimizer, device, schedule.clip_norm
        self._dtype = torch.float16 if schedule.fp16 else torch.bfloat16
        self._enabled = schedule.fp16 or schedule.bf16
        self._stepped = False
        if self.scaler is not None:
            optimizer.register_step_post_hook(self._note)

    def forward(self) -> torch.autocast:
        """The context that a forward pass and its loss are computed in."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._enabled)

    def step(self, loss: Tensor, trained: list[nn.Parameter]) -> bool:
        """Goes back from the loss, clips the gradients, and steps.

        Args:
            loss: a scalar.
            trained: the parameters that are clipped together.

        Returns:
            False where a gradient was not finite and the step was left out.
        """
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        if self._clip_norm:
            if self.scaler is not None:
                self.scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(trained, self._clip_norm)
        if self.scaler is None:
            self._optimizer.step()
            return True
        self._stepped = False
        self.scaler.step(self._optimizer)
        self.scaler.update()
        return self._stepped

    def _note(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True

"""The options of a training run: how long, how fast, by which optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from twofour.core.errors import InputError


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with Nesterov momentum.

    Args:
        momentum: 0 to 1, 1 excluded; 0 is plain gradient descent.
        weight_decay: added to the gradient as this times the weight.
        decay_vectors: decay biases and the parameters of normalizations too.
    """

    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_vectors: bool = True

    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer of the parameters that are trained."""
        groups = _groups(model, self.weight_decay, self.decay_vectors)
        return torch.optim.SGD(groups, lr, self.momentum, nesterov=self.momentum > 0)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

    Args:
        betas: decay of the first and of the second moment.
        weight_decay: the weight shrinks by rate times this in each step.
        decay_vectors: decay biases and the parameters of normalizations too.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    decay_vectors: bool = False

    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer of the parameters that are trained."""
        groups = _groups(model, self.weight_decay, self.decay_vectors)
        return torch.optim.AdamW(groups, lr, self.betas)


@dataclass(frozen=True)
class Schedule:
    """How a model is trained: a linear warm-up to `lr`, then a cosine down to `final_lr`.

        Schedule(epochs=30, lr=0.1, warmup=0.05, ema=0.999, optimizer=Sgd(weight_decay=5e-4))

    Args:
        epochs: passes over the training set.
        lr: the highest rate.
        warmup: steps of the warm-up if an int, their share of all steps if a float.
        final_lr: what the cosine falls to.
        optimizer: `Sgd(...)` or `AdamW(...)`.
        label_smoothing: of the default loss, 0 to 1, 1 excluded.
        clip_norm: gradients are scaled down to this norm, all together; 0 does not.
        ema: decay of an average of the weights in each step, such as 0.999; 0 keeps none. The
            average is what `evaluate` sees. It begins faster: its decay in step t (from 0) is
            at most (1 + t) / (10 + t).
        ema_stays: whether the average, not the last weights, is in the model at the end.
        seed: of the randomness inside the model (dropout); each epoch has its own.
        bf16: run the forward pass under bfloat16 autocast; weights and momentum stay float32.
            Pays on CPUs with AVX512-BF16 or AMX and on GPUs, costs elsewhere.
        fp16: the same under float16, with scaled gradients; for GPUs without bfloat16. A step whose
            gradients are not finite is left out; a method counts it all the same.

    Raises:
        InputError: a number is out of its range.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983 (cosine, without restarts).
    """

    epochs: int = 10
    lr: float = 0.05
    warmup: int | float = 0
    final_lr: float = 0.0
    optimizer: Sgd | AdamW = field(default_factory=Sgd)
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0
    ema_stays: bool = True
    seed: int = 0
    bf16: bool = False
    fp16: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot be trained with, all of it at once."""
        wrong = [
            f"{name}: expected {wanted}; got {getattr(self, name)}"
            for name, wanted, held in (
                ("epochs", "0 or more", self.epochs >= 0),
                ("lr", "a finite rate above 0", 0 < self.lr < math.inf),
                ("warmup", "steps, 0 or more, or a share below 1.0", self._warmup_fits()),
                ("final_lr", f"0 to lr, which is {self.lr}", 0 <= self.final_lr <= self.lr),
                ("label_smoothing", "0 to 1, 1 excluded", 0 <= self.label_smoothing < 1),
                ("clip_norm", "0 or more", self.clip_norm >= 0),
                ("ema", "0 to 1, 1 excluded", 0 <= self.ema < 1),
                ("fp16", "one of bf16 and fp16", not (self.fp16 and self.bf16)),
            )
            if not held
        ]
        if wrong:
            raise InputError("this schedule cannot be followed", wrong)

    def rate(self, step: int, steps: int) -> float:
        """The rate of step `step` of `steps`, counted from 0."""
        warmup = self.warmup_steps(steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, steps - warmup)
        fall = 0.5 * (1.0 + math.cos(math.pi * share))
        return self.final_lr + (self.lr - self.final_lr) * fall

    def warmup_steps(self, steps: int) -> int:
        """How many of `steps` the rate rises in.

        Raises:
            InputError: more than there are, so that the rate would never get to `lr`.
        """
        warmup = self.warmup if self._in_steps() else self.warmup * steps
        if warmup > steps:
            raise InputError(
                f"a warm-up of {warmup} steps is longer than the training, which has {steps}",
                fix="give Schedule.warmup as a share, such as 0.05, or train for more epochs",
            )
        return round(warmup)

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """What differs from a schedule written by `to_dict`: one line each."""
        return list(_differences("", saved, self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """All options as plain data."""
        plain = asdict(self)
        plain["optimizer"] = {"name": type(self.optimizer).__name__, **plain["optimizer"]}
        return plain

    def _warmup_fits(self) -> bool:
        return self.warmup >= 0 and (self._in_steps() or self.warmup < 1)

    def _in_steps(self) -> bool:
        return isinstance(self.warmup, (int, np.integer))


def _differences(prefix: str, there: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() | here.keys(), key=[*here, *there].index):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(f"{prefix}{name}.", old, new)
        elif old != new:
            yield f"{prefix}{name}: {old} there, {new} here"


def _groups(model: nn.Module, weight_decay: float, decay_vectors: bool) -> list[dict[str, Any]]:
    """The trained parameters as groups of an optimizer: matrices first, then vectors.

    Raises:
        InputError: none is trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("no parameter of this model requires a gradient")
    vectors = [p for p in trained if p.ndim < 2 and not decay_vectors]
    apart = {id(p) for p in vectors}
    matrices = [p for p in trained if id(p) not in apart]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

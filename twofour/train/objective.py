"""What a training step minimises: the default loss, a distiller's, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from twofour.core.errors import InputError
from twofour.train.batches import forward
from twofour.train.calibration import Loss
from twofour.train.distill import Distiller
from twofour.train.schedule import Schedule

Objective = Callable[[nn.Module, Any], tuple[Tensor, Tensor | None]]


def objective(loss: Loss | Distiller | None, schedule: Schedule) -> Objective:
    """What to minimise, and what to count.

    Args:
        loss: (model, batch) -> a scalar; a `Distiller`; None: cross entropy.
        schedule: its label smoothing is that of the cross entropy.

    Returns:
        (model, batch) -> the loss, and how many samples were right, or None where nobody knows.

    Raises:
        InputError: label smoothing with another loss than the default one.
    """
    if loss is not None and schedule.label_smoothing:
        raise InputError(
            "label_smoothing belongs to the default loss, and this run has another one",
            fix="set Schedule.label_smoothing to 0; Distiller has its own",
        )
    if loss is None:
        return _classification(schedule.label_smoothing)
    if isinstance(loss, Distiller):
        return _distillation(loss)
    return lambda model, batch: (_scalar(loss(model, batch)), None)


def _scalar(loss: object) -> Tensor:
    """The user's loss, if a step can be taken along its gradient."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    got = type(loss).__name__
    if isinstance(loss, Tensor):
        got = f"shape {list(loss.shape)}, " + ("" if loss.requires_grad else "without a gradient")
    raise InputError(
        "cannot train with this loss",
        [f"expected a scalar tensor with a gradient; got {got.rstrip(', ')}"],
        "let loss(model, batch) return what training would call backward() on",
    )


def _classification(label_smoothing: float) -> Objective:
    def classified(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        x, labels = _split(batch)
        if labels is None:
            raise InputError(
                "the default loss needs (x, labels) batches",
                [f"got a {type(batch).__name__}"],
                "give finetune a loss: a function of (model, batch), or a Distiller",
            )
        outputs = forward(model, x)
        hard = functional.cross_entropy(outputs, labels, label_smoothing=label_smoothing)
        return hard, _hits(outputs, labels)

    return classified


def _distillation(distiller: Distiller) -> Objective:
    def distilled(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        x, labels = _split(batch)
        outputs = distiller.forward(model, x)
        return distiller.loss(outputs, x, labels), _hits(outputs, labels)

    return distilled


def _split(batch: Any) -> tuple[Any, Tensor | None]:
    """(x, labels), or the batch itself and None."""
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _hits(outputs: Any, labels: Tensor | None) -> Tensor | None:
    """How many classes are right, where there are classes: logits [B, N], labels int [B]."""
    if labels is None or labels.is_floating_point() or not isinstance(outputs, Tensor):
        return None
    if outputs.ndim != 2 or labels.ndim != 1:
        return None
    return (outputs.detach().argmax(1) == labels).sum()

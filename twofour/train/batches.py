"""Batches of any task: how a model is called with one, and how one reaches the model's device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Batches(Protocol):
    """A sized iterable of batches, such as a `torch.utils.data.DataLoader`."""

    def __len__(self) -> int:
        """How many batches there are."""

    def __iter__(self) -> Iterator[Any]:
        """One pass over them; a batch is a tensor, an (x, labels) pair, or a mapping of tensors."""


def forward(model: nn.Module, batch: Any) -> Any:
    """Calls the model with a batch.

    Args:
        model: any.
        batch: a tensor, given as it is; a mapping, given as keyword arguments; a tuple or a list,
            of which the first item is given (an (x, labels) pair).

    Returns:
        The model's outputs.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return forward(model, batch[0])
    return model(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on a device; what is no tensor stays as it is.

    Args:
        batch: a tensor, or tuples, lists and mappings of them; named tuples stay such, and what has
            a `to` of its own, such as a `PackedSequence`, is moved by that, as a copy.
        device: where they are wanted.
    """
    if isinstance(batch, Tensor):
        # Towards the host a copy that nobody waits for would be read before it is there.
        return batch.to(device, non_blocking=device.type == "cuda")
    if callable(getattr(batch, "to", None)):
        return copy.copy(batch).to(device)  # some move themselves
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*moved)
        return tuple(moved) if isinstance(batch, tuple) else moved
    return batch


def samples_in(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor; 1 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    return samples_in(batch[0]) if isinstance(batch, (tuple, list)) and batch else 1


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU if it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device

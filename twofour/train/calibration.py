"""Calibration data: what batches are, how a model is run on them, and how it is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.core.progress import Report, silent
from twofour.train.batches import device_of, to_device
from twofour.train.batches import forward as call

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches as a list, a DataLoader or another iterable, or a function that returns one."""

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch, on its device; what it returns is not looked at."""

Loss = Callable[[nn.Module, Any], Tensor]
"""Runs a model on one batch, on its device, and returns its loss, a scalar."""


def batches_of(batches: Batches | None, model: nn.Module, purpose: str) -> Iterator[Any]:
    """One pass over the batches, on the model's device.

    Args:
        batches: called if it is a function.
        model: that they are for.
        purpose: what they are needed for, for the message.

    Raises:
        InputError: there are none, or what was given is a single batch.
    """
    count, device = 0, device_of(model)
    for batch in _checked(batches, purpose):
        count += 1
        yield to_device(batch, device)
    if count == 0:
        raise InputError(
            f"{purpose} got no batches",
            ["the iterable was empty; an iterator that was run through before is empty too"],
            "give a list of batches, a DataLoader, or a function that returns an iterator",
        )


def require_repeatable(batches: Batches | None, purpose: str) -> None:
    """Refuses what can be run through once only.

    Raises:
        InputError: the batches are an iterator, such as a generator, or a single batch.
    """
    if not callable(batches) and isinstance(_checked(batches, purpose), Iterator):
        raise InputError(
            f"{purpose} runs through the batches several times",
            [f"got a {type(batches).__name__}, which can be run through only once"],
            "give a list of batches, a DataLoader, or a function that returns an iterator",
        )


def count_of(batches: Batches | None) -> int | None:
    """How many batches there are, where they say it."""
    length: Callable[[], int] | None = getattr(batches, "__len__", None)
    try:
        return None if length is None else length()
    except TypeError:  # a DataLoader of an iterable data set has __len__, and raises
        return None


def bare(model: nn.Module) -> nn.Module:
    """The user's own module, out of `DistributedDataParallel` and `torch.compile`.

    Compiled code does not call hooks, and DDP expects a whole step after each forward.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass(frozen=True)
class Calibration:
    """What criteria that look at data are given.

    Args:
        batches: calibration data.
        forward: runs the model on a batch.
        loss: the same for the criterion that needs it.
        report: told of each piece of work done.
    """

    batches: Batches | None = None
    forward: Forward = call
    loss: Loss | None = None
    report: Report = silent


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module is in training or eval mode as it was before."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has its mode again, and randomness its state.

    Inside, what calls no hooks is off: compiled code, and the fused attention of
    `nn.MultiheadAttention`.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    fused = torch.backends.mha.get_fastpath_enabled()
    eager = torch.compiler.set_stance("force_eager")
    with modes_kept(model), torch.random.fork_rng(list(devices)), eager:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _checked(batches: Batches | None, purpose: str) -> Iterable[Any]:
    """The iterable itself, or what the function returns."""
    if batches is None:
        raise InputError(
            f"{purpose} needs calibration data",
            fix="pass batches: a list of batches, a DataLoader, or a function that returns an "
            "iterator",
        )
    single = isinstance(batches, Tensor | Mapping | str)
    iterable = batches if single or not callable(batches) else batches()
    if single or not isinstance(iterable, Iterable):
        raise InputError(
            f"{purpose} needs an iterable of batches",
            [f"got a {type(iterable).__name__}"],
            "put a single batch in a list: [batch]",
        )
    return iterable

"""The user's own functions, by their names: called, and what they return checked.

    model      module:function() -> torch.nn.Module
    example    module:function() -> a tensor, a tuple of tensors, or a dict of tensors by argument
    train      module:function(epoch) -> batches, as `finetune` takes them

A model function with a parameter `pretrained` is called with `pretrained=False` where other weights
are loaded over its own: it need not train or download any then.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twofour.core.data import import_function
from twofour.core.errors import InputError
from twofour.train.batches import Batches

Example = Tensor | dict[str, Tensor]
"""One tensor for a model with one input, else tensors by the names of forward's arguments."""

_PRETRAINED = "pretrained"
_FIX = {
    "model": "write a function without arguments that returns a torch.nn.Module",
    "example": "write a function without arguments that returns a batch of two samples or so: a "
    "tensor, a tuple of tensors, or a dict of tensors",
    "train": "write a function of the epoch's number that returns a list of batches or a "
    "DataLoader",
    "loss": "write a function of (model, batch) that returns a scalar tensor",
}


def seed_all(seed: int) -> None:
    """Seeds whatever the user's code may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def user_function(spec: str, what: str) -> Callable[..., Any]:
    """A function of the user's.

    Args:
        spec: module:function.
        what: "model", "example", "train" or "loss".

    Raises:
        InputError: there is none.
    """
    return import_function(spec, what, _FIX[what])


def build_model(spec: str, seed: int, *, weights_follow: bool = False) -> nn.Module:
    """The user's model.

    Args:
        spec: module:function.
        seed: of what it draws.
        weights_follow: others will be loaded over its weights.

    Raises:
        InputError: the function is missing, or returns something else.
    """
    function = user_function(spec, "model")
    seed_all(seed)
    skip = weights_follow and _PRETRAINED in inspect.signature(function).parameters
    model = function(**{_PRETRAINED: False}) if skip else function()
    if not isinstance(model, nn.Module):
        raise _wrong(spec, "model", "a torch.nn.Module", model)
    return model


def example_inputs(spec: str, model: nn.Module, seed: int) -> Example:
    """The user's example inputs.

    Args:
        spec: module:function.
        model: they are for.
        seed: of what it draws.

    Raises:
        InputError: the function is missing, or returns something else than tensors.
    """
    function = user_function(spec, "example")
    seed_all(seed)
    found = function()
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found)
    if isinstance(found, (tuple, list)):
        names = (*arguments(model), *map(str, range(len(found))))  # a number is none of its own
        found = found[0] if len(found) == 1 else dict(zip(names, found, strict=False))
    if isinstance(found, Tensor) and found.ndim:
        return found
    tensors = isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())
    if not tensors or not found:
        raise _wrong(spec, "example", "tensors whose axis 0 counts samples", found)
    names = arguments(model)[: len(found)]
    if set(names) != set(found):
        reasons = [
            f"expected the first arguments of forward: {', '.join(names) or 'it has none'}",
            f"got {', '.join(map(str, found))}",
        ]
        what = f"example function {spec} does not fit the model"
        raise InputError(what, reasons, _FIX["example"])
    return {name: found[name] for name in names}


def arguments(model: nn.Module) -> tuple[str, ...]:
    """The names of forward's arguments that inputs can be given to."""
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


def train_batches(spec: str, seed: int) -> Callable[[int], Batches]:
    """The user's training data: epoch -> batches.

    Args:
        spec: module:function.
        seed: of what it draws; each epoch has its own, so that a resumed run sees what the first
            one would have.

    Raises:
        InputError: the function is missing; later, it returns nothing that can be run through.
    """
    function = user_function(spec, "train")

    def batches(epoch: int) -> Batches:
        seed_all(seed * 1_000_003 + epoch)
        found = function(epoch)
        sized = hasattr(found, "__iter__") and hasattr(found, "__len__")
        if not sized or isinstance(found, (Tensor, str, Mapping)):
            raise _wrong(spec, "train", "a list of batches, or a DataLoader", found)
        return found  # type: ignore[no-any-return]

    return batches


def _wrong(spec: str, what: str, expected: str, got: object) -> InputError:
    shape = f" of shape {list(got.shape)}" if isinstance(got, Tensor) else ""
    return InputError(
        f"{what} function {spec} returned something else",
        [f"expected {expected}, got {type(got).__name__}{shape}"],
        _FIX[what],
    )

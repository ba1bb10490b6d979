"""Proves that other values of a model's parameters make it compute the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from twofour.core.errors import GateError
from twofour.train.channels import Inputs, arguments

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Of the largest output: sums in another order differ by rounding, another channel by far more."""


def require_same(
    model: nn.Module, example_inputs: Inputs, tensors: dict[str, Tensor], seed: int
) -> None:
    """Compares the outputs of a model with those it would have with other values, in float64.

    Both run on the example inputs, and on random ones of the same shapes.

    Args:
        model: left as it is.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        tensors: new values of some parameters and buffers, by name.
        seed: of the random inputs.

    Raises:
        GateError: an output differs by more than `TOLERANCES`.
    """
    twin = copy.deepcopy(model).cpu().double().eval()
    batches = [_doubled(example_inputs), _random(_doubled(example_inputs), seed)]
    expected = [_outputs(twin, batch) for batch in batches]
    state = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    for batch, wanted in zip(batches, expected, strict=True):
        for index, (one, other) in enumerate(zip(wanted, _outputs(twin, batch), strict=True)):
            limit = TOLERANCES.get(one.dtype, 0.05) * float(one.abs().nan_to_num().amax())
            apart = (one - other).abs().nan_to_num()
            if not bool((apart <= limit).all()) or not one.isnan().equal(other.isnan()):
                raise GateError(
                    f"permuted channels change what {type(model).__name__} computes",
                    [
                        f"output {index}: expected a difference of at most {limit:.3g}, "
                        f"got {float(apart.amax()):.3g}"
                    ],
                    "the model was left as it was; exclude layers to find the one that is read "
                    "in a way that its graph does not show",
                )


def _doubled(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: _double(value) for name, value in inputs.items()}
    if isinstance(inputs, Tensor):
        double: Tensor = _double(inputs)
        return double
    return tuple(_double(value) for value in inputs)


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def _random(inputs: Inputs, seed: int) -> Inputs:
    """Inputs of the same shapes: normal numbers, integers in a random order."""
    random = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=random, dtype=value.dtype)
        order = torch.randperm(value.numel(), generator=random)
        return value.reshape(-1)[order].reshape(value.shape)

    if isinstance(inputs, Mapping):
        return {name: drawn(value) for name, value in inputs.items()}
    if isinstance(inputs, Tensor):
        one: Tensor = drawn(inputs)
        return one
    return tuple(drawn(value) for value in inputs)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        found = tree_leaves(model(*args, **kwargs))
    return [each for each in found if isinstance(each, Tensor)]

"""Proves that other values of a model's parameters make it compute the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from twofour.core.errors import GateError
from twofour.train.channels import Inputs, arguments

_Call = tuple[tuple[Any, ...], dict[str, Any]]

TOLERANCES = {
    torch.float64: 1e-8,
    torch.complex128: 1e-8,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
}
"""Of the largest number that differs at all: sums in another order differ by rounding, another
channel by far more."""


def require_same(
    model: nn.Module,
    example_inputs: Inputs,
    tensors: dict[str, Tensor],
    seed: int,
    *,
    training: bool = False,
) -> None:
    """Compares the outputs of a model with those it would have with other values.

    Both run on the example inputs, and on random ones of the same shapes: in float64 on the CPU,
    or as they are where the model's code asks for a type or a device.

    Args:
        model: left as it is.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        tensors: new values of some parameters and buffers, by name.
        seed: of the random inputs, and of what the model draws.
        training: in training mode, with nothing dropped.

    Raises:
        GateError: an output differs by more than `TOLERANCES`, or there is none.
    """
    twin, batches, expected = _expected(model, example_inputs, seed, training)
    state = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    reasons = [] if expected[0] else ["it returns no tensor that could be compared"]
    for batch, wanted in zip(batches, expected, strict=True):
        for index, (one, other) in enumerate(zip(wanted, _outputs(twin, batch, seed), strict=True)):
            reasons += _difference(f"output {index}", one, other)
    if reasons:
        raise GateError(
            f"permuted channels change what {type(model).__name__} computes"
            + (" in training mode" if training else ""),
            reasons,
            "the model was left as it was; exclude layers to find the one that is read in a way "
            "that its graph does not show",
        )


def _difference(name: str, one: Tensor, other: Tensor) -> list[str]:
    """What is wrong, if numbers that differ do so by more than rounding."""
    unlike = (one != other) & ~(one.isnan() & other.isnan())
    if not unlike.any():
        return []
    if not (one.is_floating_point() or one.is_complex()):
        return _flipped(name, unlike)
    values = one[unlike].abs()
    finite = values[values.isfinite()]
    limit = TOLERANCES.get(one.dtype, 0.05) * (float(finite.amax()) if finite.numel() else 0.0)
    apart = (one - other)[unlike].abs()
    if bool((apart <= limit).all()):
        return []
    got = float(apart.amax())
    return [f"{name}: expected a difference of at most {limit:.3g}, got {got:.3g}"]


def _flipped(name: str, unlike: Tensor) -> list[str]:
    """Of numbers that are counted or compared, rounding may decide one in a hundred."""
    share = float(unlike.double().mean())
    return [f"{name}: {100 * share:.3g}% of its whole numbers differ"] if share > 0.01 else []


def _expected(
    model: nn.Module, example_inputs: Inputs, seed: int, training: bool
) -> tuple[nn.Module, list[_Call], list[list[Tensor]]]:
    """A copy of the model, inputs that it takes, and what it returns for each."""
    given = arguments(example_inputs)
    twin = copy.deepcopy(model).cpu().double().train(training)
    doubled = tree_map_only(Tensor, _double, given)
    batches = [doubled, _random(doubled, seed)]
    try:
        return twin, batches, [_outputs(twin, batch, seed) for batch in batches]
    except RuntimeError:  # its code asks for a type or a device, such as that of a table
        twin = copy.deepcopy(model).train(training)
        batches = [given, _random(given, seed)]
        return twin, batches, [_outputs(twin, batch, seed) for batch in batches]


def _double(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def _random(inputs: _Call, seed: int) -> _Call:
    """Inputs of the same shapes: normal numbers, integers in a random order."""
    random = torch.Generator().manual_seed(seed)

    def drawn(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=random, dtype=value.dtype).to(value.device)
        order = torch.randperm(value.numel(), generator=random).to(value.device)
        return value.reshape(-1)[order].reshape(value.shape)

    shaped: _Call = tree_map_only(Tensor, drawn, inputs)
    return shaped


class _NothingDropped(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dropout and its kin keep everything: what they draw would follow places, not channels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Draws ones."""
        name = func.overloadpacket.__name__
        if name == "bernoulli_":
            return args[0].fill_(1)
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **(kwargs or {}))


def _outputs(model: nn.Module, inputs: _Call, seed: int) -> list[Tensor]:
    args, kwargs = inputs
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices),
        _NothingDropped(),  # type: ignore[no-untyped-call]
    ):
        for generator in (torch.default_generator, *map(_generator, devices)):
            generator.manual_seed(seed)
        found = tree_leaves(model(*args, **kwargs))
    return [each for each in found if isinstance(each, Tensor)]


def _generator(device: int) -> torch.Generator:
    return torch.cuda.default_generators[device]

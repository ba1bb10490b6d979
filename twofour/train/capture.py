"""What each weight of a model is multiplied with, told by hooks while the model runs.

A weight's inputs are the rows of a matrix, float32 [S, K]. For a linear layer a row is what one
token or sample brings, whatever the rank of x. For a convolution it is what one output position
sees: K = taps * C, features in the order (tap, channel), channels fastest, with the padding.

A weight has parts, ranges of as many output channels each, whose inputs differ: the groups of a
convolution, and the queries, keys and values of attention's packed projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from twofour.train.calibration import bare
from twofour.train.layers import Convolution, WeightRef

_CHUNK = 1 << 23
"""Elements of an input matrix made at once: 32 MiB."""
_PROJECTIONS = {
    "in_proj_weight": ("query", "key", "value"),
    "q_proj_weight": ("query",),
    "k_proj_weight": ("key",),
    "v_proj_weight": ("value",),
}


@dataclass(frozen=True, eq=False)
class Read:
    """One use of a weight.

    Args:
        weight: that is used.
        module: that uses it.
        part: the first part that it concerns; of a convolution, x has the inputs of all parts.
        x: the input as the layer gets it: [..., C], or of a convolution [B, C, ...] or [C, ...].
    """

    weight: WeightRef
    module: nn.Module
    part: int
    x: Tensor


Seen = Callable[[Read], None]


def parts_of(weight: WeightRef) -> int:
    """How many ranges of output channels have inputs of their own."""
    return len(_PROJECTIONS.get(weight.attribute, ("",))) * weight.groups


@contextmanager
def watch(model: nn.Module, weights: Sequence[WeightRef], seen: Seen) -> Iterator[None]:
    """Calls `seen` each time that a module is about to use one of the weights.

    The output projection of `nn.MultiheadAttention` is no call of its module: its inputs are what
    the attention gives with the identity in its place, so each attention is computed twice.

    Args:
        model: wrapped or not; the hooks are in the module inside.
        weights: of the model.
        seen: may raise to end the forward pass.
    """
    wanted = {id(weight.parameter): weight for weight in weights}
    inner = bare(model)
    attentions = [m for m in inner.modules() if _is_attention(m)]
    projections = {id(attention.get_submodule("out_proj")) for attention in attentions}
    handles = []
    for module in inner.modules():
        uses = {
            attribute: wanted[id(value)]
            for attribute, value in module.named_parameters(recurse=False)
            if id(value) in wanted
        }
        hook = _layer_hook(uses, seen) if uses and id(module) not in projections else None
        if _is_attention(module):
            output = wanted.get(id(module.get_parameter("out_proj.weight")))
            hook = _attention_hook(uses, output, seen) if uses or output else None
        if hook is not None:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_rows(read: Read) -> Iterator[tuple[int, Tensor]]:
    """The inputs of a use of a weight, some at a time.

    Yields:
        The part, and float32 [S, K], about 32 MiB at most (but one sample at least).
    """
    if not isinstance(read.module, Convolution):
        rows = read.x.detach().reshape(-1, read.x.shape[-1])
        for some in torch.split(rows, max(1, _CHUNK // rows.shape[1])):
            yield read.part, some.float()
        return
    conv, channels = read.module, read.weight.shape[1]
    for part in range(read.weight.groups):
        x = _batched(read)[:, part * channels : (part + 1) * channels]
        per_sample = math.prod(conv.kernel_size) * math.prod(x.shape[1:])
        for some in torch.split(x, max(1, _CHUNK // max(per_sample, 1))):
            taps = [tap.movedim(1, -1) for tap in _taps(conv, _padded(conv, some.float()))]
            yield part, torch.cat(taps, dim=-1).reshape(-1, len(taps) * channels)


def input_squares(read: Read) -> Iterator[tuple[int, Tensor]]:
    """The sums of the squares of the inputs, without the matrix of a convolution.

    Yields:
        The part, and float64 [C, taps...] of it.
    """
    if not isinstance(read.module, Convolution):
        for part, rows in input_rows(read):
            yield part, _sum_of_squares(rows)
        return
    conv, channels = read.module, read.weight.shape[1]
    x = _batched(read)
    sums = torch.zeros(x.shape[1:], dtype=torch.float64, device=exact_device(x.device))
    for some in torch.split(x, max(1, _CHUNK // max(math.prod(x.shape[1:]), 1))):
        sums += _sum_of_squares(some.float())
    # A window's squares are the window of the squares: padding only repeats values or adds zeros.
    windows = _taps(conv, _padded(conv, sums[None]))
    taps = torch.stack([tap.flatten(2).sum(2)[0] for tap in windows], dim=-1)
    taps = taps.reshape(-1, *conv.kernel_size)
    for part in range(read.weight.groups):
        yield part, taps[part * channels : (part + 1) * channels]


def exact_device(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: that device, if it has float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _sum_of_squares(x: Tensor) -> Tensor:
    """float32 [S, ...] -> float64 [...]."""
    return x.square().to(exact_device(x.device)).sum(0, dtype=torch.float64)


def _layer_hook(uses: dict[str, WeightRef], seen: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        for weight in uses.values():
            seen(Read(weight, module, 0, x))

    return hook


def _attention_hook(
    uses: dict[str, WeightRef], output: WeightRef | None, seen: Seen
) -> Callable[..., None]:
    running = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal running
        if running:
            return
        inputs = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        for attribute, weight in uses.items():
            for part, name in enumerate(_PROJECTIONS.get(attribute, ())):
                seen(Read(weight, module, part, inputs[name]))
        if output is not None:
            running = True
            try:
                x = _before_projection(module, args, kwargs)
            finally:
                running = False
            seen(Read(output, module.get_submodule("out_proj"), 0, x))

    return hook


def _before_projection(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What an attention gives with the identity as its output projection."""
    weight = module.get_parameter("out_proj.weight")
    swapped = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
    bias = module.get_submodule("out_proj").bias
    if isinstance(bias, Tensor):
        swapped["out_proj.bias"] = torch.zeros_like(bias)
    outputs: tuple[Tensor, Tensor | None] = torch.func.functional_call(
        module, swapped, args, kwargs
    )
    return outputs[0]


def _is_attention(module: nn.Module) -> bool:
    """Whether it computes attention as torch does, by functions instead of its submodules."""
    attention = isinstance(module, nn.MultiheadAttention)
    return attention and type(module).forward is nn.MultiheadAttention.forward


def _batched(read: Read) -> Tensor:
    """[B, C, ...] of what may be [C, ...]."""
    x = read.x.detach()
    return x if x.ndim == read.weight.parameter.ndim else x[None]


def _padded(conv: Convolution, x: Tensor) -> Tensor:
    """[B, C, ...] with the layer's own padding around it."""
    amounts: list[int] = []  # of the last axis first, before and behind
    for axis in reversed(range(len(conv.kernel_size))):
        if isinstance(conv.padding, str):
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            total = total if conv.padding == "same" else 0
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [conv.padding[axis]] * 2
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return functional.pad(x, amounts, mode) if any(amounts) else x


def _taps(conv: Convolution, padded: Tensor) -> Iterator[Tensor]:
    """What each tap sees at all output positions: [B, C, out...], views."""
    axes = list(zip(conv.kernel_size, conv.dilation, conv.stride, strict=True))
    for tap in product(*(range(size) for size in conv.kernel_size)):
        places: list[slice] = []
        for i, (size, dilation, stride), length in zip(tap, axes, padded.shape[2:], strict=True):
            last = i * dilation + length - dilation * (size - 1) - 1
            places.append(slice(i * dilation, last + 1, stride))
        yield padded[(slice(None), slice(None), *places)]

"""BatchNorm layers that are no longer to change: folded into the layer before, or frozen.

Folding is not needed before quantization: with one scale for each output channel it changes no
integer but its sign, round(w g / (s |g|)) = sign(g) round(w / s), and `export_onnx` folds. It is
for who wants to fine-tune what will run.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from twofour.core.errors import InputError
from twofour.train.calibration import bare
from twofour.train.quantize_run import quantizers_of
from twofour.train.trace import Call, Graph, trace

_FOLDED = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> list[str]:
    """conv(x, w, b) -> BatchNorm   =>   conv(x, w g, (b - mean) g + beta), in place.

    With g = gamma / sqrt(variance + epsilon), one factor for each output channel, so masks hold. A
    BatchNorm that was folded becomes an `nn.Identity`. Legal if: 1. it has running statistics;
    2. nothing but it reads the result of the convolution or linear layer; 3. both run once, and no
    other layer has their parameters.

    Args:
        model: changed; make the optimizer afterwards, since biases are new parameters.
        example_inputs: one batch, as for `Quantizer`.

    Returns:
        The names of the BatchNorm layers that were folded.

    Raises:
        InputError: the model has a Quantizer, or what would be folded in is not finite.
    """
    model = bare(model)
    if quantizers_of(model) is not None:
        raise InputError(
            "cannot fold BatchNorm under a Quantizer: its sites would move",
            fix="fold first, then make the Quantizer; export_onnx folds in any case",
        )
    graph = trace(model, example_inputs)
    modules = dict(model.named_modules())
    folded = []
    for layer_name, norm_name in _pairs(model, graph):
        layer, norm = modules[layer_name], modules[norm_name]
        assert isinstance(layer, _FOLDED)
        assert isinstance(norm, _BatchNorm)
        _fold(layer, norm, norm_name)
        parent, _, name = norm_name.rpartition(".")
        modules[parent]._modules[name] = nn.Identity()
        folded.append(norm_name)
    return folded


def freeze_batchnorm(model: nn.Module, affine: bool = True) -> list[str]:
    """BatchNorm layers normalize by their running statistics from now on, in training mode too.

    Statistics of few or odd batches do not disturb a fine-tuning then. `reestimate_batchnorm`
    leaves these layers as they are.

    Args:
        model: changed in place.
        affine: whether gamma and beta are trained on.

    Returns:
        The names of the layers: those with running statistics.
    """
    frozen = []
    for name, module in bare(model).named_modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is None:
            continue
        if _stay_in_eval not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_stay_in_eval)
        module.eval()
        for parameter in module.parameters():
            parameter.requires_grad_(affine)
        frozen.append(name)
    return frozen


def _stay_in_eval(module: nn.Module, args: object) -> None:
    module.training = False


def _pairs(model: nn.Module, graph: Graph) -> Iterator[tuple[str, str]]:
    """(layer, BatchNorm after it) by name, where folding is legal."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values())
    for call in graph.calls:
        norm = modules.get(call.site.path)
        x = call.input(0)
        before = None if x is None else x.producer
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or x is None:
            continue
        if before is None or len(x.readers) != 1 or x.returned or not _whole(before, modules):
            continue
        names = (before.site.path, call.site.path)
        held = [p for name in names for p in modules[name]._parameters.values() if p is not None]
        if all(graph.modules[n] == 1 for n in names) and all(owners[id(p)] == 1 for p in held):
            yield names


def _whole(call: Call, modules: dict[str, nn.Module]) -> bool:
    """Whether the call is all that a layer does, channels on axis 1 of the result."""
    module = modules.get(call.site.path)
    if isinstance(module, nn.Linear):
        return call.function == "linear" and len(call.outputs[0].shape) == 2
    return isinstance(module, _FOLDED) and call.function in ("conv1d", "conv2d", "conv3d")


@torch.no_grad()
def _fold(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear, norm: _BatchNorm, name: str
) -> None:
    mean, variance = (norm.get_buffer(n).double() for n in ("running_mean", "running_var"))
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    g = gamma / torch.sqrt(variance + norm.eps)
    bias: Tensor = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
    added = (bias - mean) * g + beta
    if not bool(g.isfinite().all() and added.isfinite().all()):
        raise InputError(
            f"cannot fold {name} into the layer before it",
            ["its factors gamma / sqrt(variance + epsilon), or its biases, are not all finite"],
            "look for NaN in the weights of the BatchNorm, or reestimate_batchnorm",
        )
    weight = layer.weight.double() * g.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(added.to(layer.weight.dtype))

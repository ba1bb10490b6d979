"""Weights drawn from a seed, such that a network's values neither vanish nor grow with its depth.

Biases and norms are drawn too: equal ones would be stored once in an exported file, which no
trained network allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

_NORMS = (nn.BatchNorm2d, nn.LayerNorm)
Module = TypeVar("Module", bound=nn.Module)


def seeded(make: Callable[[], Module], images: tuple[int, ...] | None = None) -> Module:
    """A network with weights that are the same in each process.

    Args:
        make: builds the network; called with the random state set.
        images: shape of a batch of random images that the statistics of BatchNorm are taken from,
            layer after layer; None where there is no BatchNorm.

    Returns:
        In eval mode. The caller's random state is as before.
    """
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        model.apply(_draw)
        if images is not None:
            _settle(model, torch.randn(images))
    return model.eval()


def _draw(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.normal_(module.bias, std=0.02)
    if isinstance(module, _NORMS):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.normal_(module.bias, std=0.02)


def _settle(model: nn.Module, images: Tensor) -> None:
    """Takes the statistics of every BatchNorm from one pass over the images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(images)
    for norm in norms:
        norm.momentum = 0.1

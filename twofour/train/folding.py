"""Folds permutations of channels into the parameters and buffers of a model."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from twofour.core.channels import Ids, Space
from twofour.train.channels import ChannelGraph


class Folded:
    """Copies of a model's tensors, with permutations of channels folded in.

    Args:
        graph: of the model.
        model: stays as it is until `write`.

    Attributes:
        tensors: by name; on the CPU.
        roots: name -> for each axis the channels that it holds, int64 [size], or None.
        spaces: of the graph.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        """Copies all parameters and buffers that hold channels."""
        self.graph = graph
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.tensors: dict[str, Tensor] = {
            name: state[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            for name in graph.axes
            if name in state
        }
        self.roots = {
            name: [None if ids is None else graph.channels.roots(ids) for ids in axes]
            for name, axes in graph.axes.items()
        }
        self.spaces = graph.channels.spaces()
        self._holders = self._find_holders()

    def holders(self, space: Space) -> list[tuple[str, int]]:
        """(name, axis) of all that hold channels of a space; an axis holds all or none of them."""
        return self._holders[int(space.roots[0])]

    def write(self, model: nn.Module) -> None:
        """Copies the tensors into the model that they came from, or one like it."""
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                state[name].copy_(tensor)

    def fold(self, space: Space, order: Ids) -> None:
        """Permutes the channels of a space in all tensors that hold them.

        Args:
            space: of the graph.
            order: int64 [S]; channel i becomes what channel `order[i]` was.
        """
        for name, axis in self.holders(space):
            if axis == 1 and name in self.graph.grouped:
                held = self.graph.channels.roots(self.graph.grouped[name])
                places = space.sources(held.reshape(-1), order).reshape(held.shape)
                self._fold_groups(name, places % held.shape[1])
                continue
            roots = self.roots[name][axis]
            assert roots is not None
            sources = torch.from_numpy(space.sources(roots, order))
            self.tensors[name] = self.tensors[name].index_select(axis, sources)

    def _find_holders(self) -> dict[int, list[tuple[str, int]]]:
        """First channel of a space -> those that hold it, and with it the others."""
        firsts = np.array([space.roots[0] for space in self.spaces], np.int64)
        found: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for name, axes in self.roots.items():
            for axis, roots in enumerate(axes):
                if axis == 1 and name in self.graph.grouped:
                    roots = self.graph.channels.roots(self.graph.grouped[name])
                if roots is not None:
                    for root in np.intersect1d(roots, firsts).tolist():
                        found[root].append((name, axis))
        return found

    def _fold_groups(self, name: str, sources: Ids) -> None:
        weight = self.tensors[name]
        parts = [
            part.index_select(1, torch.from_numpy(columns))
            for part, columns in zip(weight.chunk(len(sources)), sources, strict=True)
        ]
        self.tensors[name] = torch.cat(parts)

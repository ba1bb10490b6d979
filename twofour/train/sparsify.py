"""Prunes the weights of a PyTorch model to an N:M pattern, and holds the masks while it is trained.

A mask is a buffer of the module it belongs to (`conv1.weight_mask`), so it moves with the model, is
saved with it, and a loaded checkpoint brings its own masks. To resume: build the model, `prune()`,
then load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from twofour.core import patterns
from twofour.core.errors import GateError, InputError
from twofour.core.masks import magnitude_mask

MASK = "weight_mask"
Prunable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
CRITERIA = ("magnitude",)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        name: of the module in the model.
        shape: of its weight.
        pattern: the name of the pattern it has now, or "dense".
        reason: why it was left dense; empty if it was pruned.
        density: share of its weights that is not zero.
        energy_kept: share of the sum of squares that the mask kept when it was made.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    reason: str
    density: float
    energy_kept: float

    @property
    def pruned(self) -> bool:
        """Whether a mask holds this layer."""
        return not self.reason


class Sparsifier:
    """Prunes convolutions and linear layers, and keeps them pruned.

    A layer is pruned if it matches `include` (or there is none), does not match `exclude`, and its
    shape allows the pattern. Names are those of `model.named_modules()`, with wildcards as in
    `fnmatch`.

        sparsifier = Sparsifier(model, pattern="2:4", exclude=["linear"]).prune()
        sparsifier.attach(optimizer)       # then train as before
        sparsifier.verify()

    Args:
        model: pruned in place.
        pattern: `2:4`, `4:8`, `2:4/pair` or another N:M.
        criterion: how weights are ranked; `magnitude`.
        include: patterns of module names; None means all.
        exclude: patterns of module names that stay dense.

    Raises:
        InputError: an unknown pattern or criterion, or a name pattern that matches no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str | patterns.Pattern = "2:4",
        criterion: str = "magnitude",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        """Decides which layers are pruned; changes nothing yet."""
        if criterion not in CRITERIA:
            raise InputError(
                f"unknown pruning criterion {criterion!r}", fix=f"use {' or '.join(CRITERIA)}"
            )
        self.pattern = patterns.Pattern.parse(pattern)
        self.criterion = criterion
        self._layers = _prunable_layers(model)
        self._reasons = _reasons_to_skip(self._layers, self.pattern, include, exclude)
        self._energy_kept: dict[str, float] = {}

    def prune(self) -> Sparsifier:
        """Chooses the masks from the weights as they are now, and applies them.

        Returns:
            itself.

        Raises:
            InputError: no layer can be pruned, or a weight holds a value that is not finite.
        """
        if len(self._reasons) == len(self._layers):
            reasons = [f"{name}: {reason}" for name, reason in self._reasons.items()]
            raise InputError(
                f"no layer of this model can have pattern {self.pattern}",
                reasons or ["it has no convolution and no linear layer"],
                "check include and exclude, or choose another pattern",
            )
        masks = {name: self._mask(name, layer) for name, layer in self._chosen()}
        for name, layer in self._chosen():
            mask = masks[name]
            self._energy_kept[name] = patterns.energy_kept(_as_array(layer.weight), mask)
            layer.register_buffer(MASK, torch.from_numpy(mask).to(layer.weight.device))
        self.apply()
        return self

    @torch.no_grad()
    def apply(self) -> None:
        """Sets every masked weight to zero. `attach` does this after each optimizer step."""
        for _, layer, mask in self._masked():
            layer.weight.masked_fill_(~mask, 0.0)

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Re-applies the masks after each step of this optimizer, to weights and to its momentum.

        Args:
            optimizer: holds the parameters of the model.

        Returns:
            A handle; its `remove()` ends this.

        Raises:
            InputError: `prune()` was not called, or the optimizer holds none of the pruned weights.
        """
        pruned = {id(layer.weight) for _, layer, _ in self._masked()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if pruned.isdisjoint(held):
            raise InputError(
                "the optimizer holds none of the pruned weights",
                ["it was built from another model, or from a copy of this one"],
                "build the optimizer from model.parameters() of the model that was pruned",
            )

        @torch.no_grad()
        def hold_masks(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            for _, layer, mask in self._masked():
                removed = ~mask
                layer.weight.masked_fill_(removed, 0.0)
                for value in optimizer.state.get(layer.weight, {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == removed.shape:
                        value.masked_fill_(removed, 0.0)

        return optimizer.register_step_post_hook(hold_masks)

    def verify(self) -> None:
        """Checks every pruned weight against the pattern.

        Raises:
            GateError: names the first violation in each layer that has one.
        """
        broken = []
        for name, layer, _ in self._masked():
            violation = patterns.first_violation(_as_array(layer.weight), self.pattern)
            if violation is not None:
                broken.append(f"{name}: weight is not {self.pattern}: {violation}")
        if broken:
            raise GateError(
                f"{len(broken)} pruned layers no longer have pattern {self.pattern}",
                broken,
                "call Sparsifier.attach(optimizer) before training, and load weights together "
                "with the masks they were saved with",
            )

    def report(self) -> list[LayerReport]:
        """One entry for each convolution and linear layer, in the model's order."""
        entries = []
        for name, layer in self._layers.items():
            weight = _as_array(layer.weight)
            reason = self._reasons.get(name, "")
            if not reason and name not in self._energy_kept:
                reason = "not pruned yet"
            entries.append(
                LayerReport(
                    name,
                    weight.shape,
                    "dense" if reason else str(self.pattern),
                    reason,
                    float(np.count_nonzero(weight)) / weight.size,
                    self._energy_kept.get(name, 1.0),
                )
            )
        return entries

    def remove(self) -> None:
        """Forgets the masks and leaves the weights; `state_dict` has its old names again."""
        for _, layer, _ in list(self._masked()):
            delattr(layer, MASK)
        self._energy_kept.clear()

    def _mask(self, name: str, layer: Prunable) -> NDArray[np.bool_]:
        try:
            return magnitude_mask(_as_array(layer.weight), self.pattern)
        except InputError as e:
            raise InputError(f"cannot prune {name}: {e.what}", e.reasons, e.fix) from e

    def _chosen(self) -> Iterator[tuple[str, Prunable]]:
        return ((n, layer) for n, layer in self._layers.items() if n not in self._reasons)

    def _masked(self) -> Iterator[tuple[str, Prunable, torch.Tensor]]:
        if not self._energy_kept:
            raise InputError("the model has no masks", fix="call Sparsifier.prune() first")
        for name, layer in self._chosen():
            yield name, layer, layer.get_buffer(MASK)


def _prunable_layers(model: nn.Module) -> dict[str, Prunable]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Prunable)}


def _reasons_to_skip(
    layers: dict[str, Prunable],
    pattern: patterns.Pattern,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> dict[str, str]:
    """Why each layer that stays dense does so."""
    for name_pattern in (*(include or ()), *(exclude or ())):
        if not any(fnmatchcase(name, name_pattern) for name in layers):
            raise InputError(
                f"{name_pattern!r} matches no convolution or linear layer",
                ["the layers are: " + ", ".join(layers)],
            )
    reasons = {}
    for name, layer in layers.items():
        excluded_by = _first_match(name, exclude or ())
        if include is not None and _first_match(name, include) is None:
            reasons[name] = "not matched by include"
        elif excluded_by is not None:
            reasons[name] = f"excluded by {excluded_by!r}"
        else:
            too_odd = patterns.ineligible(layer.weight.shape, pattern)
            if too_odd is not None:
                reasons[name] = too_odd
    return reasons


def _first_match(name: str, name_patterns: Iterable[str]) -> str | None:
    return next((p for p in name_patterns if fnmatchcase(name, p)), None)


def _as_array(weight: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = weight.detach().to("cpu", torch.float32).numpy()
    return array

"""Permutes the channels of a model so that N:M masks keep more of its weights.

Channels are permuted where all layers that write them and all that read them can be permuted along
(`train/channels.py`), so that the model computes what it did, at the same cost. That it does is
proven in float64 before the model is changed. Do this before pruning and before an optimizer is
made.

Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from twofour.core import criteria
from twofour.core.channels import ALONE, Ids, Space
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.masks import mask_of
from twofour.core.patterns import Pattern
from twofour.core.permutation import rows_of, search
from twofour.core.progress import Report, silent
from twofour.train.channels import ChannelGraph, Inputs, trace_channels
from twofour.train.folding import Folded
from twofour.train.layers import WeightRef, survey
from twofour.train.permute_report import PermutationReport, SpaceReport, StaysReport
from twofour.train.report import select
from twofour.train.same_outputs import require_same


def permute(
    model: nn.Module,
    example_inputs: Inputs,
    pattern: str | Pattern | Mapping[str, str | Pattern] = "2:4",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    effort: int = 1,
    seed: int = 0,
    report: Report = silent,
) -> PermutationReport:
    """Permutes channels in place so that magnitude masks keep more energy.

    Args:
        model: not pruned yet; its outputs stay the same up to rounding.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        pattern: one for all weights, or name patterns and what they get, as of `Sparsifier`.
        include: name patterns of the weights that will be pruned; None means all.
        exclude: name patterns of weights that stay dense.
        effort: 0 to 3, see `core/permutation.py`.
        seed: of the search; equal seeds give equal models.
        report: called for each space of channels.

    Returns:
        What was gained where, and why the other channels stay.

    Raises:
        InputError: the model has masks already, or a name pattern matches nothing.
        UnsupportedError: torch cannot trace the model, or it is TorchScript.
        GateError: the permuted model does not compute the same; the model is left as it was.

    Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021.
    """
    _require_python(model)
    _require_dense(model)
    found = survey(model)
    chosen = select(found, pattern, include, exclude).patterns
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    weights = {
        names[id(entry.parameter)]: _Weight(entry, chosen[entry.name])
        for entry in found
        if isinstance(entry, WeightRef) and entry.name in chosen
    }
    graph = trace_channels(model, example_inputs)
    searching = _Search(graph, model, weights)
    spaces = searching.read_spaces()
    done = []
    for index, space in enumerate(spaces):
        report(index, len(spaces), f"{len(space)} channels")
        done.append(searching.improve(space, effort, seed))
    for training in (False, True) if graph.training else (False,):
        require_same(model, example_inputs, searching.folded.tensors, seed, training=training)
    searching.folded.write(model)
    return searching.report(done)


@dataclass(frozen=True)
class _Weight:
    """One that will be pruned."""

    ref: WeightRef
    pattern: Pattern

    def kept(self, values: NDArray[np.float32]) -> float:
        """Energy that its mask keeps."""
        energy = criteria.magnitude(values)
        return float(energy[mask_of(energy, self.pattern)].sum(dtype=np.float64))


@dataclass(frozen=True)
class _View:
    """Some columns of a weight that are the channels of one space, in groups of m.

    Attributes:
        name: of the weight.
        group: of its convolution.
        slots: int64 [C], channels of the space; m neighbours share masks.
        columns: int64 [C], their places among the weight's columns.
    """

    name: str
    group: int
    slots: Ids
    columns: Ids


class _Search:
    """Tensors of a model, and channel permutations folded into them."""

    def __init__(self, graph: ChannelGraph, model: nn.Module, weights: dict[str, _Weight]) -> None:
        self.graph, self.weights = graph, weights
        self.folded = Folded(graph, model)
        self.reads: dict[str, Ids] = {}
        for name in weights:
            ids = graph.reads(name)
            if ids is not None:
                self.reads[name] = graph.channels.roots(ids)
        self.kept = {name: weight.kept(self._array(name)) for name, weight in weights.items()}
        self.before = dict(self.kept)

    def read_spaces(self) -> list[Space]:
        """The spaces that a weight which will be pruned reads."""
        return [
            space
            for space in self.folded.spaces
            if any(name in self.weights for name in self._readers(space))
        ]

    def improve(self, space: Space, effort: int, seed: int) -> SpaceReport:
        """Searches an order for the channels of a space, and folds it in if masks keep more."""
        written, read = self._writers(space), self._readers(space)
        pruned = [name for name in read if name in self.weights]
        shared = [name for name in written if name in self.weights and name not in pruned]
        touched = pruned + [name for name in shared if _rows_share(self.weights[name].pattern)]
        earlier = {name: self.kept[name] for name in touched}
        order, note = self._search(space, read, effort, seed)
        if order is not None:
            self.folded.fold(space, order)
            now = {name: self.weights[name].kept(self._array(name)) for name in touched}
            if sum(now.values()) > sum(earlier.values()):
                self.kept.update(now)
            else:
                self.folded.fold(space, np.argsort(order))
                note = "no better order was found"
        before, after = (sum(kept[n] for n in pruned) for kept in (earlier, self.kept))
        energy = sum(self._energy(name) for name in pruned)
        names = tuple(self.weights[name].ref.name for name in pruned)
        return SpaceReport(len(space), names, tuple(written), before, after, energy, note)

    def report(self, spaces: list[SpaceReport]) -> PermutationReport:
        """What was gained, and which channels of which weights stay."""
        fixed, alone = self.graph.channels.fixed(), self.graph.channels.alone()
        free = {root for s in self.folded.spaces for root in s.roots.tolist()}
        stays = []
        for name, weight in self.weights.items():
            if name not in self.reads:
                columns = self.folded.tensors[name].shape[1] if name in self.folded.tensors else 0
                stays.append(StaysReport(weight.ref.name, columns, "it was not run"))
                continue
            reasons = Counter(
                fixed.get(root, alone.get(root, ALONE))
                for root in self.reads[name].reshape(-1).tolist()
                if root not in free
            )
            for reason, count in reasons.most_common():
                stays.append(StaysReport(weight.ref.name, count, reason))
        before, after = sum(self.before.values()), sum(self.kept.values())
        total = sum(self._energy(name) for name in self.weights)
        return PermutationReport(tuple(spaces), tuple(stays), before, after, total)

    def _search(
        self, space: Space, read: list[str], effort: int, seed: int
    ) -> tuple[Ids | None, str]:
        """The order that the readers whose groups agree want."""
        alike: dict[tuple[Any, ...], list[_View]] = defaultdict(list)
        for name in read:
            for view in self._views(space, name):
                pattern = self.weights[name].pattern
                alike[pattern.n, pattern.m, view.slots.tobytes()].append(view)
        if not alike:
            return None, "no layer that will be pruned reads whole groups of its channels"
        (n, m, _), views = max(alike.items(), key=lambda item: self._rows(item[1]))
        slots = views[0].slots
        if len(slots) == m:
            return None, f"it is a single group of {m}"
        rows = np.concatenate([self._energies(view) for view in views])
        found = search(rows, Pattern(n, m), effort=effort, seed=seed)
        order = np.arange(len(space))
        order[slots] = slots[found.order]
        return order, "" if found.after > found.before else "no better order was found"

    def _views(self, space: Space, name: str) -> list[_View]:
        """How a weight that will be pruned reads the channels of a space."""
        if name not in self.weights:
            return []
        m, views = self.weights[name].pattern.m, []
        for group, roots in enumerate(self.reads[name]):
            for columns in space.places(roots).T if np.isin(space.roots, roots).all() else ():
                numbers = columns // m
                whole = np.bincount(numbers)[numbers] == m
                slots = np.flatnonzero(whole)
                slots = slots[np.lexsort((slots, numbers[slots]))]
                by_group = slots.reshape(-1, m)
                slots = by_group[np.argsort(by_group[:, 0])].reshape(-1)
                if len(slots):
                    views.append(_View(name, group, slots, columns[slots]))
        return views

    def _rows(self, views: list[_View]) -> int:
        return sum(self.folded.tensors[v.name].numel() // self.reads[v.name].size for v in views)

    def _energies(self, view: _View) -> NDArray[np.floating[Any]]:
        """One row for each mask."""
        values, groups = self._array(view.name), len(self.reads[view.name])
        rows = len(values) // groups
        part = values[view.group * rows : (view.group + 1) * rows]
        pattern = self.weights[view.name].pattern
        if groups > 1 or pattern.both:  # masks shared by rows of other columns: as if they were not
            pattern = Pattern(pattern.n, pattern.m)
        return rows_of(criteria.magnitude(part[:, view.columns]), pattern)

    def _readers(self, space: Space) -> list[str]:
        return [name for name, axis in self.folded.holders(space) if axis == 1]

    def _writers(self, space: Space) -> list[str]:
        """Matrices and filters whose rows are channels of the space."""
        return [
            name
            for name, axis in self.folded.holders(space)
            if axis == 0 and len(self.folded.roots[name]) > 1
        ]

    def _array(self, name: str) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self.folded.tensors[name].to(torch.float32).numpy()
        return array

    def _energy(self, name: str) -> float:
        return float(np.square(self._array(name), dtype=np.float64).sum())


def _rows_share(pattern: Pattern) -> bool:
    """Whether the order of output channels changes what masks keep."""
    return pattern.pair or pattern.both


def _require_python(model: nn.Module) -> None:
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedError(
            f"cannot permute the channels of {type(model).__name__}",
            [f"a TorchScript module: {scripted[0] or 'the model itself'}"],
            "permute the model before it is scripted",
        )


def _require_dense(model: nn.Module) -> None:
    masked = [
        entry.name
        for entry in survey(model)
        if isinstance(entry, WeightRef) and entry.mask is not None
    ]
    if masked:
        raise InputError(
            "cannot permute the channels of a model that has masks",
            [f"masked: {', '.join(masked[:5])}" + (", ..." if len(masked) > 5 else "")],
            "permute first, then prune; Sparsifier.remove() forgets the masks",
        )

"""SparseGPT for PyTorch models: each layer is pruned for the inputs that the pruned ones give it.

The layers are taken in the order in which the model runs them. For each, the calibration batches
run through the model as it is by then, up to that layer, and the Gram matrix of its inputs is added
up; then `core/sparsegpt.py` chooses the mask and the new weights. So a layer also makes up for what
those before it lost. Layers that read the same tensor, such as queries, keys and values, share a
run.

Source: Frantar and Alistarh 2023, arXiv:2301.00774.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.core.patterns import Pattern, energy_kept
from twofour.core.sparsegpt import Factor, factor, sparsegpt
from twofour.train.calibration import (
    Calibration,
    as_it_was,
    bare,
    batches_of,
    require_repeatable,
)
from twofour.train.capture import Read, exact_device, input_rows, parts_of, watch
from twofour.train.layers import WeightRef
from twofour.train.ranks import from_first_rank, over_all_ranks, sum_over_ranks
from twofour.train.statistics import require_finite, require_used

_NAME = "SparseGPT"


@dataclass(frozen=True)
class Pruned:
    """What a criterion chose, by the names of the weights.

    Args:
        masks: bool, shape and device of the weight.
        energy_kept: share of the sum of squares of the old values that the mask keeps, where the
            criterion has changed the values.
    """

    masks: dict[str, Tensor]
    energy_kept: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReconstructOptions:
    """How SparseGPT runs.

    Args:
        damping: share of the mean of a Gram matrix's diagonal that is added to the diagonal.
        block: columns whose changes are collected before the columns behind them see them.
        memory_bytes: bound of the Gram matrices held at once; solving takes three to four times
            the largest one more.
        sequential: whether a layer's inputs are those of the model with all layers before it
            pruned. If not, as many layers as `memory_bytes` allows share a run through the batches:
            faster, and each makes up for its own losses only.
    """

    damping: float = 0.01
    block: int = 128
    memory_bytes: int = 2 << 30
    sequential: bool = True


def reconstruct(
    model: nn.Module,
    weights: Sequence[WeightRef],
    patterns: Mapping[str, Pattern],
    data: Calibration,
    options: ReconstructOptions | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
) -> Pruned:
    """Prunes weights and changes those that stay, so that the layers' outputs change little.

    The model runs in eval mode; its modes and the state of the random generators stay as they were,
    and after an error its weights too. Under `torch.distributed` each process brings its own
    batches, and all get the same weights and masks.

    Args:
        model: whose weights they are; changed in place.
        weights: that are pruned.
        patterns: name of each weight -> the pattern it gets, which its shape can have.
        data: batches that can be run through several times: a list, a DataLoader, or a function
            that returns an iterator.
        options: default `ReconstructOptions()`.
        masks: by name, bool, the shape of the weight: then none is chosen, and the weights that
            stay make up for the others.

    Returns:
        The masks, and how much of the old weights they keep.

    Raises:
        InputError: the batches are none or can be run through only once, a weight is never used,
            a Gram matrix is not finite or larger than `memory_bytes`, a weight is not finite, or
            its parts (see `capture.py`) cut the pattern's groups of output channels.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774.
    """
    options, model = options or ReconstructOptions(), bare(model)
    require_repeatable(data.batches, _NAME)
    _require_fit(weights, patterns, options)
    found = Pruned({})
    with as_it_was(model), torch.no_grad(), _undone_on_failure(weights):
        plan = _survey(model, weights, data)
        solver = _Solver(patterns, options, masks)
        for group in _groups(plan, options):
            grams = _gram_sums(model, group, plan.uses, _from(data, len(found.masks), len(weights)))
            for weight in group:
                solver.prune(weight, grams[weight.name], found)
                data.report(len(found.masks), len(weights), f"{_NAME}: {weight.name}")
    return found


@dataclass(frozen=True)
class _Plan:
    """In which order a model uses its weights.

    Args:
        order: of their first uses.
        uses: of a weight in one batch, by name.
        shared: names of weights that read the very tensor that the weight before them reads.
    """

    order: list[WeightRef]
    uses: dict[str, int]
    shared: set[str]


def _survey(model: nn.Module, weights: Sequence[WeightRef], data: Calibration) -> _Plan:
    """Runs batches until each weight was used."""
    uses: dict[str, int] = {}
    now: Counter[str] = Counter()
    shared: set[str] = set()
    last: Tensor | None = None

    def note(read: Read) -> None:
        nonlocal last
        name = read.weight.name
        if read.x is last and name not in uses and name not in now:
            shared.add(name)
        now[name] += 1
        last = read.x

    with watch(model, weights, note):
        for batch in batches_of(data.batches, model, _NAME):
            data.forward(model, batch)
            for name, count in now.items():
                uses.setdefault(name, count)
            now.clear()
            last = None
            if len(uses) == len(weights):
                break
    order = over_all_ranks(list(uses))
    require_used(weights, set(order), _NAME)
    by_name = {weight.name: weight for weight in weights}
    return _Plan([by_name[name] for name in order], uses, set(over_all_ranks(sorted(shared))))


def _groups(plan: _Plan, options: ReconstructOptions) -> Iterator[list[WeightRef]]:
    """The weights whose Gram matrices are added up in one run."""
    group: list[WeightRef] = []
    held_bytes = 0
    for weight in plan.order:
        more_bytes = _gram_bytes(weight)
        apart = options.sequential and weight.name not in plan.shared
        if group and (apart or held_bytes + more_bytes > options.memory_bytes):
            yield group
            group, held_bytes = [], 0
        group.append(weight)
        held_bytes += more_bytes
    yield group


class _EnoughError(BaseException):
    """Ends a forward pass from within; no `except Exception` of a model may keep it."""


def _gram_sums(
    model: nn.Module, group: Sequence[WeightRef], uses: Mapping[str, int], data: Calibration
) -> dict[str, list[Tensor]]:
    """For each part of each weight the sum of x x^T of its inputs, float64 [K, K].

    A batch ends as soon as all weights of the group were used as often as in the survey.
    """
    sums = {weight.name: _no_gram(weight) for weight in group}
    left: Counter[str] = Counter()

    def add(read: Read) -> None:
        name = read.weight.name
        for part, rows in input_rows(read):
            with torch.autocast(rows.device.type, enabled=False):
                sums[name][part] += (rows.T @ rows).to(sums[name][part].device)
        left[name] -= 1
        if all(left[weight.name] <= 0 for weight in group):
            raise _EnoughError

    with watch(model, group, add):
        for index, batch in enumerate(batches_of(data.batches, model, _NAME)):
            left.update({weight.name: uses.get(weight.name, 0) for weight in group})
            with suppress(_EnoughError):
                data.forward(model, batch)
            left.clear()
            data.report(index + 1, None, group[0].name)
    sum_over_ranks(part for weight in group for part in sums[weight.name])
    for weight in group:
        require_finite(weight.name, sums[weight.name], "inputs")
    return sums


def _from(data: Calibration, pruned: int, weights: int) -> Calibration:
    """The same data, whose batches are told of as being between two of the weights."""

    def report(done: int, total: int | None, what: str) -> None:
        data.report(pruned, weights, f"{_NAME}: {what}, batch {done}")

    return replace(data, report=report)


@dataclass
class _Solver:
    """Prunes one weight after the other; those with equal inputs share the factorization."""

    patterns: Mapping[str, Pattern]
    options: ReconstructOptions
    masks: Mapping[str, Tensor] | None
    _gram: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    _factor: Factor = field(default_factory=lambda: Factor(np.empty((0, 0)), np.empty((0, 0)), 0.0))

    def prune(self, weight: WeightRef, grams: Sequence[Tensor], found: Pruned) -> None:
        """Sets the weight's values, and notes its mask."""
        parameter = weight.parameter
        old = parameter.detach().float().cpu().numpy()
        new, mask = np.empty_like(old), np.empty(old.shape, np.bool_)
        given = None if self.masks is None else self.masks[weight.name].cpu().numpy()
        size = len(old) // len(grams)
        for part, gram in enumerate(grams):
            rows = slice(part * size, (part + 1) * size)
            try:
                new[rows], mask[rows] = sparsegpt(
                    old[rows],
                    self._factored(gram.cpu().numpy()),
                    self.patterns[weight.name],
                    block=self.options.block,
                    mask=None if given is None else given[rows],
                )
            except InputError as e:
                raise InputError(f"cannot prune {weight.name}: {e.what}", e.reasons, e.fix) from e
        values = torch.from_numpy(new).to(parameter.device)
        kept = torch.from_numpy(mask).to(parameter.device)
        from_first_rank([values, kept.view(torch.uint8)])
        found.masks[weight.name] = kept
        found.energy_kept[weight.name] = energy_kept(old, kept.cpu().numpy())
        parameter.copy_(values)  # and `old`, if it is a view of the weight

    def _factored(self, gram: NDArray[np.float64]) -> Factor:
        if not np.array_equal(gram, self._gram):
            self._gram, self._factor = gram, factor(gram, self.options.damping)
        return self._factor


def _features(weight: WeightRef) -> int:
    """K: taps * input channels."""
    return math.prod(weight.shape[1:])


def _gram_bytes(weight: WeightRef) -> int:
    return 8 * parts_of(weight) * _features(weight) ** 2


def _no_gram(weight: WeightRef) -> list[Tensor]:
    shape = (_features(weight), _features(weight))
    device = exact_device(weight.parameter.device)
    return [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(parts_of(weight))]


def _require_fit(
    weights: Sequence[WeightRef], patterns: Mapping[str, Pattern], options: ReconstructOptions
) -> None:
    """Refuses what the memory or the parts of a weight rule out."""
    problems = []
    for weight in weights:
        pattern = patterns[weight.name]
        together = pattern.together
        needed, size = _gram_bytes(weight), weight.shape[0] // parts_of(weight)
        if needed > options.memory_bytes:
            problems.append(f"{weight.name}: its Gram matrices take {needed:,} bytes")
        if parts_of(weight) > 1 and size % together:
            problems.append(
                f"{weight.name}: each {size} output channels have inputs of their own, but "
                f"{pattern} treats {together} as one"
            )
    if problems:
        raise InputError(
            f"{_NAME} cannot prune these layers with memory_bytes={options.memory_bytes:,}",
            problems,
            "raise memory_bytes, exclude these layers, or prune them by another criterion",
        )


@contextmanager
def _undone_on_failure(weights: Sequence[WeightRef]) -> Iterator[None]:
    """The weights have their values again if what is inside fails."""
    before = [weight.parameter.detach().to("cpu", copy=True) for weight in weights]
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            for weight, values in zip(weights, before, strict=True):
                weight.parameter.copy_(values)

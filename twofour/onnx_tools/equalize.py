"""Equalizes the channels between layers, so that one scale for all of them loses less.

    y = relu(w1 x + b1),  z = w2 y    =>    y / s = relu((w1 / s) x + b1 / s),  z = (w2 s) (y / s)

The function stays (`rescale.py`), and so do zeros of weights. Channels that are read together, by
one layer or several, get their factors together: of some alphas the one with which, on samples,
int8 does the least damage to what reads them (`core/equalize.py`); none where that is not clearly
less.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1; Xiao et al. 2023, arXiv:2211.10438.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.channels import Ids
from twofour.core.equalize import columns, damage, smoothing
from twofour.core.progress import Report, silent
from twofour.core.ranges import RangeOptions
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.edit import constant, operand
from twofour.onnx_tools.rescale import Read, Traced, rescale, trace
from twofour.onnx_tools.watch import Channel, Watched, watch

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WORTH = 0.7
"""Factors after which there is more than this share of the damage are not worth it."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Equalized:
    """What became of channels that are read together.

    Attributes:
        values: names of what the layers read.
        layers: names of the layers.
        alpha: of the factors; None where there are none.
        reason: why not.
        before: what int8 did to the layers' products, as a share of their energy, summed.
        after: what it does with the factors.
    """

    values: tuple[str, ...]
    layers: tuple[str, ...]
    alpha: float | None
    reason: str = ""
    before: float = 0.0
    after: float = 0.0


@dataclass(frozen=True)
class _Group:
    """Layers that read the same channels.

    Attributes:
        reads: of each layer what it reads.
        roots: of each layer int64 [C], the channels.
        free: int64, those that can be scaled, ascending.
        reason: why others cannot.
    """

    reads: tuple[Read, ...]
    roots: tuple[Ids, ...]
    free: Ids
    reason: str

    def left(self, reason: str) -> Equalized:
        """That nothing became of it."""
        return self._result(None, reason)

    def done(self, alpha: float, before: float, after: float) -> Equalized:
        """That it has factors now."""
        return self._result(alpha, "", before, after)

    def _result(
        self, alpha: float | None, reason: str, before: float = 0.0, after: float = 0.0
    ) -> Equalized:
        values = dict.fromkeys(str(read.value.name) for read in self.reads)
        layers = tuple(str(read.layer.name) for read in self.reads)
        return Equalized(tuple(values), layers, alpha, reason, before, after)

    def largest(self, index: int, of_axis: Float64, found: Float64) -> None:
        """Raises `found` [free] to what the positions of a layer's axis have."""
        mine = np.isin(self.roots[index], self.free)
        places = np.searchsorted(self.free, self.roots[index][mine])
        np.maximum.at(found, places, of_axis[mine])

    def spread(self, index: int, s: Float64) -> Float64:
        """The factors [free] along a layer's axis; 1 for channels that stay."""
        full, mine = np.ones(len(self.roots[index])), np.isin(self.roots[index], self.free)
        full[mine] = s[np.searchsorted(self.free, self.roots[index][mine])]
        return full


def equalize(
    model: ir.Model,
    samples: Samples,
    options: RangeOptions,
    *,
    normalized: bool = False,
    progress: Report = silent,
) -> tuple[Equalized, ...]:
    """Equalizes channels.

    Args:
        model: prepared and float; changed.
        samples: what it will see.
        options: how activations will be quantized.
        normalized: take the channels that a normalization begins or an attention hands on, which
            are otherwise left (see `smooth.py`), and only those.
        progress: called with the samples done.

    Returns:
        What became of each group of channels that layers read together.

    Raises:
        InputError: the data does not fit the model's inputs, or it or a value is not finite.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    traced = trace(model)
    rows = set(
        traced.channels.roots(np.concatenate([np.zeros(1, np.int64), *traced.rows])).tolist()
    )
    groups = [
        group
        for group in _groups(traced)
        if normalized == any(not rows.isdisjoint(roots.tolist()) for roots in group.roots)
    ]
    wanted = [_channel(read) for group in groups if group.free.size for read in group.reads]
    seen = watch(model, wanted, samples, progress) if wanted else {}
    found, factors = [], dict[int, float]()
    for group in groups:
        done, chosen = _choose(group, seen, options)
        found.append(done)
        factors |= chosen
    rescale(model, traced, factors)
    return tuple(found)


def _groups(traced: Traced) -> list[_Group]:
    """Layers that read the same channels, together, in the order of the data."""
    fixed, members = traced.channels.fixed(), dict[int, list[Read]]()
    for read in traced.reads:
        roots = np.unique(traced.channels.roots(read.ids)).tolist()
        near = {id(members[root]): members[root] for root in roots if root in members}
        joined = [*(each for group in near.values() for each in group), read]
        for each in joined:
            own = np.unique(traced.channels.roots(each.ids)).tolist()
            members |= {root: joined for root in own if root > 0}
    every = {id(group): group for group in members.values()}
    return [_group(traced, group, fixed) for group in every.values()]


def _group(traced: Traced, reads: Sequence[Read], fixed: Mapping[int, str]) -> _Group:
    roots = tuple(traced.channels.roots(read.ids) for read in reads)
    every = [root for root in np.unique(np.concatenate(roots)).tolist() if root > 0]
    free = np.array([root for root in every if root not in fixed], np.int64)
    reasons = dict.fromkeys(fixed[root] for root in every if root in fixed)
    return _Group(tuple(reads), roots, free, "; ".join(reasons))


def _choose(
    group: _Group, seen: Mapping[Channel, Watched], options: RangeOptions
) -> tuple[Equalized, dict[int, float]]:
    """The factors of a group: what activations are multiplied by, for each channel."""
    if not group.free.size:
        return group.left(group.reason), {}
    watched = [seen.get(_channel(read)) for read in group.reads]
    found = [each for each in watched if each is not None and each.peak.any()]
    if len(found) < len(watched):
        return group.left("on the samples it is empty, or all zero"), {}
    weights = [_grouped(read) for read in group.reads]
    a, w = np.zeros((2, len(group.free)))
    for index, (each, weight) in enumerate(zip(found, weights, strict=True)):
        group.largest(index, each.peak / each.peak.max(), a)
        group.largest(index, columns(weight), w)

    def cost(s: Float64) -> float:
        both = enumerate(zip(found, weights, strict=True))
        return sum(damage(x.rows, w2, group.spread(i, s), options) for i, (x, w2) in both)

    before, tried = cost(np.ones_like(a)), {alpha: smoothing(a, w, alpha) for alpha in ALPHAS}
    costs = {alpha: cost(s) for alpha, s in tried.items()}
    best = min(costs, key=lambda alpha: costs[alpha])
    if not costs[best] < _WORTH * before:
        return group.left("no factors do clearly better"), {}
    factors = dict(zip(group.free.tolist(), (1 / tried[best]).tolist(), strict=True))
    return group.done(best, before, costs[best]), factors


def _grouped(read: Read) -> NDArray[np.float32]:
    """The weight of a layer as [groups, rows, channels, taps]."""
    weight, layer = constant(operand(read.layer, 1)), read.layer
    if weight is None:
        raise ValueError(f"{layer.name!r} has no constant weight")
    if layer.op_type != "Conv":
        rows = weight if layer.attributes.get_int("transB", 0) else weight.T
        return rows[None, :, :, None]
    groups = layer.attributes.get_int("group", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def _channel(read: Read) -> Channel:
    return str(read.value.name), read.axis

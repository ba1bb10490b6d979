"""What operators do to the labels of channels: the rules that every front-end shares.

A tensor has an array of labels of its own rank; an axis along which labels do not vary has size 1
in it, whatever its size in the tensor. After a convolution labels are [1, N, 1, 1]; reshaped to
heads, [1, 1, H, D]. Moving elements about moves their labels the same way, so front-ends apply
reshapes, transposes, slices and concatenations to the labels themselves; what computes is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from twofour.core.channels import OPAQUE, UNIFORM, Channels, Ids

UNKNOWN = "reads an input, or what no rule follows"
MIXED = "an operator mixes positions of the axis that the channels lie along"


@dataclass(frozen=True)
class Labels:
    """The labels of a tensor.

    Attributes:
        shape: of the tensor.
        ids: int64, of the same rank; each axis has the tensor's size, or 1 if labels do not vary
            along it.
        extent: the shape before it was expanded: 1 along axes where all values are equal; None if
            that is not known.
    """

    shape: tuple[int, ...]
    ids: Ids
    extent: tuple[int, ...] | None = None

    @classmethod
    def of(cls, shape: Sequence[int], ids: Ids) -> Labels:
        """Labels from an array that broadcasts to the shape; axes that do not vary shrink to 1."""
        ids = ids.reshape((1,) * (len(shape) - ids.ndim) + ids.shape)
        for axis in range(ids.ndim):
            first = ids.take([0], axis) if ids.shape[axis] else ids
            if ids.shape[axis] > 1 and (ids == first).all():
                ids = first
        return cls(tuple(shape), ids)

    @classmethod
    def constant(cls, shape: Sequence[int], label: int = OPAQUE) -> Labels:
        """One label everywhere."""
        return cls(tuple(shape), np.full((1,) * len(shape), label))

    @classmethod
    def along(cls, shape: Sequence[int], axis: int, ids: Ids) -> Labels:
        """Labels that vary along one axis: int64 [shape[axis]]."""
        spread = [1] * len(shape)
        spread[axis] = -1
        return cls(tuple(shape), ids.reshape(spread))

    @property
    def full(self) -> Ids:
        """Of the tensor's shape."""
        return np.broadcast_to(self.ids, self.shape)

    @property
    def wired(self) -> bool:
        """Whether any channel here may be one that can move."""
        return bool((self.ids > 0).any())

    @property
    def varying(self) -> frozenset[int]:
        """Axes along which labels differ."""
        return frozenset(axis for axis, size in enumerate(self.ids.shape) if size > 1)

    @property
    def spread(self) -> tuple[int, ...]:
        """The axes of size 1 are those along which all values are equal."""
        return self.shape if self.extent is None else self.extent

    def aligned(self, rank: int) -> Labels:
        """With axes of size 1 in front, as broadcasting has it."""
        more = (1,) * (rank - len(self.shape))
        ids = self.ids.reshape(more + self.ids.shape)
        return Labels(more + self.shape, ids, more + self.spread)

    def index(self, axes: Sequence[int]) -> Ids:
        """A number for each position along these axes, in the shape of `ids`."""
        sizes = [size if axis in axes else 1 for axis, size in enumerate(self.ids.shape)]
        return np.broadcast_to(np.arange(np.prod(sizes)).reshape(sizes), self.ids.shape)


def pointwise(channels: Channels, operands: Sequence[Labels], shape: Sequence[int]) -> Labels:
    """Element by element: what meets is one channel.

    An operand whose channels nobody can move holds those that it meets apart, along the axes that
    it has: a mask [B, 1, 1, S] does nothing to channels, a table [S, D] all.

    Args:
        channels: learns of the ties.
        operands: labels that broadcast to the shape.
        shape: of the result.
    """
    aligned = [operand.aligned(len(shape)) for operand in operands]
    wired = [operand for operand in aligned if operand.wired]
    if not wired:
        lowest = min((int(operand.ids.min(initial=0)) for operand in aligned), default=UNIFORM)
        extent = np.broadcast_shapes(*(operand.spread for operand in aligned))
        return Labels(tuple(shape), np.full((1,) * len(shape), lowest), extent)
    by_rank = sorted((operand.varying for operand in wired), key=len)
    if any(not less <= more for less, more in pairwise(by_rank)):
        for operand in wired:
            channels.pin(operand.ids, "channels along different axes are combined")
        return Labels.constant(shape)
    grid = np.broadcast_shapes(*(operand.ids.shape for operand in aligned))
    result = np.zeros(grid, np.int64)
    for operand in aligned:
        ids = np.broadcast_to(operand.ids, grid)
        channels.tie(result, ids)
        result = np.where(result > 0, result, np.where(ids > 0, ids, np.minimum(result, ids)))
    merged = Labels(tuple(shape), result)
    for operand in aligned:
        met = np.broadcast_to(operand.ids == OPAQUE, grid) & (result > 0)
        axes = [axis for axis in merged.varying if operand.spread[axis] > 1]
        if axes and met.any():
            reason = "combined element by element with values that are no parameter"
            channels.separate(np.where(met, result, UNIFORM), merged.index(axes), reason)
    return Labels.of(shape, result)


def alike(channels: Channels, x: Labels, axes: Sequence[int], reason: str) -> None:
    """Channels along these axes are all treated the same, those of other places on their own.

    So a softmax or a normalization along channels lets them trade places.
    """
    if x.varying & set(axes):
        channels.separate(x.ids, x.index(sorted(x.varying - set(axes))), reason)


def reduced(channels: Channels, x: Labels, axes: Sequence[int], keep: bool) -> Labels:
    """A sum, mean, maximum or norm along these axes; what has lost its channels is opaque.

    Args:
        channels: learns that channels of different results stay apart.
        x: of the operand.
        axes: 0 or greater.
        keep: reduced axes keep size 1.
    """
    alike(channels, x, axes, "summed up for each position on its own")
    ids = x.ids
    if x.varying & set(axes):
        ids = np.full((1,) * len(x.shape), OPAQUE)
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    if not keep:
        ids = ids.squeeze(tuple(axes))
        shape = [size for axis, size in enumerate(x.shape) if axis not in axes]
    return Labels(tuple(shape), ids)


def settled(channels: Channels, x: Labels, axes: Sequence[int]) -> Labels:
    """Labels that do not vary along these axes: what would is tied, as pixels of one channel.

    Where labels vary along no other axis, the channels are pinned.
    """
    mixed = x.varying & set(axes)
    if not mixed:
        return x
    first = x.ids
    for axis in mixed:
        first = first.take([0], axis)
    opaque = (x.ids == OPAQUE).any(axis=tuple(mixed), keepdims=True)
    if x.varying == mixed:
        channels.pin(x.ids, MIXED)
    channels.pin(np.where(opaque, x.ids, UNIFORM), "mixed with values whose channels are fixed")
    result = np.where(opaque, OPAQUE, x.ids.max(axis=tuple(mixed), keepdims=True))
    channels.tie(x.ids, np.broadcast_to(result, x.ids.shape))
    return Labels.of(x.shape, result)


def vector(channels: Channels, x: Labels, axis: int) -> Ids:
    """The labels along one axis that a weight is multiplied with: int64 [shape[axis]].

    Along all other axes the weight is the same, so that the channels there are tied. Channels that
    lie along other axes only pass by: the vector is OPAQUE.
    """
    axis %= len(x.shape)
    if axis not in x.varying:
        alone = x.ids.size == 1 and x.shape[axis] == 1
        return np.full(x.shape[axis], int(x.ids.reshape(-1)[0]) if alone else OPAQUE)
    others = [other for other in range(len(x.shape)) if other != axis]
    return settled(channels, x, others).ids.reshape(-1)


def weighted(channels: Channels, x: Labels, axis: int, weight: Ids) -> None:
    """Ties what a weight reads along an axis of `x` with the labels of its own axis.

    Args:
        channels: learns of the ties.
        x: of what is read.
        axis: of `x`.
        weight: int64 [shape[axis]].
    """
    read = vector(channels, x, axis)
    channels.tie(weight, read)
    channels.pin(np.where(read == OPAQUE, weight, UNIFORM), UNKNOWN)
    channels.pin(np.where(read == UNIFORM, weight, UNIFORM), "reads a constant")


def product(channels: Channels, a: Labels, b: Labels, shape: Sequence[int]) -> Labels:
    """A matrix product of two activations: [.., M, K] x [.., K, N].

    Channels along K are summed up; those along M, N and the axes before pass through.
    """
    rank = len(shape)
    a, b = a.aligned(rank), b.aligned(rank)
    if rank - 1 in a.varying or rank - 2 in b.varying:
        a, b = settled(channels, a, [rank - 2]), settled(channels, b, [rank - 1])
        left = Labels((*a.shape[:-2], a.shape[-1]), a.ids[..., 0, :])
        right = Labels(b.shape[:-1], b.ids[..., 0])
        inner = np.broadcast_shapes(left.shape, right.shape)
        met = pointwise(channels, [left, right], inner)
        return Labels.of(shape, reduced(channels, met, [rank - 2], True).ids[..., None])
    left = Labels((*a.shape[:-1], 1), a.ids)
    right = Labels((*b.shape[:-2], 1, b.shape[-1]), b.ids)
    return pointwise(channels, [left, right], shape)

"""Which channels of a network may trade places: ties, constraints, and the spaces they leave.

Every channel that a parameter writes or reads has a number, its label. Walking through the network,
a front-end ties labels that always carry the same channel (what is added element by element, what a
weight reads and another wrote), separates those that must keep to themselves (the heads of an
attention, the groups of a convolution), and pins those that nobody may move (the network's outputs,
what an unknown operator reads), each with the reason. `spaces()` then divides what is left into the
coarsest spaces whose channels may be permuted freely:

    tied labels are one channel
    channels trade places only if the same axes of parameters hold them, in equal numbers and at
    equal distances, and the same sets of each separation
    a channel that is pinned stays

So no rule needs to know about concatenations, splits or padding: two halves of a convolution's
channels of which only one is read elsewhere become two spaces by themselves.

Source: the need for it, Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021,
section 3 ("transparent" permutations of whole networks).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

UNIFORM = 0
"""Label of values that do not depend on the channel, such as padding."""
OPAQUE = -1
"""Label of values whose channels nobody can move, such as the network's inputs."""
ALONE = "no other channel is written and read in the same places"


@dataclass(frozen=True)
class Space:
    """Channels that may be permuted among themselves.

    Attributes:
        roots: int64 [S], the channels, in the order in which they were first written.
    """

    roots: Ids

    def __len__(self) -> int:
        """How many channels."""
        return len(self.roots)

    def places(self, roots: Ids) -> Ids:
        """Where an axis holds the channels of this space.

        Args:
            roots: int64 [C], the channels of the axis (`Channels.roots`).

        Returns:
            int64 [S, copies], ascending; [S, 0] if it holds none.
        """
        slot = np.searchsorted(self.roots, roots)
        slot[slot == len(self)] = 0
        held = np.flatnonzero(self.roots[slot] == roots)
        by_slot = held[np.argsort(slot[held], kind="stable")]
        return by_slot.reshape(len(self), -1)

    def sources(self, roots: Ids, order: Ids) -> Ids:
        """Which place of an axis each place takes its values from.

        Args:
            roots: int64 [C], the channels of the axis.
            order: int64 [S]; channel i of the space becomes what channel `order[i]` was.

        Returns:
            int64 [C].
        """
        sources = np.arange(len(roots))
        places = self.places(roots)
        sources[places] = places[order]
        return sources


@dataclass(frozen=True)
class _Separation:
    ids: Ids
    colors: Ids
    reason: str


class Channels:
    """Labels of channels, and what is known about them."""

    def __init__(self) -> None:
        """Knows of no channel."""
        self._parent = [UNIFORM]
        self._axes: list[Ids] = []
        self._separations: list[_Separation] = []
        self._pins: list[tuple[Ids, str]] = []

    def new(self, count: int) -> Ids:
        """Labels of the channels along one axis of a parameter: int64 [count]."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        ids = np.arange(first, first + count)
        self._axes.append(ids)
        return ids

    def axis(self, ids: Ids) -> None:
        """Says that a parameter is indexed by these channels, so that they move with it.

        Args:
            ids: int64 [C]; a channel may occur several times.
        """
        self._axes.append(ids.reshape(-1))

    def tie(self, ones: Ids, others: Ids) -> None:
        """Says that `ones[i]` and `others[i]` are the same channel.

        Args:
            ones: labels; pairs of which one is UNIFORM or OPAQUE are left out.
            others: labels, the same shape.
        """
        real = (ones > 0) & (others > 0) & (ones != others)
        if not real.any():
            return
        for one, other in np.unique(np.stack([ones[real], others[real]], 1), axis=0).tolist():
            a, b = self._root(one), self._root(other)
            self._parent[max(a, b)] = min(a, b)

    def separate(self, ids: Ids, colors: Ids, reason: str) -> None:
        """Says that channels trade places only with those of the same color.

        Args:
            ids: labels; UNIFORM and OPAQUE ones are left out.
            colors: the same shape.
            reason: in words, for channels that find no other of their color.
        """
        real = ids > 0
        if real.any():
            self._separations.append(_Separation(ids[real], colors[real], reason))

    def pin(self, ids: Ids, reason: str) -> None:
        """Says that channels stay where they are.

        Args:
            ids: labels of any shape; UNIFORM and OPAQUE ones are left out.
            reason: in words.
        """
        real = ids[ids > 0]
        if len(real):
            self._pins.append((np.unique(real), reason))

    def roots(self, ids: Ids) -> Ids:
        """The channel that each label is: the lowest label tied to it."""
        distinct, inverse = np.unique(ids, return_inverse=True)
        found = np.array([self._root(i) if i > 0 else i for i in distinct.tolist()], np.int64)
        return found[inverse].reshape(ids.shape)

    def spaces(self) -> list[Space]:
        """All spaces of two or more channels, in the order of their first channels."""
        fixed = self.fixed()
        members: dict[int, list[int]] = defaultdict(list)
        for root, kind in self._kinds().items():
            if root not in fixed:
                members[kind].append(root)
        spaces = [Space(np.array(sorted(m), np.int64)) for m in members.values() if len(m) > 1]
        return sorted(spaces, key=lambda space: int(space.roots[0]))

    def fixed(self) -> dict[int, str]:
        """Channels that are pinned, each with the reason that was given first."""
        reasons: dict[int, str] = {}
        for ids, reason in self._pins:
            for root in self.roots(ids).tolist():
                reasons.setdefault(root, reason)
        return reasons

    def alone(self) -> dict[int, str]:
        """Why channels that are not pinned may have no other to trade places with."""
        reasons: dict[int, str] = {}
        for separation in self._separations:
            for root in self.roots(separation.ids).tolist():
                reasons.setdefault(root, separation.reason)
        return reasons

    def _kinds(self) -> dict[int, int]:
        """Channels of one kind are alike to every axis and separation."""
        kinds: dict[int, int] = defaultdict(int)
        names: dict[tuple[int, int, tuple[int, ...]], int] = {}
        for number, (roots, colors) in enumerate(self._constraints()):
            seen: dict[int, list[int]] = defaultdict(list)
            for root, color in zip(roots.tolist(), colors.tolist(), strict=True):
                seen[root].append(color)
            for root, found in seen.items():
                key = (number, kinds[root], tuple(found))
                kinds[root] = names.setdefault(key, len(names) + 1)
        return kinds

    def _constraints(self) -> Iterable[tuple[Ids, Ids]]:
        """(channels, colors): of an axis, the distance from the channel's first place."""
        for ids in self._axes:
            roots = self.roots(ids)
            _, first, inverse = np.unique(roots, return_index=True, return_inverse=True)
            real = roots > 0
            yield roots[real], (np.arange(len(roots)) - first[inverse.reshape(-1)])[real]
        for separation in self._separations:
            yield self.roots(separation.ids), separation.colors

    def _root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

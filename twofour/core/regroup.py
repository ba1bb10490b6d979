"""The moves of the channel permutation search: what two groups of columns gain by exchanging some.

Both kinds keep, for each pair of groups, the gain of their best exchange, and compute again only
those of groups that changed. `columns` are the channels as rows of memory, float32 [C, R].

Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021 (stripe groups); Ji et
al., "TETRIS", NeurIPS 2018 (swaps).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from twofour.core.patterns import Pattern

Energy = NDArray[np.float32]
State = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]

LEAST_GAIN = 1e-6
"""Of all energy: below this, sums in single precision cannot tell."""
_CHUNK = 4096  # columns * rows at once: 70 subsets of them fit a second-level cache
_PAIRS = tuple(combinations(range(8), 2))
_FIRST = np.array([(0, *rest) for rest in combinations(range(1, 8), 3)])
_SECOND = np.array([[c for c in range(8) if c not in first] for first in _FIRST.tolist()])
_WAYS = np.concatenate([_FIRST, _SECOND])  # [70, 4]; way i is rows i and i + 35
_LOW = np.array([_PAIRS.index((a, b)) for a, b, _, _ in _WAYS.tolist()])
_HIGH = np.array([_PAIRS.index((c, d)) for _, _, c, d in _WAYS.tolist()])


class Moves(ABC):
    """An order of columns, and the gain of the best exchange of each pair of groups.

    Args:
        columns: float32 [C, R], energies >= 0; C a multiple of m.
        pattern: n and m.

    Attributes:
        order: int64 [G, m], the columns of each group.
        gain: float64 [G, G], of the best exchange of groups i < j; 0 elsewhere.
        numbers: entries of `columns` read so far, a measure of work that no clock disturbs.
        least: gains below it are rounding.
    """

    def __init__(self, columns: Energy, pattern: Pattern) -> None:
        """Starts from the given order; `refresh` of all groups computes the gains."""
        self.columns, self.pattern = columns, pattern
        self.order = np.arange(len(columns)).reshape(-1, pattern.m)
        self.groups = len(self.order)
        self.gain = np.zeros((self.groups, self.groups))
        self.best = np.zeros((self.groups, self.groups), dtype=np.int64)
        self.numbers = 0
        self.least = LEAST_GAIN * float(columns.sum(dtype=np.float64))

    def copy(self) -> State:
        """What `restore` takes."""
        return self.order.copy(), self.gain.copy(), self.best.copy()

    def restore(self, state: State) -> None:
        """Goes back to a copy."""
        for now, then in zip((self.order, self.gain, self.best), state, strict=True):
            now[...] = then

    def kept(self, groups: NDArray[np.int64]) -> float:
        """Energy that masks keep in these groups."""
        m, n = self.pattern.m, self.pattern.n
        part = np.partition(self.columns[self.order[groups]], m - n, axis=1)[:, m - n :]
        return float(part.sum(dtype=np.float64))

    def disturb(self, random: np.random.Generator) -> float:
        """One column of each of three or more groups goes to the next one; returns the change."""
        count = min(self.groups, int(random.integers(3, 6)))
        groups = random.choice(self.groups, count, replace=False)
        places = random.integers(0, self.pattern.m, count)
        before = self.kept(groups)
        self.order[groups, places] = np.roll(self.order[groups, places], 1)
        change = self.kept(groups) - before
        self.refresh(groups)
        return change

    @abstractmethod
    def refresh(self, groups: NDArray[np.int64]) -> None:
        """Computes the gains of all pairs that one of these groups is part of."""

    @abstractmethod
    def apply(self, one: int, other: int) -> None:
        """Does the best exchange of two groups; their gains are stale until `refresh`."""

    def all_pairs(self) -> int:
        """Upper bound of the numbers that a refresh of all groups reads."""
        return self.groups * self.columns.size * self.pattern.m

    def _pairs_of(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """[P, 2]: the pairs i < j with a member in `groups`."""
        touched = np.zeros(self.groups, dtype=np.bool_)
        touched[groups] = True
        pairs = np.triu(touched[:, None] | touched[None, :], 1)
        return np.argwhere(pairs)


class Regroup(Moves):
    """For m = 4: the best of all 35 ways to divide the 8 columns of two groups."""

    def mingle(self, random: np.random.Generator) -> float:
        """Pairs all groups at random, and divides each pair the best way; returns the gain.

        With many groups this gains most of what all pairs would, in a fraction of the time.
        """
        shuffled = random.permutation(self.groups)
        pairs = shuffled[: self.groups // 2 * 2].reshape(-1, 2)
        self._evaluate(pairs)
        for one, other in pairs:
            self.apply(one, other)
        return float(self.gain[pairs[:, 0], pairs[:, 1]].sum())

    def refresh(self, groups: NDArray[np.int64]) -> None:
        """Tries all ways for each pair."""
        self._evaluate(self._pairs_of(groups))

    def _evaluate(self, pairs: NDArray[np.int64]) -> None:
        """All ways to divide each pair: 70 sets of 4 columns."""
        rows = self.columns.shape[1]
        step = max(1, _CHUNK // rows)
        for at in range(0, len(pairs), step):
            chunk = pairs[at : at + step]
            kept = self._ways(self.order[chunk].reshape(len(chunk), 8))
            best = kept.argmax(axis=0)
            gain = kept[best, np.arange(len(chunk))] - kept[0]
            self.gain[chunk[:, 0], chunk[:, 1]] = gain
            self.best[chunk[:, 0], chunk[:, 1]] = best
        self.numbers += len(pairs) * 8 * rows

    def apply(self, one: int, other: int) -> None:
        """Divides the columns of two groups anew."""
        columns, way = self.order[[one, other]].reshape(8), self.best[one, other]
        self.order[one], self.order[other] = columns[_FIRST[way]], columns[_SECOND[way]]

    def _ways(self, columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """[P, 8] columns -> [35, P]: energy kept by each way; way 0 leaves them as they are."""
        pairs, rows = len(columns), self.columns.shape[1]
        total = np.zeros((70, pairs))
        step = max(1, _CHUNK // pairs)
        for at in range(0, rows, step):
            eight = self.columns[columns.T, at : at + step]  # [8, P, R]
            total += _kept_of_ways(eight, self.pattern.n).sum(axis=2, dtype=np.float64)
        ways: NDArray[np.float64] = total[:35] + total[35:]
        return ways


class Swap(Moves):
    """For any m: the best of the m * m swaps of one column of each group.

    With column i gone, the group keeps `top` = the n - 1 largest others and the larger of `next` =
    the n-th largest other and whatever comes: so kept(i -> j) = sum(top_i) + sum(max(next_i, j)).
    """

    def __init__(self, columns: Energy, pattern: Pattern) -> None:
        """Makes room for what each column's place would hold with each other column."""
        super().__init__(columns, pattern)
        self.placed = np.zeros((len(columns), len(columns)))

    def refresh(self, groups: NDArray[np.int64]) -> None:
        """Fills the rows of `placed` of these groups' columns, then the gains of their pairs."""
        m = self.pattern.m
        for group in groups:
            for place in range(m):
                self._place(int(group), place)
        now = self.placed.diagonal()
        for one, other in self._pairs_of(groups):
            first, second = self.order[one], self.order[other]
            gain = (
                self.placed[np.ix_(first, second)]
                + self.placed[np.ix_(second, first)].T
                - now[first][:, None]
                - now[second][None, :]
            )
            self.best[one, other] = gain.argmax()
            self.gain[one, other] = gain.max()
        self.numbers += len(groups) * m * self.columns.size

    def apply(self, one: int, other: int) -> None:
        """Swaps the best two columns."""
        i, j = divmod(int(self.best[one, other]), self.pattern.m)
        swapped = self.order[one, i], self.order[other, j]
        self.order[other, j], self.order[one, i] = swapped

    def restore(self, state: State) -> None:
        """Goes back to a copy, and fills `placed` again for the groups that differ."""
        differ = np.flatnonzero((self.order != state[0]).any(axis=1))
        super().restore(state)
        for group in differ:
            for place in range(self.pattern.m):
                self._place(int(group), place)

    def _place(self, group: int, place: int) -> None:
        n, columns = self.pattern.n, self.order[group]
        others = -np.sort(-self.columns[np.delete(columns, place)], axis=0)
        top, following = others[: n - 1].sum(dtype=np.float64), others[n - 1]
        step = max(1, 16 * _CHUNK // len(following))
        row = self.placed[columns[place]]
        for at in range(0, len(row), step):
            part = np.maximum(self.columns[at : at + step], following)
            row[at : at + step] = top + part.sum(axis=1, dtype=np.float64)


def _kept_of_ways(eight: Energy, n: int) -> Energy:
    """[8, P, R] -> [70, P, R]: the n largest of the 4 columns of each set of `_WAYS`.

    Of a, b, c, d, two are largest: both of a, b; or both of c, d; or one of each.
    """
    ones, others = (eight[[pair[side] for pair in _PAIRS]] for side in (0, 1))
    larger = np.maximum(ones, others)
    if n == 1:
        kept: Energy = np.maximum(larger[_LOW], larger[_HIGH])
        return kept
    sums = ones + others
    if n == 2:
        kept = larger[_LOW]
        kept += larger[_HIGH]
        for both in (_LOW, _HIGH):
            np.maximum(kept, sums[both], out=kept)
        return kept
    smaller = np.minimum(ones, others)
    kept = sums[_LOW] + sums[_HIGH]
    kept -= np.minimum(smaller[_LOW], smaller[_HIGH])
    return kept

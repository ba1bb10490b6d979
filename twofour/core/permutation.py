"""Search for an order of the input channels in which N:M masks keep more energy.

An N:M mask keeps the n best of each m neighbours. Which channels are neighbours is free wherever a
permutation can be folded into the layers that produce the channels. The search works on a matrix
with one column a channel; only the partition of the columns into groups of m matters, so orders are
given in their canonical form: ascending within a group, groups by their first column.

    few columns       exact: the best partition, by dynamic programming over sets of columns
    many groups       pairs of groups drawn at random, each divided the best way, first
    m = 4             pairs of groups take the best of the 35 ways to divide 8 columns in two,
                      the pair with the largest gain first, until no pair gains
    any other m       two columns of different groups are swapped, the largest gain first
    then, either way  a few columns of a few groups go round in a circle, and the groups that this
                      touched are improved again; what ends better than before is kept

Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.patterns import PAIR_BLOCK, PAIR_DISTANCE, Pattern
from twofour.core.progress import Report, silent
from twofour.core.regroup import Moves, Regroup, Swap

Order = NDArray[np.int64]

EXACT_COLUMNS = {2: 10, 4: 16, 8: 16}
"""Most columns that are searched exactly, for each m; others use at most two groups."""

FEW_GROUPS = 24
"""All pairs of so many groups are tried from the start, whatever the effort."""
MILLION = 1_000_000
_CHUNK = 1 << 17  # numbers of an intermediate result: a few of them fit a second-level cache


@dataclass(frozen=True)
class Effort:
    """How long a search may take; the same effort always does the same work.

    Attributes:
        escapes: attempts to leave a local optimum.
        rows: of the matrix that are looked at; a seeded sample if there are more.
        numbers: upper bound of matrix entries read, in millions.
    """

    escapes: int
    rows: int
    numbers: int


EFFORTS = (
    Effort(0, 1024, 50),
    Effort(30, 4096, 300),
    Effort(300, 16384, 3_000),
    Effort(3000, 65536, 100_000),
)


@dataclass(frozen=True)
class Found:
    """An order of columns.

    Attributes:
        order: int64 [C]; place i of the new order takes column `order[i]`.
        before: energy kept by masks of the pattern in the given order.
        after: in this order; at least `before`.
        exact: no order keeps more.
    """

    order: Order
    before: float
    after: float
    exact: bool


def rows_of(energy: NDArray[np.floating], pattern: str | Pattern) -> NDArray[np.floating]:
    """One row for each mask of the pattern that a weight has, one column an input channel.

    Args:
        energy: real [N, C, ...], such as squared weights.
        pattern: in a pair pattern, the two channels that share a mask become one row: their sum.

    Returns:
        [rows, C]; plain patterns have N * taps rows.
    """
    pattern = Pattern.parse(pattern)
    if pattern.pair:
        paired = len(energy) - len(energy) % PAIR_BLOCK
        blocks = energy[:paired].reshape(-1, 2, PAIR_DISTANCE, *energy.shape[1:])
        shared = (blocks[:, 0] + blocks[:, 1]).reshape(-1, *energy.shape[1:])
        energy = np.concatenate([shared, energy[paired:]])
    return np.moveaxis(energy, 1, -1).reshape(-1, energy.shape[1])


def kept(rows: NDArray[np.floating], pattern: str | Pattern) -> float:
    """The energy that masks keep: the n largest of each m neighbours of each row, summed.

    Args:
        rows: real >= 0, [R, C] with C a multiple of m; see `rows_of`.
        pattern: its n and m.
    """
    pattern = Pattern.parse(pattern)
    groups = rows.reshape(len(rows), -1, pattern.m)
    largest = np.partition(groups, pattern.m - pattern.n, axis=2)[:, :, pattern.m - pattern.n :]
    return float(largest.sum(dtype=np.float64))


def search(
    rows: NDArray[np.floating],
    pattern: str | Pattern = "2:4",
    *,
    effort: int = 1,
    seed: int = 0,
    report: Report = silent,
) -> Found:
    """An order of the columns in which masks keep at least as much energy as in the given one.

    Args:
        rows: real >= 0 and finite, [R, C] with C a multiple of m: squared weights or, to compare
            with results by magnitude, |w|. Stack the rows of all layers that read the channels.
        pattern: its n and m; what a pair shares is summed by `rows_of`.
        effort: 0 to 3, an index of `EFFORTS`.
        seed: of the sample of rows and of the attempts to leave a local optimum.
        report: called after each attempt.

    Raises:
        InputError: C is not a multiple of m, or a value is negative or not finite.

    Source: Pool and Yu, NeurIPS 2021, sections 4 and 5.
    """
    pattern = Pattern.parse(pattern)
    _require_rows(rows, pattern)
    limits = EFFORTS[effort]
    random = np.random.default_rng(seed)
    columns = np.ascontiguousarray(_sample(rows, limits.rows, random).T, dtype=np.float32)
    exact = len(columns) <= max(EXACT_COLUMNS.get(pattern.m, 0), 2 * pattern.m * (pattern.m <= 8))
    if exact:
        order = _exact(columns, pattern)
    else:
        order = _improve(columns, pattern, limits, random, report)
    before, after = kept(rows, pattern), kept(rows[:, order], pattern)
    if after <= before:  # a sample of the rows misled the search, or there is nothing to gain
        order, after = np.arange(rows.shape[1]), before
    return Found(order, before, after, exact and len(rows) <= limits.rows)


def canonical(order: Order, m: int) -> Order:
    """Ascending within each group of m, groups by their first column: one name a partition."""
    groups = np.sort(order.reshape(-1, m), axis=1)
    return np.ascontiguousarray(groups[np.argsort(groups[:, 0])]).reshape(-1)


def _require_rows(rows: NDArray[np.floating], pattern: Pattern) -> None:
    reasons = []
    if rows.ndim != 2 or rows.size == 0 or rows.shape[1] % pattern.m:
        reasons.append(f"expected [R, C], C a multiple of {pattern.m}; got {list(rows.shape)}")
    if not np.isfinite(rows).all() or (rows < 0).any():
        reasons.append("expected energies that are finite and not negative")
    if reasons:
        raise InputError(
            f"cannot search an order of columns for pattern {pattern}",
            reasons,
            "give squared weights, one column an input channel",
        )


def _sample(
    rows: NDArray[np.floating], limit: int, random: np.random.Generator
) -> NDArray[np.floating]:
    if len(rows) <= limit:
        return rows
    return rows[np.sort(random.choice(len(rows), limit, replace=False))]


def _exact(columns: NDArray[np.float32], pattern: Pattern) -> Order:
    """best[set] = max over groups of the set with its first column: kept(group) + best[rest]."""
    count, m = len(columns), pattern.m
    groups = np.array(list(combinations(range(count), m)))
    step = max(1, _CHUNK // (m * columns.shape[1]))
    parts = (groups[at : at + step] for at in range(0, len(groups), step))
    gains = np.concatenate([_kept_of(columns[part], pattern.n) for part in parts])
    value = {
        sum(1 << c for c in group): gain for group, gain in zip(groups.tolist(), gains, strict=True)
    }
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}

    def solve(left: int) -> float:
        if left not in best:
            first, *others = [c for c in range(count) if left >> c & 1]
            masks = (1 << first | sum(1 << c for c in rest) for rest in combinations(others, m - 1))
            best[left] = max(
                ((value[mask] + solve(left & ~mask), mask) for mask in masks),
                key=lambda found: found[0],
            )
        return best[left][0]

    left, order = (1 << count) - 1, []
    solve(left)
    while left:
        order += [c for c in range(count) if best[left][1] >> c & 1]
        left &= ~best[left][1]
    return np.array(order, dtype=np.int64)


def _kept_of(groups: NDArray[np.float32], n: int) -> NDArray[np.float64]:
    """[P, m, R] -> [P]: the n largest of each m, summed over the rows."""
    m = groups.shape[1]
    largest = np.partition(groups, m - n, axis=1)[:, m - n :]
    total: NDArray[np.float64] = largest.sum(axis=(1, 2), dtype=np.float64)
    return total


def _improve(
    columns: NDArray[np.float32],
    pattern: Pattern,
    limits: Effort,
    random: np.random.Generator,
    report: Report,
) -> Order:
    """Descends to a local optimum, then leaves it again and again; keeps the best order."""
    moves = Regroup(columns, pattern) if pattern.m == 4 else Swap(columns, pattern)
    if isinstance(moves, Regroup) and moves.groups > FEW_GROUPS:
        _mingle(moves, limits, random)
    if moves.groups > FEW_GROUPS and moves.numbers + moves.all_pairs() > limits.numbers * MILLION:
        return canonical(moves.order.reshape(-1), pattern.m)
    moves.refresh(np.arange(moves.groups))
    _descend(moves, limits)
    best = moves.copy()
    for attempt in range(limits.escapes):
        if moves.numbers > limits.numbers * MILLION:
            break
        report(attempt, limits.escapes, "escape")
        change = moves.disturb(random) + _descend(moves, limits)
        if change > moves.least:
            best = moves.copy()
        elif change < 0:
            moves.restore(best)
    return canonical(best[0].reshape(-1), pattern.m)


def _mingle(moves: Regroup, limits: Effort, random: np.random.Generator) -> None:
    """Random pairs of groups, until they gain little or the work is done."""
    first = moves.mingle(random)
    for _ in range(2 * moves.groups):
        if moves.numbers > limits.numbers * MILLION or moves.mingle(random) < first / 1000:
            break


def _descend(moves: Moves, limits: Effort) -> float:
    """Applies the best moves of pairs of groups until none gains; returns what was gained."""
    gained = 0.0
    while moves.numbers <= limits.numbers * MILLION:
        chosen = _disjoint(moves.gain, moves.least)
        if not chosen:
            break
        for one, other in chosen:
            gained += float(moves.gain[one, other])
            moves.apply(one, other)
        moves.refresh(np.unique(np.array(chosen)))
    return gained


def _disjoint(gain: NDArray[np.float64], least: float) -> list[tuple[int, int]]:
    """Pairs of groups that gain, the best first, no group twice."""
    ones, others = np.nonzero(gain > least)
    free = np.ones(len(gain), dtype=np.bool_)
    chosen = []
    for at in np.argsort(-gain[ones, others], kind="stable"):
        one, other = int(ones[at]), int(others[at])
        if free[one] and free[other]:
            free[[one, other]] = False
            chosen.append((one, other))
    return chosen

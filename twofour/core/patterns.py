"""N:M sparsity patterns: what they demand of a weight, and how one that breaks them is named.

A weight `w` has its output channels on axis 0, its input channels on axis 1, and its filter taps on
the axes after that (`[N, C]` for a Gemm, `[N, C, kh, kw]` for a Conv). In pattern `n:m`, each group
of `m` consecutive input channels holds at most `n` nonzeros, for each output channel and each tap:

    for k in range(N):                       # output channel
        for tap in taps:
            for c in range(0, C, m):         # group
                assert count_nonzero(w[k, c:c+m, tap]) <= n

In `n:m/pair`, the output channels come in blocks of 32, and channels `k` and `k + 16` of a block
share one mask: the union of their nonzeros obeys `n:m`. Output channels of a last, incomplete block
are free `n:m`.

In `n:m/2d`, the groups run along the output channels as well: each group of `m` consecutive output
channels holds at most `n` nonzeros, for each input channel and each tap. So the transposed weight,
by which gradients go back to the layer's input, is an `n:m` weight too.

Each `n:m/pair` and each `n:m/2d` weight is an `n:m` weight.

Source: Mishra et al. 2021, arXiv:2104.08378 (2:4 along the input channels); Zhou et al. 2021,
arXiv:2102.04010 (n:m); Hubara et al. 2021, arXiv:2102.08124 (both directions).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError

PAIR_BLOCK = 32
PAIR_DISTANCE = 16
NAMED = ("2:4/pair", "2:4/2d", "2:4", "4:8")
"""The patterns that reports look for, the strictest first."""
_NAME = re.compile(r"(\d{1,3}):(\d{1,3})(/pair|/2d)?")


@dataclass(frozen=True)
class Pattern:
    """At most `n` nonzeros in each `m` consecutive input channels.

    Args:
        n: nonzeros allowed in a group, 0 < n < m.
        m: input channels in a group.
        pair: output channels k and k + 16 of each block of 32 share one mask.
        both: at most `n` in each `m` consecutive output channels too; not together with `pair`.
    """

    n: int
    m: int
    pair: bool = False
    both: bool = False

    def __post_init__(self) -> None:
        """Refuses what no weight is asked to have."""
        if self.pair and self.both:
            raise InputError(f"pattern {self.n}:{self.m}", ["expected pair or both; got the two"])

    @classmethod
    def parse(cls, name: str | Pattern) -> Pattern:
        """Reads a pattern's name, such as `2:4`, `4:8`, `2:4/pair` or `2:4/2d`.

        Raises:
            InputError: the name is not `N:M`, `N:M/pair` or `N:M/2d` with 0 < N < M.
        """
        if isinstance(name, Pattern):
            return name
        found = _NAME.fullmatch(name.strip())
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise InputError(
                f"unknown sparsity pattern {name!r}",
                ["expected N:M, N:M/pair or N:M/2d with 0 < N < M"],
                "use 2:4, 2:4/pair, 2:4/2d or 4:8",
            )
        return cls(int(found[1]), int(found[2]), found[3] == "/pair", found[3] == "/2d")

    def __str__(self) -> str:
        """The name that `parse` reads."""
        return f"{self.n}:{self.m}" + "/pair" * self.pair + "/2d" * self.both

    @property
    def together(self) -> int:
        """How many output channels are masked together."""
        return PAIR_BLOCK if self.pair else self.m if self.both else 1

    @property
    def free(self) -> Pattern:
        """The same `n:m` without what ties output channels together."""
        return Pattern(self.n, self.m)

    def demands(self, other: Pattern) -> bool:
        """Whether a weight of this pattern has the other one too, by its groups lying in those."""
        groups, rest = divmod(other.m, self.m)
        fewer = not rest and self.n * groups <= other.n
        return fewer and self.pair >= other.pair and self.both >= other.both


@dataclass(frozen=True)
class Violation:
    """The first place where a weight breaks a pattern.

    Args:
        pattern: the pattern that is broken.
        output_channels: one channel, two that should share their mask, or the first and last of a
            group along the output channels.
        tap: index into the axes after the input channels; empty for a Gemm weight.
        channels: first and last input channel of the group; the same one twice where the group
            runs along the output channels.
        nonzeros: found there, more than `pattern.n`.
    """

    pattern: Pattern
    output_channels: tuple[int, ...]
    tap: tuple[int, ...]
    channels: tuple[int, int]
    nonzeros: int

    def __str__(self) -> str:
        """The place in words, for messages."""
        first, last = self.channels
        group = f"channels {first}-{last}"
        where = "output channel " + str(self.output_channels[0])
        if first == last:
            where = f"input channel {first}"
            group = "output channels {}-{}".format(*self.output_channels)
        elif len(self.output_channels) == 2:
            where = "output channels {} and {} together".format(*self.output_channels)
        if self.tap:
            where += f", tap ({','.join(map(str, self.tap))})"
        return f"{where}, {group} hold {self.nonzeros} nonzeros"


def ineligible(shape: Sequence[int], pattern: str | Pattern) -> str | None:
    """Why a weight of this shape cannot have the pattern, or None if it can.

    Args:
        shape: of the weight, output channels first, input channels second.
        pattern: such as `2:4`.
    """
    pattern = Pattern.parse(pattern)
    if len(shape) < 2:
        return f"a weight of shape {show(shape)} has no input channel axis"
    if 0 in shape:
        return f"a weight of shape {show(shape)} is empty"
    if shape[1] == 1:
        return "each filter has a single input channel"
    sides = (("output", shape[0]), ("input", shape[1]))[0 if pattern.both else 1 :]
    uneven = [f"{size} {side} channels" for side, size in sides if size % pattern.m]
    return f"{' and '.join(uneven)} are not a multiple of {pattern.m}" if uneven else None


def require_eligible(shape: Sequence[int], pattern: Pattern) -> None:
    """Refuses a shape that cannot have the pattern.

    Raises:
        InputError: with the reason that `ineligible` gives.
    """
    reason = ineligible(shape, pattern)
    if reason is not None:
        raise InputError(
            f"a weight of shape {show(shape)} cannot have pattern {pattern}",
            [reason],
            "leave this layer dense",
        )


def first_violation(w: NDArray[np.generic], pattern: str | Pattern) -> Violation | None:
    """The first group that holds more than `n` nonzeros, or None if the weight has the pattern.

    "First" is by output channel, then tap, then input channel. A channel that breaks `n:m` by
    itself is named before any pair, and before any group along the output channels; those are
    ordered by input channel, then tap.

    Args:
        w: real [N, C, ...].
        pattern: such as `2:4` or `2:4/pair`.

    Raises:
        InputError: the shape cannot have the pattern at all (see `ineligible`).
    """
    pattern = Pattern.parse(pattern)
    require_eligible(w.shape, pattern)
    nonzero = _nonzero(w)
    found = _first_full_group(nonzero, pattern.free)
    if found is not None or pattern == pattern.free:
        return found
    if pattern.both:
        found = _first_full_group(nonzero.swapaxes(0, 1), pattern)
        if found is None:
            return None
        channel = found.output_channels[0]
        return replace(found, output_channels=found.channels, channels=(channel, channel))
    found = _first_full_group(_unions(nonzero), pattern)
    if found is None:
        return None
    block, row = divmod(found.output_channels[0], PAIR_DISTANCE)
    first = block * PAIR_BLOCK + row
    return replace(found, output_channels=(first, first + PAIR_DISTANCE))


def share_held(w: NDArray[np.generic], pattern: str | Pattern) -> float:
    """The share of groups with at most `n` nonzeros, 0 to 1.

    In a pair pattern the groups of a pair count as one; in a 2-D pattern those of both directions
    count.

    Args:
        w: real [N, C, ...].
        pattern: such as `2:4`.

    Raises:
        InputError: the shape cannot have the pattern at all (see `ineligible`).
    """
    pattern = Pattern.parse(pattern)
    require_eligible(w.shape, pattern)
    nonzero = _nonzero(w)
    parts = [nonzero]
    if pattern.pair:
        parts = [_unions(nonzero), nonzero[paired_rows(len(w)) :]]
    if pattern.both:
        parts = [nonzero, nonzero.swapaxes(0, 1)]
    counts = [_counts(part, pattern.m) for part in parts]
    held = sum(int(np.count_nonzero(count <= pattern.n)) for count in counts)
    return held / sum(count.size for count in counts)


def is_pattern(w: NDArray[np.generic], pattern: str | Pattern) -> bool:
    """True if the weight has the pattern; False too if its shape rules the pattern out."""
    return why_not(w, pattern) is None


def held(w: NDArray[np.generic], names: Sequence[str] = NAMED) -> tuple[str, ...]:
    """Those of the patterns that the weight has.

    Args:
        w: real [N, C, ...]; with fewer output channels than a block it has no pair in it, and so no
            pair pattern.
        names: such as `2:4`.

    Returns:
        Names, in the order they were given.
    """
    nonzero = _nonzero(w)
    known = [Pattern.parse(name) for name in names]
    free = {each for each in {p.free for p in known} if is_pattern(nonzero, each)}
    possible = (p for p in known if p.free in free and (len(w) >= PAIR_BLOCK or not p.pair))
    return tuple(str(p) for p in possible if p == p.free or is_pattern(nonzero, p))


def why_not(w: NDArray[np.generic], pattern: str | Pattern) -> str | None:
    """Why the weight does not have the pattern, in words; None if it has it.

    Args:
        w: real [N, C, ...].
        pattern: such as `2:4`.
    """
    reason = ineligible(w.shape, pattern)
    if reason is not None:
        return reason
    found = first_violation(w, pattern)
    return None if found is None else str(found)


def energy_kept(w: NDArray[np.generic], mask: NDArray[np.bool_]) -> float:
    """The share of the sum of squares that the mask keeps, 0 to 1; of an all-zero weight, 1.

    Args:
        w: real [N, C, ...].
        mask: bool, the shape of `w`.
    """
    total = kept = 0.0
    for row, keep in zip(w, mask, strict=True):  # a float64 copy of one row at a time
        squares = np.square(row.astype(np.float64))
        total += float(squares.sum())
        kept += float(squares[keep].sum())
    return kept / total if total > 0 else 1.0


def paired_rows(rows: int) -> int:
    """How many of the output channels have a partner: those of whole blocks."""
    return rows - rows % PAIR_BLOCK


def _nonzero(w: NDArray[np.generic]) -> NDArray[np.bool_]:
    return np.not_equal(w, 0) if w.dtype != np.bool_ else w.view(np.bool_)


def _counts(nonzero: NDArray[np.bool_], m: int) -> NDArray[Any]:
    """[N, C, ...] -> nonzeros of each group, [N, C/m, ...]."""
    ones: NDArray[Any] = nonzero.view(np.uint8)
    ones = ones if m < 256 else ones.astype(np.uint16)
    if not ones.flags.c_contiguous:
        total: NDArray[Any] = ones[:, ::m].copy()
        for place in range(1, m):
            total += ones[:, place::m]
        return total
    taps = math.prod(ones.shape[2:])
    # Sums from every place on are faster than sums of strided places.
    total, flat = ones.flatten(), ones.reshape(-1)
    for place in range(1, m):
        total[: -place * taps] += flat[place * taps :]
    rows, groups = len(ones), ones.shape[1] // m
    return total.reshape(rows, groups, m * taps)[:, :, :taps].reshape(rows, groups, *ones.shape[2:])


def _unions(nonzero: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N, C, ...] -> [16 * B, C, ...]: what either channel of each pair has."""
    paired = nonzero[: paired_rows(len(nonzero))]
    halves = paired.reshape(-1, 2, PAIR_DISTANCE, *nonzero.shape[1:])
    union: NDArray[np.bool_] = halves[:, 0] | halves[:, 1]
    return union.reshape(-1, *nonzero.shape[1:])


def _first_full_group(nonzero: NDArray[np.bool_], pattern: Pattern) -> Violation | None:
    """Looks for a group with more than n nonzeros."""
    count = _counts(nonzero, pattern.m)
    over = count > pattern.n
    if not over.any():
        return None
    by_tap = np.moveaxis(over, 1, -1)
    row, *tap, group = (int(i) for i in np.unravel_index(int(by_tap.argmax()), by_tap.shape))
    first = group * pattern.m
    return Violation(
        pattern,
        (row,),
        tuple(tap),
        (first, first + pattern.m - 1),
        int(count[(row, group, *tap)]),
    )


def show(shape: Sequence[int]) -> str:
    """A shape in words: [64,3,3,3]."""
    return "[" + ",".join(map(str, shape)) + "]"

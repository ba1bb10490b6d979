"""N:M sparsity patterns: the definition of the masks, and how a weight that breaks one is named.

A weight `w` has its output channels on axis 0, its input channels on axis 1, and its filter taps on
the axes after that (`[N, C]` for a Gemm, `[N, C, kh, kw]` for a Conv). In pattern `n:m`, each group
of `m` consecutive input channels holds at most `n` nonzeros, for each output channel and each tap:

    for k in range(N):                       # output channel
        for tap in taps:
            for c in range(0, C, m):         # group
                assert count_nonzero(w[k, c:c+m, tap]) <= n

In `n:m/pair`, the output channels come in blocks of 32, and channels `k` and `k + 16` of a block
share one mask: the union of their nonzeros obeys `n:m`. Output channels of a last, incomplete block
are free `n:m`. So each `n:m/pair` weight is an `n:m` weight too.

Source: Mishra et al. 2021, arXiv:2104.08378 (2:4 along the input channels).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError

PAIR_BLOCK = 32
PAIR_DISTANCE = 16
Scalar = TypeVar("Scalar", bound=np.generic)
_NAME = re.compile(r"(\d{1,3}):(\d{1,3})(/pair)?")


@dataclass(frozen=True)
class Pattern:
    """At most `n` nonzeros in each `m` consecutive input channels.

    Args:
        n: nonzeros allowed in a group, 0 < n < m.
        m: input channels in a group.
        pair: output channels k and k + 16 of each block of 32 share one mask.
    """

    n: int
    m: int
    pair: bool = False

    @classmethod
    def parse(cls, name: str | Pattern) -> Pattern:
        """Reads a pattern's name, such as `2:4`, `4:8` or `2:4/pair`.

        Raises:
            InputError: the name is not `N:M` or `N:M/pair` with 0 < N < M.
        """
        if isinstance(name, Pattern):
            return name
        found = _NAME.fullmatch(name.strip())
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise InputError(
                f"unknown sparsity pattern {name!r}",
                ["expected N:M or N:M/pair with 0 < N < M"],
                "use 2:4, 2:4/pair or 4:8",
            )
        return cls(int(found[1]), int(found[2]), found[3] is not None)

    def __str__(self) -> str:
        """The name that `parse` reads."""
        return f"{self.n}:{self.m}" + ("/pair" if self.pair else "")


@dataclass(frozen=True)
class Violation:
    """The first place where a weight breaks a pattern.

    Args:
        pattern: the pattern that is broken.
        output_channels: one channel, or two that should share their mask.
        tap: index into the axes after the input channels; empty for a Gemm weight.
        channels: first and last input channel of the group.
        nonzeros: found there, more than `pattern.n`.
    """

    pattern: Pattern
    output_channels: tuple[int, ...]
    tap: tuple[int, ...]
    channels: tuple[int, int]
    nonzeros: int

    def __str__(self) -> str:
        """The place in words, for messages."""
        where = "output channel " + str(self.output_channels[0])
        if len(self.output_channels) == 2:
            where = "output channels {} and {} together".format(*self.output_channels)
        if self.tap:
            where += f", tap ({','.join(map(str, self.tap))})"
        first, last = self.channels
        return f"{where}, channels {first}-{last} hold {self.nonzeros} nonzeros"


def ineligible(shape: Sequence[int], pattern: str | Pattern) -> str | None:
    """Why a weight of this shape cannot have the pattern, or None if it can.

    Args:
        shape: of the weight, output channels first, input channels second.
        pattern: such as `2:4`.
    """
    pattern = Pattern.parse(pattern)
    if len(shape) < 2:
        return f"a weight of shape {_show(shape)} has no input channel axis"
    if 0 in shape:
        return f"a weight of shape {_show(shape)} is empty"
    if shape[1] == 1:
        return "each filter has a single input channel"
    if shape[1] % pattern.m:
        return f"{shape[1]} input channels are not a multiple of {pattern.m}"
    return None


def magnitude_mask(w: NDArray[np.generic], pattern: str | Pattern) -> NDArray[np.bool_]:
    """True where a weight is kept: the `n` of each group whose squares are largest.

    Exactly `n` of each `m` are kept. Of equal weights the one with the lowest channel index is
    kept, so the result is the same everywhere. Pairs are ranked by the sum of their two squares.

    Args:
        w: real [N, C, ...], finite.
        pattern: such as `2:4` or `2:4/pair`.

    Returns:
        bool, the shape of `w`.

    Raises:
        InputError: the shape cannot have the pattern, or `w` holds a value that is not finite.

    Source: magnitude pruning, Mishra et al. 2021, arXiv:2104.08378, section 4.
    """
    pattern = Pattern.parse(pattern)
    _require_eligible(w, pattern)
    if not np.isfinite(w).all():
        raise InputError(
            f"cannot rank a weight of shape {_show(w.shape)} for pattern {pattern}",
            [f"{int(np.count_nonzero(~np.isfinite(w)))} of its values are NaN or infinite"],
            "load a checkpoint from before training diverged",
        )
    magnitude = np.abs(_groups(w, pattern.m).astype(np.float64))
    if not pattern.pair:
        return _ungroup(_largest(magnitude, pattern.n), w.shape)
    keep = np.empty(magnitude.shape, dtype=np.bool_)
    paired = _paired_rows(w.shape[0])
    keep[:, paired:] = _largest(magnitude[:, paired:], pattern.n)
    energy = _split_pairs(np.square(magnitude[:, :paired])).sum(axis=2)
    shared = _largest(energy, pattern.n)
    _split_pairs(keep[:, :paired])[...] = shared[:, :, None]
    return _ungroup(keep, w.shape)


def first_violation(w: NDArray[np.generic], pattern: str | Pattern) -> Violation | None:
    """The first group that holds more than `n` nonzeros, or None if the weight has the pattern.

    "First" is by output channel, then tap, then input channel. In a pair pattern a channel that
    breaks `n:m` by itself is named before any pair.

    Args:
        w: real [N, C, ...].
        pattern: such as `2:4` or `2:4/pair`.

    Raises:
        InputError: the shape cannot have the pattern at all (see `ineligible`).
    """
    pattern = Pattern.parse(pattern)
    _require_eligible(w, pattern)
    nonzero = _nonzero(w)
    found = _first_full_group(nonzero, pattern)
    if found is not None or not pattern.pair:
        return found
    found = _first_full_group(_unions(nonzero), pattern)
    if found is None:
        return None
    block, row = divmod(found.output_channels[0], PAIR_DISTANCE)
    first = block * PAIR_BLOCK + row
    rows = (first, first + PAIR_DISTANCE)
    return Violation(pattern, rows, found.tap, found.channels, found.nonzeros)


def share_held(w: NDArray[np.generic], pattern: str | Pattern) -> float:
    """The share of groups with at most `n` nonzeros, 0 to 1; of a pair pattern, of shared groups.

    Args:
        w: real [N, C, ...].
        pattern: such as `2:4`.

    Raises:
        InputError: the shape cannot have the pattern at all (see `ineligible`).
    """
    pattern = Pattern.parse(pattern)
    _require_eligible(w, pattern)
    nonzero = _nonzero(w)
    parts = [nonzero]
    if pattern.pair:
        parts = [_unions(nonzero), nonzero[_paired_rows(len(w)) :]]
    counts = [_counts(part, pattern.m) for part in parts]
    held = sum(int(np.count_nonzero(count <= pattern.n)) for count in counts)
    return held / sum(count.size for count in counts)


def is_pattern(w: NDArray[np.generic], pattern: str | Pattern) -> bool:
    """True if the weight has the pattern; False too if its shape rules the pattern out."""
    return why_not(w, pattern) is None


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
    squares = np.square(w.astype(np.float64))
    total = float(squares.sum())
    return float(squares[mask].sum()) / total if total > 0 else 1.0


def _require_eligible(w: NDArray[np.generic], pattern: Pattern) -> None:
    reason = ineligible(w.shape, pattern)
    if reason is not None:
        raise InputError(
            f"a weight of shape {_show(w.shape)} cannot have pattern {pattern}",
            [reason],
            "leave this layer dense",
        )


def _groups(w: NDArray[Scalar], m: int) -> NDArray[Scalar]:
    """[N, C, ...] -> contiguous [m, N, C/m, taps]: one plane for each place in the group."""
    split = w.reshape(w.shape[0], w.shape[1] // m, m, -1)
    return np.ascontiguousarray(np.moveaxis(split, 2, 0))


def _ungroup(planes: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The inverse of `_groups`."""
    return np.ascontiguousarray(np.moveaxis(planes, 0, 2)).reshape(shape)


def _largest(score: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
    """True for the n largest along axis 0, ties to the lowest index: fewer than n outrank them."""
    m = len(score)
    outranked_by = np.zeros(score.shape, dtype=np.uint8)
    for low in range(m):
        for high in range(low + 1, m):
            low_wins = score[low] >= score[high]
            outranked_by[high] += low_wins
            outranked_by[low] += ~low_wins
    return outranked_by < n


def _paired_rows(rows: int) -> int:
    return rows - rows % PAIR_BLOCK


def _split_pairs(planes: NDArray[Scalar]) -> NDArray[Scalar]:
    """[m, 32*B, G, T] -> view [m, B, 2, 16, G, T]; axis 2 runs over the two channels of a pair."""
    m, rows, *rest = planes.shape
    return planes.reshape(m, rows // PAIR_BLOCK, 2, PAIR_DISTANCE, *rest)


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
    taps = math.prod(
        ones.shape[2:]
    )  # sums from every place on are faster than sums of strided places
    total, flat = ones.flatten(), ones.reshape(-1)
    for place in range(1, m):
        total[: -place * taps] += flat[place * taps :]
    rows, groups = len(ones), ones.shape[1] // m
    return total.reshape(rows, groups, m * taps)[:, :, :taps].reshape(rows, groups, *ones.shape[2:])


def _unions(nonzero: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N, C, ...] -> [16 * B, C, ...]: what either channel of each pair has."""
    paired = nonzero[: _paired_rows(len(nonzero))]
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
        Pattern(pattern.n, pattern.m),
        (row,),
        tuple(tap),
        (first, first + pattern.m - 1),
        int(count[(row, group, *tap)]),
    )


def _show(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"

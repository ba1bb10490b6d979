"""N:M masks: which weights of each group are kept, given how much each of them matters.

Of each group of `m` consecutive input channels the `n` with the most energy are kept (the groups
are those of `core/patterns.py`); of equal ones the lowest channel, so a mask is the same
everywhere:

    for k in range(N):                       # output channel
        for tap in taps:
            for c in range(0, C, m):         # group
                order = sorted(range(c, c + m), key=lambda i: -energy[k, i, tap])   # stable
                mask[k, order[:n], tap] = True

In `n:m/pair` the two channels of a pair are ranked by the sum of their energies. In `n:m/2d` a mask
is chosen for each tile of `m` by `m` channels (`core/tiles.py`).

`train/masks.py` makes the same masks of torch tensors, on any device.

Source: Mishra et al. 2021, arXiv:2104.08378 (2:4); Zhou et al. 2021, arXiv:2102.04010 (n:m).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core import criteria, tiles
from twofour.core.errors import InputError
from twofour.core.patterns import (
    PAIR_DISTANCE,
    Pattern,
    paired_rows,
    require_eligible,
    show,
)

Real = NDArray[np.generic]
Mask = NDArray[np.bool_]
Floats = NDArray[Any]  # float32 or float64

# Groups of up to so many are ranked by comparing all pairs, larger ones by selection.
MOST_COMPARED = 8
_CHUNK = 1 << 16  # weights at once: their energies, planes and counts stay in a core's own cache


def mask_of(energy: Real, pattern: str | Pattern, search: str | None = None) -> Mask:
    """True where a weight is kept: exactly `n` of each `m`, those with the most energy.

    Energies are compared, and those of a pair or a tile added, in float32; float64 ones, and
    integers of more than 16 bits, in float64.

    Args:
        energy: real [N, C, ...], finite, not negative; see `core/criteria.py`.
        pattern: such as `2:4`, `2:4/pair` or `2:4/2d`.
        search: for the tiles of a 2-D pattern, see `core/tiles.py`: "exhaustive", "greedy", or
            None for the best that is possible.

    Returns:
        bool, the shape of `energy`.

    Raises:
        InputError: the shape cannot have the pattern, an energy is negative or not finite, or there
            is no such search.
    """
    return _mask(energy, Pattern.parse(pattern), search, _floats)


def magnitude_mask(w: Real, pattern: str | Pattern, search: str | None = None) -> Mask:
    """The mask of the energies w^2, in the precision that `mask_of` compares in.

    Args:
        w: real [N, C, ...], finite.
        pattern: such as `2:4`, `2:4/pair` or `2:4/2d`.
        search: as of `mask_of`.

    Returns:
        bool, the shape of `w`.

    Raises:
        InputError: the shape cannot have the pattern, `w` holds a value that is not finite or whose
            square is not, or there is no such search.

    Source: magnitude pruning, Mishra et al. 2021, arXiv:2104.08378, section 4.
    """
    return _mask(w, Pattern.parse(pattern), search, lambda rows: criteria.magnitude(_floats(rows)))


def _mask(
    source: Real, pattern: Pattern, search: str | None, energy_of: Callable[[Real], Floats]
) -> Mask:
    """The mask, some output channels at a time; `energy_of` gives the energies of those."""
    require_eligible(source.shape, pattern)
    keep = np.empty(source.shape, dtype=np.bool_)
    for run in _runs(source.shape, pattern, tiles.search_of(pattern, search)):
        with np.errstate(over="ignore"):  # infinite energies are refused, sums of them are ties
            energy = energy_of(source[run.rows])
            least = energy.min()
            if not (least >= 0 and energy.max() < np.inf):
                raise _unrankable(source, pattern, negative=bool(least < 0))
            keep[run.rows] = run.choose(energy)
    return keep


@dataclass(frozen=True)
class _Run:
    """Output channels whose masks are chosen at once, and how."""

    rows: slice
    choose: Callable[[Floats], Mask]


def _runs(shape: tuple[int, ...], pattern: Pattern, search: str) -> Iterator[_Run]:
    """All output channels, as many at a time as fit a cache, whole pairs and tiles together."""
    rows, row = shape[0], math.prod(shape[1:])
    tied = partial(_paired, pattern=pattern)
    if pattern.both:
        tied = partial(tiles.choose, pattern=pattern, search=search)
    whole = rows if pattern.both else paired_rows(rows) if pattern.pair else 0
    sections = [
        (range(whole), pattern.together, tied),
        (range(whole, rows), 1, partial(_free, pattern=pattern)),
    ]
    for section, unit, choose in sections:
        step = max(1, _CHUNK // (unit * row)) * unit
        for first in section[::step]:
            yield _Run(slice(first, min(first + step, section.stop)), choose)


def _unrankable(source: Real, pattern: Pattern, negative: bool) -> InputError:
    """What is wrong with values that have no rank."""
    what = f"cannot rank a weight of shape {show(source.shape)} for pattern {pattern}"
    if bad := int(np.count_nonzero(~np.isfinite(source))):
        fix = "load a checkpoint from before training diverged"
        return InputError(what, [f"{bad} of its values are NaN or infinite"], fix)
    if negative:
        fix = "give energies, such as w * w (twofour.core.criteria)"
        below = int(np.count_nonzero(np.less(source, 0)))
        return InputError(what, [f"{below} of its energies are negative"], fix)
    largest = float(np.abs(source).max())
    return InputError(
        what, [f"its largest value is {largest:g}, whose square is infinite"], "scale it down"
    )


def _floats(values: Real) -> Floats:
    """float32 if that holds each value exactly, else float64."""
    dtype = np.result_type(values.dtype, np.float32)
    if not np.issubdtype(dtype, np.floating):
        raise InputError(f"cannot rank {values.dtype} weights", ["expected real numbers"])
    return values.astype(dtype, copy=False)


def _free(energy: Floats, pattern: Pattern) -> Mask:
    """`n` of each `m`, each output channel by itself."""
    if pattern.m > MOST_COMPARED:
        return _selected(energy, pattern)
    split = energy.reshape(len(energy), -1, pattern.m, math.prod(energy.shape[2:]))
    planes = np.ascontiguousarray(np.moveaxis(split, 2, 0))  # one for each place in the group
    keep = np.moveaxis(_outranked(planes) < pattern.n, 0, 2)
    return np.ascontiguousarray(keep).reshape(energy.shape)


def _outranked(planes: Floats) -> NDArray[np.uint8]:
    """[m, ...] -> by how many others of its group each is outranked; ties to the lowest index."""
    m = len(planes)
    outranked_by = np.zeros(planes.shape, dtype=np.uint8)
    for low in range(m):
        for high in range(low + 1, m):
            low_wins = planes[low] >= planes[high]
            outranked_by[high] += low_wins
            outranked_by[low] += ~low_wins
    return outranked_by


def _selected(energy: Floats, pattern: Pattern) -> Mask:
    """The same without comparing all pairs: what is above the n-th, and the first of its equals."""
    n, m = pattern.n, pattern.m
    split = energy.reshape(len(energy), -1, m, math.prod(energy.shape[2:]))
    groups = np.ascontiguousarray(np.moveaxis(split, 2, 3))  # [N, C/m, taps, m]
    least = np.partition(groups, m - n, axis=3)[..., m - n, None]
    keep = groups > least
    equal = groups == least
    room = n - np.count_nonzero(keep, axis=3, keepdims=True)
    keep |= equal & (np.cumsum(equal, axis=3, dtype=np.int16) <= room)
    return np.ascontiguousarray(np.moveaxis(keep, 3, 2)).reshape(energy.shape)


def _paired(energy: Floats, pattern: Pattern) -> Mask:
    """One mask for the two output channels of each pair; whole blocks only."""
    halves = energy.reshape(-1, 2, PAIR_DISTANCE, *energy.shape[1:])
    shared = _free((halves[:, 0] + halves[:, 1]).reshape(-1, *energy.shape[1:]), pattern)
    keep = shared.reshape(-1, 1, PAIR_DISTANCE, *energy.shape[1:])
    return np.broadcast_to(keep, halves.shape).reshape(energy.shape)

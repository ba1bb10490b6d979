"""2-D masks: tiles of `m` by `m` channels with `n` kept in each row and in each column.

A tile is `m` output channels by `m` input channels of one tap, aligned to multiples of `m`. With
`n` kept in each of its rows and columns, the weight is `n:m` for the forward product, and its
transpose is `n:m` for the product that takes gradients back to the input: one mask makes both fast
in training. Of all tiles with at most `n` in each row and column only those with exactly `n` count,
so every 2-D mask keeps the same share of the weights as a free one.

Two searches, the choice of apex's ASP too:

- **exhaustive** adds up the energy of every mask a tile can have, 90 of them for 2:4, and takes the
  best; of equal ones the first, in the order of the channels kept in the first row, then the
  second... So that every machine finds the same, sums go in one order: along a row from its lowest
  channel, then from row to row.
- **greedy** takes the entries of a tile in falling order (of equal ones the first, by row, then
  column) while their row and column have room. That can leave a row and a column with room whose
  crossing is taken already. Then the exchange that loses least is made: one kept entry goes, and
  two come, in its row and column.

Where a tile has more than `MOST_MASKS` masks (4:8 has 117 thousand million), greedy it is.

Source: Hubara et al. 2021, arXiv:2102.08124 (masks that hold for the transpose as well).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.patterns import Pattern

SEARCHES = ("exhaustive", "greedy")
MOST_MASKS = 2040  # of a 2:5 tile; the next, 1:7 and 2:6, have 5040 and 67950
_AT_ONCE = 1 << 17  # sums, or steps of a greedy search: they stay in a core's own cache


@dataclass(frozen=True)
class TileMasks:
    """All masks of a tile with `n` kept in each row and column, in order, and how to add them up.

    The sums of `i + 1` rows are made from those of `i` rows: sum `k` is `before[i - 1][k]` of
    these, plus the sum of choice `chosen[i - 1][k]` of row `i`.

    Attributes:
        choices: intp [number of choices, n], the columns that a row may keep.
        before: for rows 1 to m - 1, intp [sums].
        chosen: for rows 1 to m - 1, intp [sums].
        masks: bool [masks, m, m].
    """

    choices: NDArray[np.intp]
    before: tuple[NDArray[np.intp], ...]
    chosen: tuple[NDArray[np.intp], ...]
    masks: NDArray[np.bool_]


def search_of(pattern: Pattern, search: str | None = None) -> str:
    """The search that is made: what was asked for, or the best that is possible.

    Args:
        pattern: any; what is not 2-D has one best mask, and any search finds it.
        search: "exhaustive", "greedy", or None for exhaustive where it is possible.

    Raises:
        InputError: there is no such search, or a tile has too many masks for it.
    """
    if search not in (None, *SEARCHES):
        raise InputError(
            f"unknown search {search!r} for masks", [f"expected one of {', '.join(SEARCHES)}"]
        )
    if not pattern.both:
        return SEARCHES[0]
    n, m = pattern.n, pattern.m
    possible = m < 6 or (m == 6 and n in (1, 5))
    if search == "exhaustive" and not possible:
        raise InputError(
            f"cannot try all masks of pattern {pattern}",
            [f"expected at most {MOST_MASKS} masks of a tile; got more"],
            "use the greedy search",
        )
    return search or SEARCHES[0 if possible else 1]


@lru_cache(maxsize=8)
def tile_masks(n: int, m: int) -> TileMasks:
    """All masks of an `m` by `m` tile with `n` in each row and column; ask `search_of` before."""
    columns = np.array(list(combinations(range(m), n)), dtype=np.intp)
    rows = np.zeros((len(columns), m), dtype=np.int64)
    np.put_along_axis(rows, columns, 1, axis=1)
    counts, masks = rows, rows[:, None].astype(np.bool_)
    before, chosen = [], []
    for row in range(1, m):
        joined = counts[:, None] + rows[None]
        missing = n - joined
        legal = ((missing >= 0) & (missing <= m - 1 - row)).all(axis=2)
        old, new = np.nonzero(legal)
        before.append(old)
        chosen.append(new)
        counts = joined[old, new]
        masks = np.concatenate([masks[old], rows[new, None].astype(np.bool_)], axis=1)
    return TileMasks(columns, tuple(before), tuple(chosen), masks)


def choose(energy: NDArray[Any], pattern: Pattern, search: str) -> NDArray[np.bool_]:
    """The 2-D mask of some energies.

    Args:
        energy: float32 or float64 [N, C, ...], finite, not negative; N and C are multiples of m.
        pattern: a 2-D one.
        search: one of `SEARCHES`, possible for the pattern.

    Returns:
        bool, the shape of `energy`.
    """
    m, taps = pattern.m, math.prod(energy.shape[2:])
    grid = (len(energy) // m, m, energy.shape[1] // m, m, taps)
    tiles = np.ascontiguousarray(energy.reshape(grid).transpose(1, 3, 0, 2, 4)).reshape(m, m, -1)
    every = tile_masks(pattern.n, m) if search == "exhaustive" else None
    step = max(64, _AT_ONCE // (4 * m * m if every is None else len(every.masks)))
    parts = (tiles[..., i : i + step] for i in range(0, tiles.shape[2], step))
    keep = np.concatenate(
        [_greedy(part, pattern.n) if every is None else _best(part, every) for part in parts]
    )
    keep = keep.reshape(grid[0], grid[2], taps, m, m).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(keep).reshape(energy.shape)


def _best(tiles: NDArray[Any], every: TileMasks) -> NDArray[np.bool_]:
    """[m, m, T]: row, column, tile -> the first of the best masks of each tile, [T, m, m]."""
    rows = tiles[:, every.choices[:, 0]]
    for column in every.choices[:, 1:].T:
        rows += tiles[:, column]  # [m, choices, T]
    sums = rows[0]
    for row, before, chosen in zip(rows[1:], every.before, every.chosen, strict=True):
        sums = sums[before] + row[chosen]
    places = np.arange(len(sums), 0, -1, dtype=np.uint16 if len(sums) > 255 else np.uint8)
    first = ((sums == sums.max(axis=0)) * places[:, None]).max(axis=0)
    found: NDArray[np.bool_] = every.masks[len(sums) - first.astype(np.intp)]
    return found


def _greedy(tiles: NDArray[Any], n: int) -> NDArray[np.bool_]:
    """[m, m, T]: row, column, tile -> the mask of each tile, [T, m, m]."""
    m, _, count = tiles.shape
    flat = np.ascontiguousarray(tiles.reshape(m * m, count).T)
    order = np.argsort(-flat, axis=1, kind="stable").T
    first_row = np.arange(count) * m
    places = np.ascontiguousarray(order + first_row * m)  # of all tiles, as rows and columns are
    rows, columns = places // m, order % m + first_row
    row_room, column_room = (np.full(count * m, n, dtype=np.int16) for _ in range(2))
    keep = np.zeros(count * m * m, dtype=np.bool_)
    for place, row, column in zip(places, rows, columns, strict=True):
        in_row, in_column = row_room[row], column_room[column]
        taken = (in_row > 0) & (in_column > 0)
        row_room[row] = in_row - taken
        column_room[column] = in_column - taken
        keep[place] = taken
    keep = keep.reshape(count, m, m)
    _fill(flat.reshape(count, m, m), keep, n)
    return keep


def _fill(tiles: NDArray[Any], keep: NDArray[np.bool_], n: int) -> None:
    """Makes exchanges in `keep` [T, m, m] until each row and column has `n`.

    Where row r and column c have room, (r, c) is taken, or greedy would have taken it. So an
    exchange exists: column c' that r does not keep is full, so n rows keep it, and at most n - 1
    rows keep column c, r one of them: some row r' keeps c' and not c.
    """
    while (short := np.flatnonzero(keep.sum(axis=(1, 2)) < n * keep.shape[1])).size:
        energy, kept, start = tiles[short], keep[short], np.arange(len(short))
        row = (kept.sum(axis=2) < n).argmax(axis=1)
        column = (kept.sum(axis=1) < n).argmax(axis=1)
        in_row, in_column = energy[start, row], energy[start, :, column]
        gain = (in_row[:, None, :] + in_column[:, :, None]) - energy
        open_ = kept & ~kept[start, row][:, None, :] & ~kept[start, :, column][:, :, None]
        gain[~open_] = -np.inf
        least_lost = gain.reshape(len(short), -1).argmax(axis=1)
        other_row, other_column = np.divmod(least_lost, keep.shape[2])
        kept[start, other_row, other_column] = False
        kept[start, row, other_column] = True
        kept[start, other_row, column] = True
        keep[short] = kept

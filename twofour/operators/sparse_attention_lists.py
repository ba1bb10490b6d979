"""Which blocks of keys each tile of queries goes through: tables that are part of the code.

What a tile sees is known when the kernel is made, so all of a pattern's rules end up here: a tile
has a list of blocks of 16 keys, first those that all of its queries see whole, and words of 16 bits
that say, of all others, what each query sees. The tables grow with what is seen, not with the
square of the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from twofour.core.sparse_attention import Pattern

LANES = 16
RECORD = 8
"""Numbers of a tile's record: first query, where its list starts, chunks of blocks seen whole, all
chunks, where its masks start."""
_PARTS = 64  # pieces of a head that threads share


@dataclass(frozen=True)
class Lists:
    """The tables of one pattern.

    Attributes:
        rows: queries of a tile.
        keys: blocks of a chunk.
        tiles: int32 [tiles, RECORD].
        entries: int32, numbers of blocks; the list of a tile is whole chunks.
        masks: uint16, of each chunk that is not seen whole [rows, keys].
        bounds: int32, the first tile of each piece, and the end.
    """

    rows: int
    keys: int
    tiles: NDArray[np.int32]
    entries: NDArray[np.int32]
    masks: NDArray[np.uint16]
    bounds: NDArray[np.int32]

    @property
    def pieces(self) -> int:
        """Parts of a head of about the same work."""
        return len(self.bounds) - 1

    @property
    def longest(self) -> int:
        """Blocks of the longest list."""
        return int(self.tiles[:, 3].max()) * self.keys

    @property
    def visited(self) -> int:
        """Products of a query and a key that are computed: 16 for each row and block."""
        return self.entries.size * self.rows * LANES

    @staticmethod
    def of(pattern: Pattern, rows: int, keys: int, group: int = 1) -> Lists:
        """The lists of a pattern.

        Args:
            pattern: which keys are seen.
            rows: queries of a tile, fewer where there are not so many; the last tile overlaps the
                one before it.
            keys: blocks of a chunk.
            group: lists are multiples of so many blocks as well.
        """
        rows = min(rows, pattern.length)
        each = lcm(keys, group)
        tiles, entries, masks = [], [], []
        at = masks_at = 0
        for first in range(0, pattern.length, rows):
            first = min(first, pattern.length - rows)
            blocks, words = _seen(pattern, first, first + rows)
            whole = int((words == 0xFFFF).all(0).sum()) // keys
            room = -(-blocks.size // each) * each
            blocks = np.pad(blocks, (0, room - blocks.size))
            words = np.pad(words, ((0, 0), (0, room - words.shape[1])))[:, whole * keys :]
            words = words.reshape(rows, -1, keys).transpose(1, 0, 2)
            tiles.append([first, at, whole, room // keys, masks_at, 0, 0, 0])
            entries.append(blocks)
            masks.append(words.reshape(-1))
            at, masks_at = at + room, masks_at + words.size
        records = np.array(tiles, np.int32)
        bounds = _bounds(records[:, 3].astype(np.int64) + 1, min(_PARTS, len(records)))
        return Lists(
            rows,
            keys,
            records,
            np.concatenate(entries).astype(np.int32),
            np.concatenate(masks).astype(np.uint16),
            bounds,
        )


def _seen(pattern: Pattern, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """Blocks that some of the queries see, those seen whole first, and their words [rows, blocks].

    Bit i of a word is key i of the block.
    """
    blocks = pattern.candidates(first, last, LANES)
    keys = (blocks[:, None] * LANES + np.arange(LANES)).reshape(-1)
    seen = pattern.visible(first, last, keys).reshape(last - first, -1, LANES)
    bits = (1 << np.arange(LANES)).astype(np.uint32)
    words = (seen * bits).sum(-1).astype(np.uint16)
    some, whole = words.any(0), (words == 0xFFFF).all(0)
    order = np.concatenate([np.flatnonzero(whole), np.flatnonzero(some & ~whole)])
    return blocks[order], words[:, order]


def _bounds(costs: NDArray[np.int64], parts: int) -> NDArray[np.int32]:
    """Splits a row of costs into parts of about the same sum, none of them empty where possible."""
    sums = np.concatenate([[0], np.cumsum(costs)])
    inner = np.searchsorted(sums, sums[-1] * np.arange(1, parts) / parts)
    return np.unique(np.concatenate([[0], inner, [len(costs)]])).astype(np.int32)

"""Sparse attention: which keys a query sees, and the definition by dense attention with that mask.

Query i sees key j if one of these holds,

    |i - j| <= window                            a band along the diagonal; none where window < 0
    j < global_tokens                            all see the first tokens,
    i < global_tokens                            which see all
    j // block in blocks[min(i // block, last)]  whole blocks, chosen by a table

and, if causal, j <= i, and, with a mask of keys, keep[j]. A query that sees no key gets zeros.

The table has a row of block numbers for each block of queries, padded with -1; its last row stands
for all further blocks of queries, so that a table of one row [[-1]] chooses nothing. A band and
global tokens are Longformer; with random blocks they are BigBird; a table alone is any block-sparse
attention.

Source: Beltagy et al. 2020, arXiv:2004.05150; Zaheer et al. 2020, arXiv:2007.14062.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.attention import AttentionScales, attention, attention_int8

Array = NDArray[Any]
Bools = NDArray[np.bool_]
NO_BLOCKS = np.full((1, 1), -1, np.int32)
"""The table that chooses nothing."""
_QUERIES, _RUN = 256, 64  # queries at a time, and keys


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which keys the queries of a sequence see.

    Attributes:
        length: tokens of the sequence.
        window: tokens seen on each side of a query, -1 for no band; 0 is the query's own.
        global_tokens: so many first tokens see all and are seen by all.
        causal: no query sees a later key.
        block: tokens of a block of the table.
        blocks: int32 [rows, n], the table.
    """

    length: int
    window: int = -1
    global_tokens: int = 0
    causal: bool = False
    block: int = 64
    blocks: Array = field(default_factory=lambda: NO_BLOCKS)

    def __post_init__(self) -> None:
        """Refuses what has no meaning.

        Raises:
            ValueError: says what is wrong.
        """
        if self.length < 1 or self.block < 1:
            raise ValueError(f"expected length and block > 0, got {self.length} and {self.block}")
        if self.window < -1 or self.global_tokens < 0:
            raise ValueError(
                "expected window >= -1 and global_tokens >= 0,"
                f" got {self.window} and {self.global_tokens}"
            )
        if self.blocks.ndim != 2 or not self.blocks.size or self.blocks.dtype.kind != "i":
            raise ValueError(
                "expected a table of block numbers, integers [rows, n],"
                f" got {self.blocks.dtype} {list(self.blocks.shape)}"
            )

    def row(self, query: int) -> Array:
        """The numbers of the blocks that the table chooses for a query."""
        row = self.blocks[min(query // self.block, len(self.blocks) - 1)]
        return np.unique(row[(row >= 0) & (row < -(-self.length // self.block))])

    def visible(self, first: int, last: int, keys: Array) -> Bools:
        """Whether each of the queries first ... last - 1 sees each key, [last - first, keys].

        Args:
            first: query.
            last: query after the last one.
            keys: numbers of keys; those of no token are not seen.
        """
        query, key = np.arange(first, last)[:, None], np.asarray(keys)[None, :]
        seen = (abs(query - key) <= self.window) | (key < self.global_tokens)
        seen |= query < self.global_tokens
        numbers = np.minimum(np.arange(first, last) // self.block, len(self.blocks) - 1)
        for number in np.unique(numbers):
            chosen = np.isin(key[0] // self.block, self.row(int(number) * self.block))
            seen |= (numbers == number)[:, None] & chosen
        if self.causal:
            seen &= key <= query
        return np.asarray(seen & (key >= 0) & (key < self.length))

    def mask(self) -> Bools:
        """All of it, [length, length]."""
        return self.visible(0, self.length, np.arange(self.length))

    def candidates(self, first: int, last: int, size: int) -> Array:
        """Numbers of the blocks of `size` keys that some of the queries first ... last - 1 may see.

        In order; linear in what they see, not in the length.
        """
        if first < self.global_tokens:
            spans = [(0, self.length)]
        else:
            spans = [(0, self.global_tokens)]
            if self.window >= 0:
                spans.append((first - self.window, last + self.window))
            for number in range(first // self.block, (last - 1) // self.block + 1):
                row = self.row(number * self.block)
                spans += [(int(b) * self.block, (int(b) + 1) * self.block) for b in row]
        end = min(self.length, last) if self.causal else self.length
        clipped = [(max(a, 0), min(b, end)) for a, b in spans]
        runs = [np.arange(a // size, (b - 1) // size + 1) for a, b in clipped if a < b]
        return np.unique(np.concatenate(runs)) if runs else np.zeros(0, np.int64)


def random_blocks(
    length: int, block: int, count: int, window: int, global_tokens: int, seed: int
) -> Array:
    """BigBird's random blocks: of each block of queries, `count` that it does not see anyway.

    Fewer where there are not so many.

    Args:
        length: tokens.
        block: tokens of a block.
        count: blocks for each block of queries.
        window: as `Pattern` has it.
        global_tokens: as `Pattern` has it.
        seed: of the choice.

    Returns:
        int32 [blocks, count] in order, padded with -1.
    """
    rows = -(-length // block)
    table = np.full((rows, max(count, 1)), -1, np.int32)
    random = np.random.default_rng(seed)
    for row in range(rows):
        first, last = row * block, min((row + 1) * block, length)
        low, high = first, last - 1
        if window >= 0:
            low, high = last - 1 - window, first + window  # what all of its queries see
        others = np.array(
            [
                b
                for b in range(rows)
                if not (low <= b * block and min((b + 1) * block, length) - 1 <= high)
                and (b + 1) * block > global_tokens
            ],
            np.int32,
        )
        chosen = np.sort(random.permutation(others)[:count])
        table[row, : chosen.size] = chosen
    return table


def sparse_attention(
    tensors: tuple[Array, Array, Array],
    heads: int,
    pattern: Pattern,
    keep: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Dense attention with the pattern's mask, in float32.

    Args:
        tensors: q, k and v, float32 [batch, length, heads * d].
        heads: of all three.
        pattern: which keys are seen.
        keep: bool, broadcastable to [batch, length]: the keys that are seen at all.
        scale: of the scores, by default 1 / sqrt(d).

    Returns:
        float32 [batch, length, heads * d].
    """
    q, k, v = (split_heads(x, heads) for x in tensors)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return join_heads(attention(q, k, v, scale, additive(pattern, keep)))


def blockwise(
    tensors: tuple[Array, Array, Array],
    heads: int,
    pattern: Pattern,
    attend: Callable[[Array, Array, Array, Array], Array],
    keep: Array | None = None,
) -> Array:
    """Dense attention to the keys that are seen, in memory that grows with the length alone.

    Args:
        tensors: see `sparse_attention`.
        heads: see `sparse_attention`.
        pattern: see `sparse_attention`.
        attend: attention of q, k, v and a mask, for some queries at a time.
        keep: see `sparse_attention`.
    """
    q, k, v = (split_heads(x, heads) for x in tensors)
    parts = []
    for first in range(0, pattern.length, _QUERIES):
        last = min(first + _QUERIES, pattern.length)
        runs = pattern.candidates(first, last, _RUN)[:, None] * _RUN + np.arange(_RUN)
        keys = runs.reshape(-1)
        keys = keys[keys < pattern.length]
        keys = keys if keys.size else np.arange(1)
        seen = pattern.visible(first, last, keys)[None, None]
        if keep is not None:
            whole = np.broadcast_to(np.asarray(keep, bool), (len(keep), pattern.length))
            seen = seen & whole[:, None, None, keys]
        mask = np.where(seen, np.float32(0), np.float32(-np.inf))
        parts.append(attend(q[:, :, first:last], k[:, :, keys], v[:, :, keys], mask))
    return join_heads(np.concatenate(parts, axis=2))


def sparse_attention_int8(
    tensors: tuple[Array, Array, Array],
    heads: int,
    pattern: Pattern,
    scales: AttentionScales,
    keep: Array | None = None,
) -> Array:
    """The same on bytes: `core.attention.attention_int8` with the pattern's mask.

    Args:
        tensors: q, k and v as stored, uint8 [batch, length, heads * d].
        heads: of all three.
        pattern: which keys are seen.
        scales: of the tensors.
        keep: see `sparse_attention`.
    """
    q, k, v = (split_heads(x, heads) for x in tensors)
    return join_heads(attention_int8(q, k, v, scales, additive(pattern, keep)))


def additive(pattern: Pattern, keep: Array | None) -> Array:
    """What is added to the scores: 0 or -inf, [1 or batch, 1, length, length]."""
    seen = pattern.mask()[None, None]
    if keep is not None:
        seen = seen & np.asarray(keep, bool)[:, None, None, :]
    return np.where(seen, np.float32(0), np.float32(-np.inf))


def split_heads(x: Array, heads: int) -> Array:
    """[batch, length, heads * d] to [batch, heads, length, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: Array) -> Array:
    """The inverse of `split_heads`."""
    x = x.transpose(0, 2, 1, 3)
    return np.ascontiguousarray(x).reshape(*x.shape[:2], -1)

"""Sparse attention: each tile of queries goes through a list of the blocks of keys that it sees.

All rules of a pattern are known when the kernel is made, so they end up in tables beside it:

    tiles   int32 [tiles, 4]   number of the tile, then where its list begins, where the blocks end
                               that all of its queries see whole, and where the list ends
    blocks  int32 [n, 2]       number of a block of keys, and which mask it has
    masks   int32 [m, BLOCK_Q, BLOCK_K / 32]    bit i of a word: the query sees key i of the 32

Tables grow with what is seen, not with the square of the length; equal masks, as a band has them
all along, are held once. Tiles with long lists begin first, so that none is waited for at the end.
What happens to a block is online_softmax.py.

Roles: q, k, v, y, keep (bool, where `keep_strides`), and the tables.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from twofour.core.sparse_attention import Pattern
from twofour.kernels.cuda import attention
from twofour.kernels.cuda.attention import Tiles, load_block, operands_of, tile_shapes
from twofour.kernels.cuda.kernel import Kernel, Recipe
from twofour.kernels.cuda.online_softmax import NOTHING, attend, load_rows, shares
from twofour.kernels.cuda.problem import AttentionProblem
from twofour.kernels.cuda.rounding import scaled

Array = NDArray[Any]

WORD = 32
"""Keys of a word of a mask."""
_CONFIGS = {0: 1, 1: 2, 2: 4, 3: 8}


@dataclass(frozen=True, eq=False)
class SparseAttentionProblem:
    """Attention to the keys that a pattern shows.

    Attributes:
        dense: types, sizes and scales; its mask and `causal` are not read, the pattern has them.
        pattern: which keys a query sees, of `dense.q_len` tokens, as many as there are keys.
        keep_strides: elements of the mask of keys from one sequence to the next, and from one key
            to the next, 0 where it is the same; () without one.
    """

    dense: AttentionProblem
    pattern: Pattern
    keep_strides: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Lists:
    """The tables of a pattern, as the head of this file has them."""

    tiles: NDArray[np.int32]
    blocks: NDArray[np.int32]
    masks: NDArray[np.uint32]

    @property
    def visited(self) -> int:
        """Blocks that all tiles go through."""
        return int((self.tiles[:, 3] - self.tiles[:, 1]).sum())

    @staticmethod
    def of(pattern: Pattern, queries: int, keys: int) -> Lists:
        """Cuts a pattern.

        Args:
            pattern: which keys are seen.
            queries: of a tile.
            keys: of a block, a multiple of `WORD`.
        """
        tiles: list[tuple[int, int, int, int]] = []
        blocks: list[tuple[int, int]] = []
        known: dict[bytes, int] = {}
        for number, first in enumerate(range(0, pattern.length, queries)):
            numbers, seen = _seen(pattern, first, queries, keys)
            whole = seen.all(axis=(1, 2))
            begin = len(blocks)
            blocks += [(int(block), 0) for block in numbers[whole]]
            middle = len(blocks)
            for block, mask in zip(numbers[~whole], _words(seen[~whole]), strict=True):
                blocks.append((int(block), known.setdefault(mask.tobytes(), len(known))))
            tiles.append((number, begin, middle, len(blocks)))
        tiles.sort(key=lambda tile: tile[1] - tile[3])
        held = b"".join(known) or bytes(queries * keys // 8)
        return Lists(
            np.array(tiles, np.int32),
            np.array(blocks or [(0, 0)], np.int32),
            np.frombuffer(held, np.uint32).reshape(-1, queries, keys // WORD),
        )


def _seen(
    pattern: Pattern, first: int, queries: int, keys: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Blocks that some of the queries see, and what each query sees, [blocks, queries, keys].

    Queries behind the last token see what all the others do, so that they make no block partial.
    """
    last = min(first + queries, pattern.length)
    numbers = pattern.candidates(first, last, keys)
    places = (numbers[:, None] * keys + np.arange(keys)).reshape(-1)
    seen = np.ones((queries, places.size), np.bool_)
    seen[: last - first] = pattern.visible(first, last, places)
    seen[last - first :] = seen[: last - first].all(axis=0)
    by_block = seen.reshape(queries, -1, keys).transpose(1, 0, 2)
    some = by_block.any(axis=(1, 2))
    return numbers[some], by_block[some]


def _words(seen: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """[blocks, queries, keys] to words of 32 keys, the first one in the lowest bit."""
    packed = np.packbits(seen, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4")


@triton.jit
def sparse_attention_rows(
    q,
    k,
    v,
    y,
    tiles,
    blocks,
    masks,
    keep,
    P: tl.constexpr,
    KEEP: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """All keys of the list of a tile of queries.

    The pointers are those of the roles, `keep` may be None. P is the dense problem, KEEP the
    strides of `keep`, SCALE that of the scores in units of log2, FACTOR that of the results in
    units of y's scale.
    """
    record = tiles + tl.program_id(0) // (P.heads * P.batch) * 4
    head = tl.program_id(0) % P.heads
    sequence = (tl.program_id(0) // P.heads % P.batch).to(tl.int64)
    row = tl.arange(0, BLOCK_Q)
    query = tl.load(record) * BLOCK_Q + row
    channel = tl.arange(0, BLOCK_D)
    q_base = q + sequence * P.q.sequence + head * P.head_dim
    edge: tl.constexpr = P.q_len % BLOCK_Q != 0
    queries = load_rows(q_base, query, channel, P.q.token, P.q_len, P.head_dim, BLOCK_D, edge)
    k_base = k + sequence * P.k.sequence + head * P.head_dim
    v_base = v + sequence * P.v.sequence + head * P.value_dim
    if keep is not None:
        keep += sequence * KEEP[0]

    sums = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], NOTHING, tl.float32)
    for place in range(tl.load(record + 1), tl.load(record + 2)):
        key = tl.load(blocks + place * 2) * BLOCK_K + tl.arange(0, BLOCK_K)
        keys, values = load_block(k_base, v_base, key, P, BLOCK_D, BLOCK_DV, False)
        seen = None
        if keep is not None:
            seen = (tl.load(keep + key * KEEP[1]) != 0)[None, :]
        state = (sums, total, top)
        sums, total, top = attend(
            state, queries, keys, values, None, seen, SCALE, P.q_zero, PRECISION
        )
    ends: tl.constexpr = P.k_len % BLOCK_K != 0
    for place in range(tl.load(record + 2), tl.load(record + 3)):
        column = tl.arange(0, BLOCK_K)
        key = tl.load(blocks + place * 2) * BLOCK_K + column
        keys, values = load_block(k_base, v_base, key, P, BLOCK_D, BLOCK_DV, ends)
        words = masks + tl.load(blocks + place * 2 + 1) * (BLOCK_Q * BLOCK_K // 32)
        words += row[:, None] * (BLOCK_K // 32) + column[None, :] // 32
        seen = (tl.load(words) >> (column % 32)[None, :]) & 1 != 0
        if keep is not None:
            kept = tl.load(keep + key * KEEP[1], mask=key < P.k_len, other=0)
            seen = seen & (kept != 0)[None, :]
        state = (sums, total, top)
        sums, total, top = attend(
            state, queries, keys, values, None, seen, SCALE, P.q_zero, PRECISION
        )

    channel = tl.arange(0, BLOCK_DV)
    there = (query[:, None] < P.q_len) & (channel[None, :] < P.value_dim)
    place = y + sequence * P.y.sequence + head * P.value_dim
    place += query[:, None] * P.y.token + channel[None, :]
    kind: tl.constexpr = y.dtype.element_ty
    tl.store(place, scaled(shares(sums, total, FACTOR), 1.0, kind, P.y_zero), mask=there)


def why_not(problem: SparseAttentionProblem, capability: int) -> str:
    """Why the kernel cannot take a problem; "" if it can."""
    dense = problem.dense
    if not dense.q_len == dense.k_len == problem.pattern.length:
        sizes = f"{dense.q_len} queries, {dense.k_len} keys"
        return f"the pattern is of {problem.pattern.length} tokens, not of {sizes}"
    return attention.why_not(dense, capability)


def recipes(
    problem: SparseAttentionProblem,
    constants: Mapping[str, Array],
    capability: int,
    *,
    effort: int = 2,
) -> tuple[Recipe, ...]:
    """Tiles of queries and keys, the best guess first.

    Args:
        problem: the attention.
        constants: none.
        capability: of the GPU, 90 for 9.0.
        effort: 0 to 3, how many.
    """
    if why_not(problem, capability):
        return ()
    found = []
    for tiles in _candidates(problem, capability)[: _CONFIGS[effort]]:
        lists = Lists.of(problem.pattern, tiles.queries, tiles.keys)
        found.append(recipe_of(problem, tiles, lists))
    return tuple(found)


def _candidates(problem: SparseAttentionProblem, capability: int) -> list[Tiles]:
    """Small tiles first: a band's edge costs less of them."""
    dense = problem.dense
    shapes = [t for t in tile_shapes(dense, capability) if t.keys % WORD == 0]
    return sorted(shapes, key=lambda t: (t.precision == "ieee", abs(t.queries * t.keys - 4096)))


def recipe_of(problem: SparseAttentionProblem, tiles: Tiles, lists: Lists) -> Recipe:
    """One way to run a problem.

    Args:
        problem: the attention.
        tiles: of queries and keys.
        lists: of the same tiles.
    """
    dense = problem.dense
    operands, numbers = operands_of(dense, tiles)
    operands += [("tiles", "int32"), ("blocks", "int32"), ("masks", "int32")]
    numbers["KEEP"] = problem.keep_strides
    if problem.keep_strides:
        operands.append(("keep", "bool"))
    else:
        numbers["keep"] = None
    programs = dense.batch * dense.heads * len(lists.tiles)
    kernel = Kernel(
        sparse_attention_rows,
        tuple(operands),
        numbers,
        (programs, 1, 1),
        tiles.warps,
        tiles.stages,
    )
    held = {"tiles": lists.tiles, "blocks": lists.blocks, "masks": lists.masks.view(np.int32)}
    return Recipe("sparse attention", tiles.words(dense.q.dtype), (kernel,), held)

"""Sparse attention: each tile of queries goes through a list of the blocks of keys that it sees.

All rules of a pattern are known when the kernel is made, so they end up in tables beside it:

    tiles   int32 [pieces, 5]  number of the tile, then where its list begins, where the blocks end
                               that all of its queries see whole, where the list ends, and its slot
    blocks  int32 [n, 2]       number of a block of keys, and which mask it has
    masks   int32 [m, BLOCK_Q, BLOCK_K / 32]    bit i of a word: the query sees key i of the 32
    joins   int32 [split, 3]   number of a tile in pieces, its first slot, and how many it has

Tables grow with what is seen, not with the square of the length; equal masks, as a band has them
all along, are held once. Tiles with long lists begin first, so that none is waited for at the end.
A list that is much longer than the others, as a global token has it, goes in pieces to several
programs: each leaves its sums in a slot, and a second kernel joins them. What is written at once
has slot -1. What happens to a block is online_softmax.py.

Roles: q, k, v, y, keep (bool, where `keep_strides`), the tables, and "parts" for the slots.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from twofour.core.sparse_attention import Pattern
from twofour.kernels.cuda import attention
from twofour.kernels.cuda.attention import Tiles, load_block, operands_of, store_tile, tile_shapes
from twofour.kernels.cuda.kernel import Kernel, Recipe, divided
from twofour.kernels.cuda.online_softmax import NOTHING, attend, load_rows
from twofour.kernels.cuda.problem import AttentionProblem

Array = NDArray[Any]

WORD = 32
"""Keys of a word of a mask."""
_CONFIGS = {0: 1, 1: 2, 2: 4, 3: 8}
_BLOCK, _PROGRAMS = 6144, 264
"""Scores that take as long as all else of a block; programs that an H200 has room for, at least."""
_SHORT, _MUCH = 8, 2
"""A list stays whole up to 8 blocks, and up to twice the median."""


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
    joins: NDArray[np.int32]

    @property
    def visited(self) -> int:
        """Blocks that all tiles go through."""
        return int((self.tiles[:, 3] - self.tiles[:, 1]).sum())

    @property
    def slots(self) -> int:
        """Of all tiles in pieces."""
        return int(self.joins[:, 2].sum())

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
        pieces, joins = _pieces(tiles)
        pieces.sort(key=lambda piece: piece[1] - piece[3])
        held = b"".join(known) or bytes(queries * keys // 8)
        return Lists(
            np.array(pieces, np.int32),
            np.array(blocks or [(0, 0)], np.int32),
            np.frombuffer(held, np.uint32).reshape(-1, queries, keys // WORD),
            np.array(joins, np.int32).reshape(-1, 3),
        )


def _pieces(
    tiles: list[tuple[int, int, int, int]],
) -> tuple[list[tuple[int, ...]], list[tuple[int, int, int]]]:
    """Tables `tiles` and `joins`: lists much longer than the median are cut into even pieces."""
    usual = float(np.median([end - begin for _, begin, _, end in tiles]))
    most = max(_SHORT, round(_MUCH * usual))
    pieces: list[tuple[int, ...]] = []
    joins: list[tuple[int, int, int]] = []
    slots = 0
    for number, begin, middle, end in tiles:
        count = divided(end - begin, most)
        if count <= 1:
            pieces.append((number, begin, middle, end, -1))
            continue
        edges = [begin + (end - begin) * i // count for i in range(count + 1)]
        for slot, (first, last) in enumerate(pairwise(edges), slots):
            pieces.append((number, first, min(max(middle, first), last), last, slot))
        joins.append((number, slots, count))
        slots += count
    return pieces, joins


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
    parts,
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

    The pointers are those of the roles, `keep` and `parts` may be None. P is the dense problem,
    KEEP the strides of `keep`, SCALE that of the scores in units of log2, FACTOR that of the
    results in units of y's scale.
    """
    record = tiles + tl.program_id(0) // (P.heads * P.batch) * 5
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
        seen = _bits(words, row, BLOCK_Q, BLOCK_K)
        if keep is not None:
            kept = tl.load(keep + key * KEEP[1], mask=key < P.k_len, other=0)
            seen = seen & (kept != 0)[None, :]
        state = (sums, total, top)
        sums, total, top = attend(
            state, queries, keys, values, None, seen, SCALE, P.q_zero, PRECISION
        )

    slot = tl.load(record + 4)
    if slot < 0:
        store_tile(y, sums, total, query, head, sequence, P, FACTOR, BLOCK_DV)
    elif parts is not None:
        part = parts + _slot(slot, head, sequence, P, BLOCK_Q, BLOCK_DV)
        element = row[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
        tl.store(part + element, sums)
        tl.store(part + BLOCK_Q * BLOCK_DV + row, total)
        tl.store(part + BLOCK_Q * (BLOCK_DV + 1) + row, top)


@triton.jit
def sparse_attention_joined(
    parts,
    joins,
    y,
    P: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The tiles whose lists went in pieces."""
    record = joins + tl.program_id(0) // (P.heads * P.batch) * 3
    head = tl.program_id(0) % P.heads
    sequence = (tl.program_id(0) // P.heads % P.batch).to(tl.int64)
    row = tl.arange(0, BLOCK_Q)
    place = row[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    sums = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], NOTHING, tl.float32)
    first = tl.load(record + 1)
    for slot in range(first, first + tl.load(record + 2)):
        part = parts + _slot(slot, head, sequence, P, BLOCK_Q, BLOCK_DV)
        other = tl.load(part + BLOCK_Q * (BLOCK_DV + 1) + row)
        high = tl.maximum(top, other)
        start = tl.where(high == NOTHING, 0.0, high)
        fade = tl.exp2(top - start)
        share = tl.exp2(other - start)
        total = total * fade + tl.load(part + BLOCK_Q * BLOCK_DV + row) * share
        sums = sums * fade[:, None] + tl.load(part + place) * share[:, None]
        top = high
    query = tl.load(record) * BLOCK_Q + row
    store_tile(y, sums, total, query, head, sequence, P, FACTOR, BLOCK_DV)


@triton.jit
def _bits(words, row, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A mask [BLOCK_Q, BLOCK_K]: each word is read once, and not for each of its keys."""
    number: tl.constexpr = BLOCK_K // 32
    held = tl.load(words + row[:, None] * number + tl.arange(0, number)[None, :])
    bits = (held[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, [BLOCK_Q, BLOCK_K]) != 0


@triton.jit
def _slot(slot, head, sequence, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Where a slot begins: sums, totals, and the highest scores."""
    return ((slot * P.batch + sequence) * P.heads + head) * (BLOCK_Q * (BLOCK_DV + 2))


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
    return tuple(
        recipe_of(problem, tiles, lists)
        for tiles, lists in _candidates(problem, capability)[: _CONFIGS[effort]]
    )


def _candidates(problem: SparseAttentionProblem, capability: int) -> list[tuple[Tiles, Lists]]:
    """All tiles that fit, in order of a guess: what is computed in vain, and idle processors."""
    shapes = [t for t in tile_shapes(problem.dense, capability) if t.keys % WORD == 0]
    found = [(t, Lists.of(problem.pattern, t.queries, t.keys)) for t in shapes]
    heads = problem.dense.batch * problem.dense.heads

    def guess(candidate: tuple[Tiles, Lists]) -> tuple[bool, float]:
        tiles, lists = candidate
        work = lists.visited * (tiles.queries * tiles.keys + _BLOCK)
        idle = max(1.0, _PROGRAMS / (heads * len(lists.tiles)))
        return tiles.precision == "ieee", work * idle

    return sorted(found, key=guess)


def recipe_of(problem: SparseAttentionProblem, tiles: Tiles, lists: Lists) -> Recipe:
    """One way to run a problem.

    Args:
        problem: the attention.
        tiles: of queries and keys.
        lists: of the same tiles.
    """
    dense, programs = problem.dense, problem.dense.batch * problem.dense.heads
    operands, numbers = operands_of(dense, tiles)
    operands += [("tiles", "int32"), ("blocks", "int32"), ("masks", "int32")]
    numbers |= {"KEEP": problem.keep_strides, "keep": None, "parts": None}
    held = {"tiles": lists.tiles, "blocks": lists.blocks, "masks": lists.masks.view(np.int32)}
    calls, scratch = [], {}
    if problem.keep_strides:
        operands.append(("keep", "bool"))
        del numbers["keep"]
    if lists.slots:
        operands.append(("parts", "float32"))
        del numbers["parts"]
        shared = {name: numbers[name] for name in ("P", "FACTOR", "BLOCK_Q", "BLOCK_DV")}
        taken = (("parts", "float32"), ("joins", "int32"), ("y", dense.y.dtype))
        grid = (programs * len(lists.joins), 1, 1)
        calls.append(Kernel(sparse_attention_joined, taken, shared, grid))
        held["joins"] = lists.joins
        wide = numbers["BLOCK_Q"] * (numbers["BLOCK_DV"] + 2)
        scratch["parts"] = 4 * lists.slots * programs * wide
    grid = (programs * len(lists.tiles), 1, 1)
    pieces = Kernel(
        sparse_attention_rows, tuple(operands), numbers, grid, tiles.warps, tiles.stages
    )
    words = tiles.words(dense.q.dtype)
    return Recipe("sparse attention", words, (pieces, *calls), held, scratch)

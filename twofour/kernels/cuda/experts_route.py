"""Which expert computes which token: the kernels before and after the products of experts.py.

    choose   chosen int32 [tokens, k], gates float32 [tokens, k]: the k highest logits of a token;
             of a masked MLP expert 0 where the mask is set, and one that there is not elsewhere
    sort     owners int32 [slots]: which choice (token * k + place) each slot is; slots are ordered
             by expert, then by token. counts int32 [experts]: slots of each expert
    combine  y [tokens, hidden]: gate * result, added in the order of the choices

All grids are fixed: how many rows an expert gets is known on the GPU alone. `sort` has a program
for each expert; it reads all choices twice, first to count those of lower experts, where its slots
begin, and its own, then to place them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose(
    logits,
    chosen,
    gates,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The K experts of BLOCK tokens and their gates; of equal logits the lower expert is first."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    there = (token[:, None] < TOKENS) & (expert < EXPERTS)
    place = logits + token.to(tl.int64)[:, None] * EXPERTS + expert
    values = tl.load(place, mask=there, other=0.0).to(tl.float32)
    values = tl.where(expert < EXPERTS, values, -float("inf"))
    highest = tl.max(values, axis=1)[:, None]
    shares = tl.where(expert < EXPERTS, tl.exp(values - highest), 0.0)
    free = tl.broadcast_to(expert < EXPERTS, (BLOCK, BLOCK_EXPERTS))
    choice = tl.arange(0, BLOCK_K)[None, :]
    indices = tl.zeros([BLOCK, BLOCK_K], tl.int32)
    parts = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for number in tl.static_range(K):
        rest = tl.where(free, values, -float("inf"))
        top = free & (rest == tl.max(rest, axis=1)[:, None])
        found = tl.min(tl.where(top, expert, EXPERTS - 1), axis=1)[:, None]
        part = tl.sum(tl.where(expert == found, shares, 0.0), axis=1)[:, None]
        indices = tl.where(choice == number, found, indices)
        parts = tl.where(choice == number, part, parts)
        free = free & (expert != found)
    if NORMALIZE:
        total = tl.sum(parts, axis=1)[:, None]
    else:
        total = tl.sum(shares, axis=1)[:, None]
    inside = (token[:, None] < TOKENS) & (choice < K)
    at = token[:, None] * K + choice
    tl.store(chosen + at, indices, mask=inside)
    tl.store(gates + at, parts / total, mask=inside)


@triton.jit
def choose_masked(mask, chosen, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Expert 0 where the mask is set, 1 elsewhere."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < TOKENS
    tl.store(chosen + token, (tl.load(mask + token, mask=there) == 0).to(tl.int32), mask=there)


@triton.jit
def sort(chosen, owners, counts, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """The slots of one expert."""
    mine = tl.program_id(0)
    lower = tl.zeros([BLOCK], tl.int32)
    own = tl.zeros([BLOCK], tl.int32)
    for first in range(0, SLOTS, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        expert = tl.load(chosen + slot, mask=slot < SLOTS, other=2147483647)
        lower += (expert < mine).to(tl.int32)
        own += (expert == mine).to(tl.int32)
    tl.store(counts + mine, tl.sum(own))
    begin = tl.sum(lower)
    for first in range(0, SLOTS, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        here = tl.load(chosen + slot, mask=slot < SLOTS, other=2147483647) == mine
        ones = here.to(tl.int32)
        tl.store(owners + begin + tl.cumsum(ones, axis=0) - 1, slot, mask=here)
        begin += tl.sum(ones)


@triton.jit
def combine(
    results,
    chosen,
    gates,
    y,
    TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """BLOCK tokens of y; without gates, what was not chosen is 0."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None].to(tl.int64)
    channel = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)[None, :]
    inside = (token < TOKENS) & (channel < HIDDEN)
    total = tl.zeros([BLOCK, BLOCK_HIDDEN], tl.float32)
    for number in tl.static_range(K):
        at = token * K + number
        if gates is None:
            kept = inside & (tl.load(chosen + at, mask=token < TOKENS, other=1) == 0)
            total = tl.load(results + at * HIDDEN + channel, mask=kept, other=0.0)
        else:
            gate = tl.load(gates + at, mask=token < TOKENS, other=0.0)
            total += gate * tl.load(results + at * HIDDEN + channel, mask=inside, other=0.0)
    tl.store(y + token * HIDDEN + channel, total.to(y.dtype.element_ty), mask=inside)

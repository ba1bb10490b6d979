"""Which expert computes which token: the kernels around the products of experts.py, the problem.

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

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from twofour.kernels.cuda.kernel import Kernel, divided

_ROUTE_TOKENS = 16
_SORTED = 4096
_COMBINED = 1024


@dataclass(frozen=True)
class ExpertsProblem:
    """A layer of experts.

    Attributes:
        tokens: rows of x.
        experts: how many there are; 1 of a masked MLP.
        k: experts a token; 1 of a masked MLP.
        hidden: channels of x and y.
        inner: channels that the second product reads.
        activation: a name of `core.experts.ACTIVATIONS`.
        x: type of x and y, a real one.
        weights: type that is multiplied: that of x, or int8.
        routed: by logits of type `logits`, not by a mask.
        normalize: gates of a token add up to 1.
        logits: their type.
    """

    tokens: int
    experts: int
    k: int
    hidden: int
    inner: int
    activation: str
    x: str
    weights: str
    routed: bool = True
    normalize: bool = True
    logits: str = "float32"

    @property
    def slots(self) -> int:
        """The most rows that experts have in all."""
        return self.tokens * self.k

    @property
    def usual_rows(self) -> int:
        """Of an expert, if the router is fair."""
        return divided(self.slots, self.experts)

    def tiles(self, rows: int) -> int:
        """The most tiles of so many rows that a routing may need."""
        busy = min(self.experts, self.slots)
        return (self.slots - busy) // rows + busy


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


def routing_calls(problem: ExpertsProblem) -> tuple[Kernel, Kernel]:
    """Who computes what: from logits or a mask to owners and counts."""
    p = problem
    if p.routed:
        numbers = {
            "TOKENS": p.tokens,
            "EXPERTS": p.experts,
            "K": p.k,
            "NORMALIZE": p.normalize,
            "BLOCK": _ROUTE_TOKENS,
            "BLOCK_EXPERTS": triton.next_power_of_2(p.experts),
            "BLOCK_K": triton.next_power_of_2(p.k),
        }
        route = (("logits", p.logits), ("chosen", "int32"), ("gates", "float32"))
        grid = (divided(p.tokens, _ROUTE_TOKENS), 1, 1)
        chosen = Kernel(choose, route, numbers, grid)
    else:
        numbers = {"TOKENS": p.tokens, "BLOCK": _COMBINED}
        grid = (divided(p.tokens, _COMBINED), 1, 1)
        select = (("mask", "bool"), ("chosen", "int32"))
        chosen = Kernel(choose_masked, select, numbers, grid)
    block = min(_SORTED, max(128, triton.next_power_of_2(p.slots)))
    places = (("chosen", "int32"), ("owners", "int32"), ("counts", "int32"))
    sizes = {"SLOTS": p.slots, "BLOCK": block}
    return chosen, Kernel(sort, places, sizes, (p.experts, 1, 1), max(1, block // 512))


def combine_call(problem: ExpertsProblem) -> Kernel:
    """The results of a token's experts, added up."""
    p = problem
    channels = min(_COMBINED, triton.next_power_of_2(p.hidden))
    tokens = max(1, _COMBINED // channels)
    numbers = {
        "TOKENS": p.tokens,
        "HIDDEN": p.hidden,
        "K": p.k,
        "BLOCK": tokens,
        "BLOCK_HIDDEN": channels,
    }
    operands = [("results", "float32"), ("chosen", "int32")]
    missing: dict[str, Any] = {} if p.routed else {"gates": None}
    if p.routed:
        operands.append(("gates", "float32"))
    operands.append(("y", p.x))
    grid = (divided(p.tokens, tokens), divided(p.hidden, channels), 1)
    return Kernel(combine, tuple(operands), numbers | missing, grid)

"""Attention in one pass over the keys: scores stay in registers (see online_softmax.py).

A program has a tile of queries of one head of one sequence:

    q [BLOCK_Q, D]
    for each block of keys that one of them sees:
        k, v [BLOCK_K, D], [BLOCK_K, DV]      the next ones on their way meanwhile
    y [BLOCK_Q, DV]

Blocks that are wholly after a causal tile are not visited, and only those on its diagonal and at
the end of the keys are compared with a mask. Heads are slices of channels, read where they lie;
channels that are no power of 2 are filled with zeros in registers.

Quantized q and k are multiplied as bytes, sums int32 (or float32 of float8). Exponentials are
rounded to float16 instead of to bytes, and v is converted to it, which is exact for bytes: finer
than steps of 1/255, at the speed that float16 products have.

float32 is multiplied in three products of TF32 parts, as good as float32 up to the last bits, or
exactly by the plain units.

Roles: q, k, v, y, mask (where there is one), see `problem.AttentionProblem`.

Source: Dao 2023, arXiv:2307.08691.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from numpy.typing import NDArray

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.kernel import SHARED_BYTES, Kernel, Recipe, divided, of_capability
from twofour.kernels.cuda.online_softmax import (
    LOG2_E,
    NOTHING,
    attend,
    load_rows,
    log2_mask,
    shares,
)
from twofour.kernels.cuda.problem import QUANTIZED, REAL, AttentionProblem
from twofour.kernels.cuda.rounding import scaled
from twofour.kernels.cuda.rows import FLOAT8_SINCE

Array = NDArray[Any]

MOST_CHANNELS = 256
"""Of a head: a tile of them has to fit registers."""
PRECISIONS = ("tf32x3", "ieee")
"""Of float32 products."""
_MOST_OFFSET = 2**31 - 1
_CONFIGS = {0: 1, 1: 3, 2: 8, 3: 16}
_PROCESSORS = 132  # of an H100 or H200; others are near enough to order candidates by


@triton.jit
def attention_rows(
    q,
    k,
    v,
    y,
    mask,
    P: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """All keys of a tile of queries.

    The pointers are those of the roles, mask may be None. P is the problem, SCALE that of the
    scores in units of log2, FACTOR that of the results in units of y's scale.
    """
    tiles: tl.constexpr = (P.q_len + BLOCK_Q - 1) // BLOCK_Q
    tile = tl.program_id(0) % tiles
    if P.causal:
        tile = tiles - 1 - tile  # those with most keys first
    head = tl.program_id(0) // tiles % P.heads
    sequence = (tl.program_id(0) // tiles // P.heads).to(tl.int64)
    query = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    q_base = q + sequence * P.q.sequence + head * P.head_dim
    edge: tl.constexpr = P.q_len % BLOCK_Q != 0
    queries = load_rows(q_base, query, channel, P.q.token, P.q_len, P.head_dim, BLOCK_D, edge)
    k_base = k + sequence * P.k.sequence + head * P.head_dim
    v_base = v + sequence * P.v.sequence + head * P.value_dim
    if mask is not None:
        mask += sequence * P.mask_strides[0] + head.to(tl.int64) * P.mask_strides[1]

    whole = P.k_len // BLOCK_K
    last = (P.k_len + BLOCK_K - 1) // BLOCK_K
    if P.causal:
        whole = tl.minimum(whole, (tile * BLOCK_Q + 1) // BLOCK_K)
        last = tl.minimum(last, (tile * BLOCK_Q + BLOCK_Q + BLOCK_K - 1) // BLOCK_K)
    sums = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], NOTHING, tl.float32)
    for block in range(0, whole):
        key = block * BLOCK_K + tl.arange(0, BLOCK_K)
        keys, values = load_block(k_base, v_base, key, P, BLOCK_D, BLOCK_DV, False)
        bias = None
        if mask is not None:
            bias = _bias(mask, query, key, P)
        state = (sums, total, top)
        sums, total, top = attend(
            state, queries, keys, values, bias, None, SCALE, P.q_zero, PRECISION
        )
    for block in range(whole, last):
        key = block * BLOCK_K + tl.arange(0, BLOCK_K)
        keys, values = load_block(k_base, v_base, key, P, BLOCK_D, BLOCK_DV, True)
        bias = None
        if mask is not None:
            bias = _bias(mask, query, key, P)
        seen = key[None, :] < P.k_len
        if P.causal:
            seen = seen & (key[None, :] <= query[:, None])
        state = (sums, total, top)
        sums, total, top = attend(
            state, queries, keys, values, bias, seen, SCALE, P.q_zero, PRECISION
        )

    store_tile(y, sums, total, query, head, sequence, P, FACTOR, BLOCK_DV)


@triton.jit
def store_tile(
    y,
    sums,
    total,
    query,
    head,
    sequence,
    P: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The results of a tile of queries."""
    channel = tl.arange(0, BLOCK_DV)
    there = (query[:, None] < P.q_len) & (channel[None, :] < P.value_dim)
    place = y + sequence * P.y.sequence + head * P.value_dim
    place += query[:, None] * P.y.token + channel[None, :]
    kind: tl.constexpr = y.dtype.element_ty
    tl.store(place, scaled(shares(sums, total, FACTOR), 1.0, kind, P.y_zero), mask=there)


@triton.jit
def load_block(
    k_base,
    v_base,
    key,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Some keys and their values, zeros behind the last one where EDGE."""
    channel = tl.arange(0, BLOCK_D)
    keys = load_rows(k_base, key, channel, P.k.token, P.k_len, P.head_dim, BLOCK_D, EDGE)
    channel = tl.arange(0, BLOCK_DV)
    values = load_rows(v_base, key, channel, P.v.token, P.k_len, P.value_dim, BLOCK_DV, EDGE)
    return keys, values


@triton.jit
def _bias(mask, query, key, P: tl.constexpr):
    """The mask of a tile, one row of it where all queries have the same."""
    if P.mask_strides[2] == 0:
        raw = tl.load(mask + key * P.mask_strides[3], mask=key < P.k_len, other=0.0)
        return log2_mask(raw)[None, :]
    else:
        there = (query[:, None] < P.q_len) & (key[None, :] < P.k_len)
        row = query[:, None].to(tl.int64) * P.mask_strides[2]
        places = mask + row + key[None, :] * P.mask_strides[3]
        return log2_mask(tl.load(places, mask=there, other=0.0))


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        queries: of a program.
        keys: of a block.
        warps: of a program.
        stages: blocks of keys on their way.
        precision: of products of float32.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    precision: str = "tf32x3"

    def words(self, dtype: str) -> str:
        """As reports show it."""
        text = f"{self.queries}x{self.keys}, {self.warps} warps, {self.stages} stages"
        return f"{text}, {self.precision}" if dtype == "float32" else text


def why_not(problem: AttentionProblem, capability: int) -> str:
    """Why the kernel cannot take a problem; "" if it can."""
    parts = (problem.q, problem.k, problem.v)
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or problem.q.dtype not in (*REAL, *QUANTIZED):
        return f"q, k and v are {', '.join(part.dtype for part in parts)}: expected one type"
    if problem.y.dtype not in (*REAL, *QUANTIZED):
        return f"y is {problem.y.dtype}"
    if "float8e4m3fn" in (problem.q.dtype, problem.y.dtype) and capability < FLOAT8_SINCE:
        return f"float8 needs a GPU of compute capability 8.9, this one has {capability / 10}"
    if max(problem.head_dim, problem.value_dim) > MOST_CHANNELS:
        widest = max(problem.head_dim, problem.value_dim)
        return f"a head has {widest} channels: {MOST_CHANNELS} at most"
    if not problem.score_scale > 0:
        return f"scores are multiplied by {problem.score_scale}: expected a positive number"
    length = max(problem.q_len, problem.k_len)
    if length * max(part.token for part in (*parts, problem.y)) > _MOST_OFFSET:
        return "a sequence has more than 2**31 elements"
    return ""


def recipes(
    problem: AttentionProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
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
        Recipe("attention", tiles.words(problem.q.dtype), (_kernel(problem, tiles),))
        for tiles in _candidates(problem, capability)[: _CONFIGS[effort]]
    )


def _candidates(problem: AttentionProblem, capability: int) -> list[Tiles]:
    """All tiles that fit, in order of a guess: so many programs that all processors have some."""
    found = tile_shapes(problem, capability)
    heads = problem.batch * problem.heads

    def waste(tiles: Tiles) -> float:
        programs = heads * divided(problem.q_len, tiles.queries)
        rows = divided(problem.q_len, tiles.queries) * tiles.queries / problem.q_len
        keys = divided(problem.k_len, tiles.keys) * tiles.keys / problem.k_len
        return rows * keys * max(1.0, _PROCESSORS / programs)

    order = sorted(range(len(found)), key=lambda i: (round(waste(found[i]), 1), i))
    return [found[i] for i in order]


def tile_shapes(problem: AttentionProblem, capability: int) -> list[Tiles]:
    """Tiles whose operands fit registers and shared memory, the usual best first."""
    dtype = problem.q.dtype
    d, dv = block(problem.head_dim, dtype), block(problem.value_dim, dtype)
    room = of_capability(SHARED_BYTES, capability)

    def shared_bytes(tiles: Tiles) -> int:
        size = DTYPES[dtype]
        return (tiles.queries * d + tiles.keys * tiles.stages * (d + dv)) * size

    return [t for t in _usual_tiles(dtype, max(d, dv)) if shared_bytes(t) <= room]


def _usual_tiles(dtype: str, wide: int) -> list[Tiles]:
    """By the channels of a head as they lie in registers."""
    if dtype == "float32":
        shapes = [(64, 32, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2), (16, 32, 2, 2), (128, 32, 8, 2)]
        if wide > 64:
            shapes = [(64, 32, 8, 2), (32, 32, 4, 2), (16, 32, 4, 2)]
        if wide > 128:
            shapes = [(32, 16, 4, 2), (16, 16, 4, 2), (16, 32, 4, 1)]
        return [Tiles(*shape, precision) for precision in PRECISIONS for shape in shapes]
    usual = [
        (128, 64, 4, 3),
        (128, 128, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 64, 8, 3),
        (32, 64, 4, 3),
        (16, 64, 4, 3),
        (64, 32, 4, 4),
        (128, 128, 8, 2),
        (32, 128, 4, 2),
        (16, 32, 2, 3),
    ]
    if wide > 64:
        usual.insert(0, usual.pop(1))
        usual = [shape for shape in usual if shape[:3] != (128, 64, 4)]
    if wide > 128:
        usual = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)]
    return [Tiles(*shape) for shape in usual]


def block(channels: int, dtype: str) -> int:
    """Channels as they lie in registers: a power of 2, and what a product takes at least."""
    least = 32 if DTYPES[dtype] == 1 else 16
    return max(least, int(triton.next_power_of_2(channels)))


def operands_of(
    problem: AttentionProblem, tiles: Tiles
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Operands q, k, v and y of a kernel, and its constants."""
    parts = {"q": problem.q, "k": problem.k, "v": problem.v, "y": problem.y}
    operands = [(role, part.dtype) for role, part in parts.items()]
    numbers: dict[str, Any] = {
        "P": problem,
        "SCALE": problem.score_scale * LOG2_E.value,
        "FACTOR": problem.v_scale / problem.y_scale,
        "PRECISION": tiles.precision,
        "BLOCK_Q": tiles.queries,
        "BLOCK_K": tiles.keys,
        "BLOCK_D": block(problem.head_dim, problem.q.dtype),
        "BLOCK_DV": block(problem.value_dim, problem.q.dtype),
    }
    return operands, numbers


def _kernel(problem: AttentionProblem, tiles: Tiles) -> Kernel:
    """One start of the kernel."""
    operands, numbers = operands_of(problem, tiles)
    if problem.mask_strides:
        operands.append(("mask", "float32"))
    else:
        numbers["mask"] = None
    programs = problem.batch * problem.heads * divided(problem.q_len, tiles.queries)
    return Kernel(
        attention_rows,
        tuple(operands),
        numbers,
        (programs, 1, 1),
        tiles.warps,
        tiles.stages,
    )

"""Sparse attention on a GPU, in Triton's interpreter: dense attention with the pattern's mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.cuda.attention_cases import Case, flat
from tests.kernels.cuda.interpret import interpret
from twofour.core.sparse_attention import Pattern, additive
from twofour.kernels.cuda.attention import Tiles
from twofour.kernels.cuda.kernel import Kernel, compile_kernel
from twofour.kernels.cuda.sparse_attention import (
    WORD,
    Lists,
    SparseAttentionProblem,
    recipe_of,
    recipes,
    why_not,
)

SMALL = Tiles(16, 32, 4, 2)
TABLE = np.array([[0, 3], [1, -1], [-1, -1]], np.int32)
PATTERNS = {
    "band": Pattern(100, window=20),
    "longformer": Pattern(75, window=3, global_tokens=2),
    "causal": Pattern(64, window=5, causal=True),
    "causal, all": Pattern(49, window=48, causal=True),
    "table": Pattern(70, block=16, blocks=TABLE),
    "bigbird": Pattern(90, window=8, global_tokens=1, block=8, blocks=TABLE),
    "nothing": Pattern(20),
    "one token": Pattern(1, window=0),
    "in pieces": Pattern(600, window=10, global_tokens=20),
    "in pieces, causal": Pattern(500, window=-1, global_tokens=3, causal=True),
}


def case_of(
    pattern: Pattern, dtype: str, keep: torch.Tensor | None = None, d: int = 16
) -> tuple[Case, SparseAttentionProblem]:
    """The operands, with the mask that dense attention would have, and the problem."""
    hidden = additive(pattern, None if keep is None else keep.numpy())
    case = Case.of(
        dtype, (pattern.length,) * 2, 2, (d, d), mask=torch.from_numpy(hidden).contiguous()
    )
    strides: tuple[int, ...] = ()
    if keep is not None:
        case.tensors["keep"] = keep
        strides = (0 if len(keep) == 1 else keep.stride(0), 0 if keep.shape[1] == 1 else 1)
    dense = replace(case.problem, mask_strides=())
    return case, SparseAttentionProblem(dense, pattern, strides)


def check(pattern: Pattern, dtype: str, keep: torch.Tensor | None = None) -> None:
    case, problem = case_of(pattern, dtype, keep)
    lists = Lists.of(pattern, SMALL.queries, SMALL.keys)
    interpret(recipe_of(problem, SMALL, lists), flat(case.tensors))
    assert case.wrong() == ""


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str) -> None:
    check(PATTERNS[name], "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_types(dtype: str) -> None:
    check(PATTERNS["bigbird"], dtype)


@pytest.mark.parametrize("shape", [(2, 90), (1, 90), (2, 1)])
def test_masks_of_keys(shape: tuple[int, int]) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.7
    check(PATTERNS["bigbird"], "float32", keep)


@pytest.mark.parametrize("name", PATTERNS)
def test_lists_are_the_pattern(name: str) -> None:
    """Every pair of a query and a key, read back from the tables."""
    pattern = PATTERNS[name]
    for queries, keys in ((16, 32), (32, 64)):
        lists = Lists.of(pattern, queries, keys)
        rounded = -(-pattern.length // queries) * queries
        seen = np.zeros((rounded, pattern.length + keys), bool)
        for tile, begin, middle, end, _ in lists.tiles:
            rows = slice(tile * queries, (tile + 1) * queries)
            for place in range(begin, end):
                block, mask = lists.blocks[place]
                bits = np.unpackbits(
                    lists.masks[mask].view(np.uint8), axis=-1, bitorder="little"
                ).astype(bool)
                columns = slice(block * keys, (block + 1) * keys)
                seen[rows, columns] = True if place < middle else bits
        assert (seen[: pattern.length, : pattern.length] == pattern.mask()).all()
        assert not seen[: pattern.length, pattern.length :].any()


@pytest.mark.parametrize("name", ["in pieces", "longformer", "nothing"])
def test_long_lists_go_in_even_pieces(name: str) -> None:
    lists = Lists.of(PATTERNS[name], 16, 32)
    lengths = lists.tiles[:, 3] - lists.tiles[:, 1]
    slots = np.sort(lists.tiles[lists.tiles[:, 4] >= 0][:, 4])
    assert slots.tolist() == list(range(lists.slots))
    for tile, first, count in lists.joins:
        mine = np.flatnonzero(lists.tiles[:, 0] == tile)
        assert sorted(lists.tiles[mine, 4]) == list(range(first, first + count))
        assert np.ptp(lengths[mine]) <= 1
    assert lengths.max() <= max(8, 2 * np.median(lengths))
    assert bool(lists.slots) == (name == "in pieces")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_pieces_of_other_types_and_masks(dtype: str) -> None:
    keep = torch.rand((2, 600), generator=torch.Generator().manual_seed(2)) < 0.7
    check(PATTERNS["in pieces"], dtype, keep)


def test_lists_of_a_band_grow_with_the_length_alone() -> None:
    short, long = (Lists.of(Pattern(n, window=64), 64, WORD) for n in (2048, 4096))
    assert long.visited < 2.1 * short.visited
    assert len(long.masks) == len(short.masks)


@pytest.mark.parametrize("name", ["longformer", "in pieces"])
def test_it_compiles_without_a_gpu(name: str) -> None:
    keep = torch.ones(2, PATTERNS[name].length, dtype=torch.bool)
    _, problem = case_of(PATTERNS[name], "float16", keep, 64)
    (recipe,) = recipes(problem, {}, 90, effort=0)
    assert len(recipe.calls) == (2 if name == "in pieces" else 1)
    for call in recipe.calls:
        assert isinstance(call, Kernel)
        assert compile_kernel(call, 90).cubin[:4] == b"\x7fELF"


def test_wide_bands_get_large_tiles_and_short_sequences_small_ones() -> None:
    guesses = []
    for pattern in (Pattern(4096, window=256), Pattern(512, window=64)):
        _, small = case_of(PATTERNS["one token"], "float16", d=64)
        dense = replace(small.dense, q_len=pattern.length, k_len=pattern.length, heads=12)
        found = recipes(SparseAttentionProblem(dense, pattern), {}, 90, effort=2)
        assert len({recipe.config for recipe in found}) == 4
        guesses.append(int(found[0].config.partition("x")[0]))
    assert guesses[0] == 128 > guesses[1]


def test_a_pattern_of_another_length_is_refused() -> None:
    _, problem = case_of(PATTERNS["band"], "float32")
    wrong = replace(problem, pattern=PATTERNS["table"])
    assert "of 70 tokens" in why_not(wrong, 90)
    assert recipes(wrong, {}, 90) == ()

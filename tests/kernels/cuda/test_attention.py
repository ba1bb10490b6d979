"""Attention on a GPU, in Triton's interpreter: near the definition in every form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda.attention_cases import Case, flat, padding
from tests.kernels.cuda.interpret import interpret
from twofour.kernels.cuda.attention import Tiles, _kernel, recipes, why_not
from twofour.kernels.cuda.kernel import Recipe, compile_kernel

SMALL = Tiles(16, 16, 4, 2)


def check(case: Case, tiles: Tiles = SMALL) -> None:
    recipe = Recipe("attention", "", (_kernel(case.problem, tiles),))
    interpret(recipe, flat(case.tensors))
    assert case.wrong() == ""


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float8e4m3fn"])
@pytest.mark.parametrize("causal", [False, True])
def test_types(dtype: str, causal: bool) -> None:
    check(Case.of(dtype, (19, 37), 2, (24, 24), causal=causal))
    check(Case.of(dtype, (33, 33), 2, (16, 40), causal=causal))


@pytest.mark.parametrize("lengths", [(1, 1), (16, 16), (17, 15), (1, 33), (40, 7)])
def test_lengths(lengths: tuple[int, int]) -> None:
    check(Case.of("float32", lengths, 1, (16, 16), causal=lengths[0] == 40))


@pytest.mark.parametrize("shape", [(2, 1, 1, 21), (1, 3, 18, 21), (2, 3, 18, 21), (1, 1, 18, 1)])
def test_masks_are_broadcast(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    mask = torch.randn(shape)
    mask[mask > 1] = -torch.inf
    check(Case.of("float32", (18, 21), 3, (16, 16), mask=mask))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_query_without_keys_gives_zeros(dtype: str) -> None:
    case = Case.of(dtype, (18, 21), 2, (16, 16), mask=padding(2, 21, (21, 4)))
    check(case)
    assert (case.tensors["y"][0] == 0).all()


def test_a_very_low_mask_hides_nothing_by_itself() -> None:
    lowest = torch.full((2, 1, 1, 21), torch.finfo(torch.float32).min)
    check(Case.of("float32", (4, 21), 2, (16, 16), mask=lowest))


@pytest.mark.parametrize("dtype", ["int8", "float8e4m3fn", "float16"])
@pytest.mark.parametrize("out", ["int8", "float8e4m3fn", "float16"])
def test_types_of_the_result(dtype: str, out: str) -> None:
    check(Case.of(dtype, (18, 18), 1, (32, 32), out=out))


def test_a_zero_point_of_q() -> None:
    case = Case.of("int8", (18, 18), 2, (24, 24))
    check(replace(case, problem=replace(case.problem, q_zero=17)))


def test_all_recipes_agree() -> None:
    case = Case.of("float16", (18, 40), 1, (20, 20), batch=1)
    found = recipes(case.problem, {}, 90, effort=3)
    assert len(found) > 6
    for recipe in found[::3]:
        interpret(recipe, flat(case.tensors))
        assert case.wrong() == "", recipe.config


def test_refusals() -> None:
    problem = Case.of("float16", (4, 4), 1, (16, 16)).problem
    assert why_not(problem, 80) == ""
    assert "257 channels" in why_not(replace(problem, head_dim=257), 90)
    assert "positive" in why_not(replace(problem, score_scale=-1.0), 90)
    mixed = replace(problem, k=replace(problem.k, dtype="float32"))
    assert "expected one type" in why_not(mixed, 90)
    assert recipes(mixed, {}, 90) == ()
    assert "8.9" in why_not(Case.of("float8e4m3fn", (4, 4), 1, (32, 32)).problem, 80)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_it_compiles_without_a_gpu(dtype: str, capability: int) -> None:
    case = Case.of(dtype, (197, 197), 2, (64, 80), causal=True)
    (recipe,) = recipes(case.problem, {}, capability, effort=0)
    (kernel,) = recipe.calls
    assert compile_kernel(kernel, capability).cubin[:4] == b"\x7fELF"

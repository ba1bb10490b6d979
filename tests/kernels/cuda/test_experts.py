"""Routed experts and the masked MLP on a GPU, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda.experts_cases import Layer
from tests.kernels.cuda.interpret import interpret
from twofour.core.experts import ACTIVATIONS
from twofour.kernels.cuda.experts import recipes, why_not
from twofour.kernels.cuda.experts_route import ExpertsProblem
from twofour.kernels.cuda.kernel import compile_kernel

PLAIN = ExpertsProblem(9, 4, 2, 24, 40, "Gelu", "float32", "float32")
MASKED = replace(PLAIN, experts=1, k=1, routed=False)


def check(layer: Layer) -> None:
    (recipe,) = recipes(layer.problem, layer.constants, 90, effort=0)
    interpret(recipe, layer.tensors)
    assert layer.wrong() == ""


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    check(Layer.of(replace(PLAIN, activation=activation)))


@pytest.mark.parametrize(("x", "weights"), [
    ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "int8"), ("float16", "int8"),
])  # fmt: skip
@pytest.mark.parametrize("activation", ["Relu", "SwiGlu"])
def test_types(x: str, weights: str, activation: str) -> None:
    check(Layer.of(replace(PLAIN, x=x, weights=weights, activation=activation)))


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_choices(k: int, normalize: bool) -> None:
    check(Layer.of(replace(PLAIN, k=k, normalize=normalize)))


@pytest.mark.parametrize("tokens", [1, 16, 35])
def test_all_tokens_may_choose_one_expert(tokens: int) -> None:
    check(Layer.of(replace(PLAIN, tokens=tokens, k=1, experts=5), only=3))


def test_equal_and_barred_logits() -> None:
    """The lower index comes first; an expert of minus infinity has no part."""
    layer = Layer.of(replace(PLAIN, k=3))
    layer.tensors["logits"][:] = 0
    layer.tensors["logits"][:, 0] = -torch.inf
    check(layer)
    layer.tensors["logits"][:, 1:3] = -torch.inf
    check(layer)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_masked(weights: str) -> None:
    layer = Layer.of(replace(MASKED, weights=weights))
    check(layer)
    assert (layer.tensors["y"][~layer.tensors["mask"]] == 0).all()
    layer.tensors["mask"][:] = False
    check(layer)


def test_every_routing_has_its_tiles() -> None:
    """The worst one: a row too many for each expert but one."""
    problem = replace(PLAIN, tokens=100, k=1, experts=7)
    for rows in (1, 16, 64):
        worst = 0
        for busy in range(1, 8):
            for each in range(100 // busy + 1):
                counts = [each] * (busy - 1) + [100 - each * (busy - 1)]
                worst = max(worst, sum(-(-count // rows) for count in counts))
        assert worst <= problem.tiles(rows)


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_it_compiles_without_a_gpu(weights: str) -> None:
    problem = replace(PLAIN, tokens=64, hidden=128, inner=256, x="float16", weights=weights)
    (recipe,) = recipes(problem, Layer.of(problem).constants, 90, effort=0)
    for call in recipe.calls:
        assert compile_kernel(call, 90).cubin[:4] == b"\x7fELF"


def test_refusals() -> None:
    assert "5 of 4 experts" in why_not(replace(PLAIN, k=5), 90)
    assert "expected float16 or int8" in why_not(replace(PLAIN, x="float16"), 90)
    assert recipes(replace(PLAIN, k=5), {}, 90) == ()

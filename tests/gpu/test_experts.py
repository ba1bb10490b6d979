"""Routed experts on a GPU: right in all types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.launch import capability, launch
from tests.kernels.cuda.experts_cases import Layer
from twofour.kernels.cuda.experts import recipes
from twofour.kernels.cuda.experts_route import ExpertsProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
PLAIN = ExpertsProblem(150, 8, 2, 192, 320, "Gelu", "float16", "float16")
MASKED = replace(PLAIN, experts=1, k=1, routed=False)


def on_gpu(layer: Layer) -> Layer:
    tensors = {role: tensor.cuda() for role, tensor in layer.tensors.items()}
    return replace(layer, tensors=tensors)


@pytest.mark.parametrize(
    "problem",
    [
        PLAIN,
        replace(PLAIN, activation="SwiGlu"),
        replace(PLAIN, x="bfloat16", weights="bfloat16"),
        replace(PLAIN, x="float32", weights="float32", activation="SwiGlu"),
        replace(PLAIN, x="float32", weights="int8"),
        replace(PLAIN, weights="int8", activation="SwiGlu"),
        replace(PLAIN, tokens=1, normalize=False),
        MASKED,
        replace(MASKED, weights="int8"),
    ],
    ids=str,
)
def test_experts(problem: ExpertsProblem) -> None:
    layer = on_gpu(Layer.of(problem))
    (recipe,) = recipes(problem, layer.constants, capability(), effort=0)
    launch(recipe, layer.tensors, capability())
    assert layer.wrong() == "", recipe.config


def test_all_tokens_may_choose_one_expert() -> None:
    layer = on_gpu(Layer.of(replace(PLAIN, tokens=1000, k=1), only=5))
    (recipe,) = recipes(layer.problem, layer.constants, capability(), effort=0)
    launch(recipe, layer.tensors, capability())
    assert layer.wrong() == ""

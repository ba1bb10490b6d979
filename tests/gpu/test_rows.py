"""Norms and attention on a GPU: right in all types."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.compiler.cuda.test_plugins import experts, long_text, wanted_text
from tests.gpu.launch import capability, launch
from tests.kernels.cuda.attention_cases import Case, flat, padding
from tests.kernels.cuda.interpret import TORCH
from twofour.compiler.build import build
from twofour.core.norm import layer_norm
from twofour.core.sparse_attention import Pattern, additive
from twofour.kernels.cuda import attention, norm, sparse_attention
from twofour.kernels.cuda.problem import NormProblem
from twofour.kernels.cuda.sparse_attention import SparseAttentionProblem
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
EPS = 1e-5
TACTICS = ("sparse attention", "routed experts")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quantized", ["int8", "float8e4m3fn"])
@pytest.mark.parametrize("size", [(3, 768), (130, 40), (2, 8197)])
def test_norm(dtype: str, quantized: str, size: tuple[int, int]) -> None:
    rows, channels = size
    zero = 5 if quantized == "int8" else 0
    row = channels + 3
    problem = NormProblem(
        rows, channels, EPS, (dtype, row), (dtype, row), (quantized, row), 0.03, zero
    )
    random = np.random.default_rng(1)
    held = {name: random.normal(1, 0.3, channels).astype(np.float32) for name in ("gamma", "beta")}
    x, y, q = (torch.randn(rows, row, device="cuda") for _ in range(3))
    x, y, q = x.to(TORCH[dtype]), y.to(TORCH[dtype]), (q * 9).to(TORCH[quantized])
    (recipe,) = norm.recipes(problem, held, capability(), effort=0)
    launch(recipe, {"x": x, "y": y, "q": q}, capability())
    wanted = layer_norm(x[:, :channels].float().cpu().numpy(), *held.values(), EPS)
    off = np.abs(y[:, :channels].float().cpu().numpy() - wanted)
    eps = {"float32": 2.0**-18, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    assert (off <= eps * np.maximum(np.abs(wanted), 1)).all(), off.max()
    exact = wanted / np.float32(0.03) + zero
    exact = np.clip(exact, -128, 127) if quantized == "int8" else exact
    step = 0.501 if quantized == "int8" else np.maximum(np.abs(exact) / 15.9, 2.0**-9)
    off = np.abs(q[:, :channels].float().cpu().numpy() - exact)
    assert (off <= step).all(), off.max()


FORMS = [
    # queries and keys, heads, channels of a head
    ((128, 128), 2, (64, 64)),
    ((197, 197), 3, (80, 80)),
    ((1, 300), 2, (40, 40)),
    ((260, 100), 1, (128, 96)),
    ((33, 65), 1, (200, 200)),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "float8e4m3fn"])
@pytest.mark.parametrize("form", FORMS)
def test_attention(dtype: str, form: tuple[tuple[int, int], int, tuple[int, int]]) -> None:
    lengths, heads, dims = form
    causal, masked = lengths[0] == 197, lengths[0] in (128, 1)
    mask = padding(2, lengths[1], (lengths[1], 17)) if masked else None
    out = "int8" if dtype == "int8" and lengths[0] == 128 else ""
    case = Case.of(dtype, lengths, heads, dims, out=out, mask=mask, causal=causal, device="cuda")
    (recipe,) = attention.recipes(case.problem, {}, capability(), effort=0)
    launch(recipe, flat(case.tensors), capability())
    assert case.wrong() == "", recipe.config


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_recipes_of_attention_agree(dtype: str) -> None:
    """Those that fit the GPU; the first one has to."""
    case = Case.of(dtype, (197, 197), 12, (64, 64), device="cuda")
    wrong = {}
    for recipe in attention.recipes(case.problem, {}, capability(), effort=2):
        case.tensors["y"].zero_()
        launch(recipe, flat(case.tensors), capability())
        if text := case.wrong():
            wrong[recipe.config] = text
    assert not wrong


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_sparse_attention(dtype: str) -> None:
    table = np.array([[3, -1], [0, 5], [1, 2]], np.int32)
    pattern = Pattern(500, window=60, global_tokens=2, block=64, blocks=table)
    keep = torch.rand(2, 500, generator=torch.Generator().manual_seed(1)) < 0.8
    mask = torch.from_numpy(additive(pattern, keep.numpy())).contiguous()
    case = Case.of(dtype, (500, 500), 3, (64, 64), mask=mask, device="cuda")
    problem = SparseAttentionProblem(replace(case.problem, mask_strides=()), pattern, (500, 1))
    tensors = flat(case.tensors) | {"keep": keep.cuda()}
    for recipe in sparse_attention.recipes(problem, {}, capability(), effort=1):
        launch(recipe, tensors, capability())
        assert case.wrong() == "", recipe.config


@pytest.mark.parametrize("name", ["long text", "long text int8", "experts"])
def test_plugins_in_engines(name: str) -> None:
    """Built on the GPU, where kernels are compared with the meaning; and run."""
    if name == "experts":
        model, feeds, wanted = experts()
    else:
        model, feeds = long_text()
        wanted = wanted_text(model, feeds)
    source = quantize(model, [feeds]) if "int8" in name else model
    engine = build(source, target="cuda", fp16=True, tuning_effort=1)
    layers = [layer for layer in engine.plan.layers if layer.tactic in TACTICS]
    assert len(layers) == 1, [(layer.op, layer.tactic) for layer in engine.plan.layers]
    with Session(engine) as session:
        got = session.run(feeds)["y"]
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert error < (0.05 if "int8" in name else 0.01), layers[0]

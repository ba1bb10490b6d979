"""Norms and attention on a GPU: right in all types, and how long they take beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.gpu.launch import capability, launch, median_us, prepared
from tests.kernels.cuda.attention_cases import Case, flat, padding
from tests.kernels.cuda.interpret import TORCH
from twofour.core.norm import layer_norm
from twofour.core.sparse_attention import Pattern, additive
from twofour.kernels.cuda import attention, norm, sparse_attention
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import AttentionProblem, NormProblem, Rows
from twofour.kernels.cuda.sparse_attention import SparseAttentionProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
EPS = 1e-5


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


def best(recipes: tuple[Recipe, ...], tensors: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Microseconds of the fastest recipe, and which it is; one that cannot run says why."""
    times = []
    for recipe in recipes:
        try:
            times.append((median_us(prepared(recipe, tensors, capability())), recipe.config))
        except (RuntimeError, ValueError) as error:
            times.append((float("inf"), f"{recipe.config}: {error}"))
    return min(times)


def show(capsys: pytest.CaptureFixture[str], lines: list[str]) -> None:
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_times_of_norms(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["layer norm us: rows x channels, type, twofour, with int8 too, torch, configuration"]
    for rows, channels, dtype in [
        (128, 768, "float16"),
        (4096, 768, "float16"),
        (32768, 768, "float16"),
        (4096, 768, "float32"),
        (4096, 4096, "float16"),
    ]:
        x = torch.randn(rows, channels, device="cuda").to(TORCH[dtype])
        tensors = {"x": x, "y": torch.empty_like(x), "q": torch.empty_like(x, dtype=torch.int8)}
        held = {name: np.ones(channels, np.float32) for name in ("gamma", "beta")}
        given = {"x": (dtype, channels), "y": (dtype, channels)}
        plain = NormProblem(rows, channels, EPS, **given)
        both = NormProblem(rows, channels, EPS, **given, q=("int8", channels), scale=0.03)
        found = [
            best(norm.recipes(p, held, capability(), effort=1), tensors) for p in (plain, both)
        ]
        scale = torch.ones(channels, device="cuda", dtype=x.dtype)

        def theirs(x: torch.Tensor = x, scale: torch.Tensor = scale) -> torch.Tensor:
            return functional.layer_norm(x, scale.shape, scale, scale, EPS)

        lines.append(
            f"  {rows:6} x {channels:5} {dtype:9} {found[0][0]:8.1f} {found[1][0]:8.1f}"
            f" {median_us(theirs):8.1f}   {found[0][1]}"
        )
    show(capsys, lines)


def heads_apart(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, tokens, heads * d] to [batch, heads, tokens, d], a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def times_of(
    dtype: str, batch: int, tokens: int, heads: int, d: int, causal: bool
) -> tuple[float, str]:
    """Of q, k and v side by side in one tensor."""
    wide = 3 * heads * d
    x = torch.randn(batch, tokens, wide, device="cuda")
    x = (x * 40).to(torch.int8) if dtype == "int8" else x.to(TORCH[dtype])
    out = "float16" if dtype in ("int8", "float8e4m3fn") else dtype
    y = torch.empty(batch, tokens, heads * d, device="cuda", dtype=TORCH[out])
    rows = Rows(dtype, tokens * wide, wide)
    problem = AttentionProblem(
        batch, tokens, tokens, heads, d, d, rows, rows, rows,
        Rows(out, tokens * heads * d, heads * d), d**-0.5 / 1600, causal=causal, v_scale=0.025,
    )  # fmt: skip
    parts = {role: x[:, :, i * heads * d :] for i, role in enumerate("qkv")}
    tensors = {**flat(parts), "y": y}
    return best(attention.recipes(problem, {}, capability(), effort=2)[:5], tensors)


def theirs(batch: int, tokens: int, heads: int, d: int, causal: bool, dtype: str) -> float:
    """Microseconds of torch's attention on the same layout."""
    x = torch.randn(batch, tokens, 3 * heads * d, device="cuda", dtype=TORCH[dtype])
    q, k, v = (heads_apart(part, heads) for part in x.chunk(3, dim=2))
    run: Callable[[], torch.Tensor] = lambda: functional.scaled_dot_product_attention(  # noqa: E731
        q, k, v, is_causal=causal
    )
    return median_us(run)


SHAPES = [
    # batch, tokens, heads, channels of a head, causal, types
    (1, 128, 12, 64, False, ("float16", "int8")),
    (32, 128, 12, 64, False, ("float16", "int8", "float8e4m3fn", "float32")),
    (256, 128, 12, 64, False, ("float16", "int8")),
    (1, 4096, 12, 64, False, ("float16", "int8")),
    (1, 4096, 32, 128, True, ("float16",)),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_times_of_attention(
    shape: tuple[int, int, int, int, bool, tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    *sizes, dtypes = shape
    batch, tokens, heads, d, causal = sizes
    lines = [f"attention us: batch {batch}, {tokens} tokens, {heads} x {d}, causal {causal}"]
    for dtype in dtypes:
        us, config = times_of(dtype, *sizes)
        flops = 4 * batch * heads * tokens**2 * d / (2 if causal else 1)
        lines.append(f"  {dtype:13} {us:8.1f}  {flops / us / 1e6:6.0f} TFLOP/s   {config}")
    for dtype in ("float16", "float32")[: 1 + ("float32" in dtypes)]:
        lines.append(f"  torch {dtype:7} {theirs(*sizes, dtype):8.1f}")
    show(capsys, lines)


def sparse_problem(
    tokens: int, heads: int, d: int, pattern: Pattern, dtype: str
) -> tuple[SparseAttentionProblem, dict[str, torch.Tensor]]:
    """One sequence, q, k and v side by side, and its tensors."""
    wide = 3 * heads * d
    x = torch.randn(1, tokens, wide, device="cuda").to(TORCH[dtype])
    y = torch.empty(1, tokens, heads * d, device="cuda", dtype=x.dtype)
    rows = Rows(dtype, tokens * wide, wide)
    out = Rows(dtype, tokens * heads * d, heads * d)
    dense = AttentionProblem(
        1, tokens, tokens, heads, d, d, rows, rows, rows, out, score_scale=d**-0.5
    )
    parts = {role: x[:, :, i * heads * d :] for i, role in enumerate("qkv")}
    return SparseAttentionProblem(dense, pattern), {**flat(parts), "y": y}


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


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_times_of_sparse_attention(tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    heads, d, pattern = 12, 64, Pattern(tokens, window=256, global_tokens=1)
    problem, tensors = sparse_problem(tokens, heads, d, pattern, "float16")
    found = sparse_attention.recipes(problem, {}, capability(), effort=2)
    sparse, config = best(found, tensors)
    dense, dense_config = best(
        attention.recipes(problem.dense, {}, capability(), effort=1), tensors
    )
    torchs = theirs(1, tokens, heads, d, False, "float16")
    show(
        capsys,
        [
            f"sparse attention us, {tokens} tokens, window 256, 1 global, {heads} x {d}, float16",
            f"  sparse {sparse:8.1f}   {config}",
            f"  dense  {dense:8.1f}   {dense_config}",
            f"  torch's dense {torchs:8.1f}",
        ],
    )

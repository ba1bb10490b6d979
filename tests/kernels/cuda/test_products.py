"""Problems by libraries: each recipe computes what the problem says, where calls are modelled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.cuda.interpret import tensor_of, values_of
from tests.kernels.cuda.library_model import run
from twofour.core.cuda_products import CUBLASLT, CUSPARSELT, read_product
from twofour.core.functions import Activation
from twofour.core.masks import mask_of
from twofour.core.numerics import Window
from twofour.kernels.cuda import gemm_cublaslt, gemm_cusparselt
from twofour.kernels.cuda.kernel import LibraryKernel, Recipe
from twofour.kernels.cuda.problem import ConvProblem, Finish, View
from twofour.kernels.cuda.reference import conv_reference

INF = float("inf")
FP8 = "float8e4m3fn"
QUANTIZED = Finish(y_factor=10.0, y_zero=0, low=0.0)
PADDED = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1))


def problem_of(
    x: str,
    y: str,
    finish: Finish,
    *,
    rows: int = 16,
    channels: int = 64,
    r: str = "",
    gap: int = 0,
    pattern: str = "2:4",
) -> ConvProblem:
    """A product of 32 output channels."""
    residual = View.dense(r, 1, 1, 32) if r else None
    out = View(y, 32 + gap, 32 + gap, 32 + gap)
    return ConvProblem(
        rows,
        1,
        1,
        channels,
        32,
        View.dense(x, 1, 1, channels),
        out,
        r=residual,
        finish=finish,
        pattern=pattern,
    )


def arrays_of(problem: ConvProblem, seed: int = 1) -> dict[str, Any]:
    """Values of all operands, each one that its type holds; w is 2:4."""
    rng = np.random.default_rng(seed)
    shape = (problem.out_channels, problem.channels, *problem.window.kernel)
    whole = problem.x.dtype == "int8"
    w = rng.integers(-20, 21, shape) if whole else rng.standard_normal(shape) / 4
    w = (w * mask_of(np.abs(w) + 0.1, "2:4")).astype(np.int8 if whole else np.float32)
    size = (problem.batch, problem.height, problem.width, problem.channels)
    x = rng.integers(-30, 31, size) if whole else rng.standard_normal(size)
    found = {"x": x, "w": w, "bias": rng.standard_normal(problem.out_channels).astype(np.float32)}
    if problem.finish.scaled:
        scale = rng.uniform(0.5, 1, problem.out_channels) / (300 if whole else 1)
        found["scale"] = scale.astype(np.float32)
    if problem.finish.by_rows:
        found["row_scale"] = rng.uniform(0.5, 1, problem.rows).astype(np.float32)
    found["x"] = values_of(tensor_of(x.astype(np.int8 if whole else np.float32), problem.x.dtype))
    found["w"] = w if whole else values_of(tensor_of(w, problem.x.dtype))
    if problem.r is not None:
        out = (problem.batch, *problem.out_size, problem.out_channels)
        values = rng.integers(-9, 10, out).astype(np.int8 if problem.r.dtype == "int8" else "f4")
        found["r"] = values_of(tensor_of(values, problem.r.dtype))
    return found


def check(problem: ConvProblem, recipe: Recipe, arrays: dict[str, Any]) -> None:
    """A recipe against the definition."""
    tensors = {
        role: tensor_of(arrays[role], dtype)
        for role, dtype in (("x", problem.x.dtype), ("row_scale", "float32"))
        if role in arrays
    }
    if problem.r is not None:
        tensors["r"] = tensor_of(arrays["r"], problem.r.dtype)
    out_h, out_w = problem.out_size
    y = tensor_of(np.full(problem.batch * problem.y.image, 7, np.float32), problem.y.dtype)
    tensors["y"] = y
    flat = {role: tensor.reshape(-1).view(torch.uint8) for role, tensor in tensors.items()}
    run(recipe, flat)
    expected = conv_reference(problem, arrays)
    whole = values_of(y).reshape(problem.batch, out_h, out_w, problem.y.pixel)
    found = whole[..., : problem.out_channels]
    assert (whole[..., problem.out_channels :] == 7).all(), "wrote between the rows"
    if problem.y.dtype == "int8":
        away = np.abs(found.astype(int) - expected)
        assert away.max() <= 1, recipe.config
        assert (away > 0).mean() < (0.05 if "float16 sums" in recipe.config else 0.02)
        return
    last = {"float32": 1e-5, "float16": 2.0**-9, "bfloat16": 2.0**-6, FP8: 2.0**-3}
    bound = last[problem.y.dtype] * (np.abs(expected) + 1)
    assert (np.abs(found - expected) <= bound).all(), np.abs(found - expected).max()


def configs(recipes: tuple[Recipe, ...]) -> list[str]:
    return [recipe.config for recipe in recipes]


def called(recipe: Recipe) -> LibraryKernel:
    (found,) = (call for call in recipe.calls if isinstance(call, LibraryKernel))
    return found


REAL = Finish(scaled=False)
CASES = {
    "real": (REAL, "", ["float16 by the library", "float16 sums, finished by a kernel"]),
    "relu": (replace(REAL, low=0.0), "", ["float16 by the library, Relu"]),
    "relu by name": (replace(REAL, activation=Activation("Relu")), "", ["float16 by the library"]),
    "residual": (replace(REAL, residual_scale=1.0), "float16", ["float16 by the library"]),
    "gelu": (replace(REAL, activation=Activation("Gelu")), "", ["float16 sums"]),
    "silu": (replace(REAL, activation=Activation("Silu")), "", ["float16 sums"]),
    "scaled": (Finish(), "", ["float16 sums"]),
    "other residual": (REAL, "float32", ["float16 sums"]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tactic", [gemm_cublaslt, gemm_cusparselt])
def test_float16(name: str, tactic: Any) -> None:
    finish, r, expected = CASES[name]
    problem = problem_of("float16", "float16", finish, r=r, gap=8 if not r else 0)
    arrays = arrays_of(problem)
    recipes = tactic.recipes(problem, arrays, 90)
    assert recipes
    for found, start in zip(configs(recipes), expected, strict=False):
        assert found.startswith(start)
    for recipe in recipes:
        check(problem, recipe, arrays)


def test_gelu_by_tanh_is_cublaslts_alone() -> None:
    problem = problem_of("float16", "float16", replace(REAL, activation=Activation("GeluTanh")))
    arrays = arrays_of(problem)
    dense = gemm_cublaslt.recipes(problem, arrays, 90)
    assert configs(dense)[0] == "float16 by the library, GeluTanh"
    check(problem, dense[0], arrays)
    assert configs(gemm_cusparselt.recipes(problem, arrays, 90)) == [
        "float16 sums, finished by a kernel"
    ]


INT8 = {
    "relu": (QUANTIZED, "", True),
    "zero point": (Finish(y_factor=9.0, y_zero=5), "", True),
    "relu and zero point": (Finish(y_factor=9.0, y_zero=5, low=5.0), "", False),
    "lowest zero point": (Finish(y_factor=9.0, y_zero=-128, low=-128.0), "", True),
    "relu6": (Finish(y_factor=10.0, low=0.0, high=60.0), "", False),
    "residual": (Finish(residual_scale=0.3, y_factor=5.0, low=0.0), "int8", True),
    "residual last": (Finish(residual_scale=0.3, add_last=True), "int8", False),
    "rows": (replace(QUANTIZED, by_rows=True), "", False),
}


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("tactic", [gemm_cublaslt, gemm_cusparselt])
def test_int8(name: str, tactic: Any) -> None:
    finish, r, by_library = INT8[name]
    problem = problem_of("int8", "int8", finish, r=r)
    arrays = arrays_of(problem)
    recipes = tactic.recipes(problem, arrays, 90)
    sparse = tactic is gemm_cusparselt
    whole = by_library or (name == "relu6" and sparse)
    kinds = ["int8 by"] if whole else ["float16 sums and bias"] if sparse and name != "rows" else []
    assert len(recipes) == len(kinds) + 1
    assert all(map(str.startswith, configs(recipes), [*kinds, "int32 sums"]))
    for recipe in recipes:
        if name != "residual last":
            check(problem, recipe, arrays)


@pytest.mark.parametrize("y", ["float32", "float16"])
def test_int8_to_real_numbers(y: str) -> None:
    problem = problem_of("int8", y, Finish())
    arrays = arrays_of(problem)
    for tactic in (gemm_cublaslt, gemm_cusparselt):
        recipes = tactic.recipes(problem, arrays, 90)
        assert ("int32 sums, finished by a kernel") in configs(recipes)
        for recipe in recipes:
            check(problem, recipe, arrays)


@pytest.mark.parametrize("even", [False, True])
def test_fp8(even: bool) -> None:
    problem = problem_of(FP8, FP8, replace(QUANTIZED, y_factor=1.0))
    arrays = arrays_of(problem)
    if even:
        arrays["scale"][:] = 0.5
    dense = gemm_cublaslt.recipes(problem, arrays, 90)
    kinds = ["float8e4m3fn by", "float32 sums", "bfloat16 sums"]
    pairs = zip(configs(dense), kinds * 2, strict=True)
    assert all(config.startswith(kind) for config, kind in pairs)
    assert [config.endswith(", fast sums") for config in configs(dense)] == [False] * 3 + [True] * 3
    product = read_product(called(dense[0]).settings, CUBLASLT)
    assert (product.alpha, product.by_row) == ((0.5, False) if even else (1.0, True))
    sparse = gemm_cusparselt.recipes(problem, arrays, 90)
    assert configs(sparse) == (["float8e4m3fn by the library, Relu"] if even else []) + [
        "float32 sums, finished by a kernel",
        "bfloat16 sums, finished by a kernel",
    ]
    for recipe in (*dense, *sparse):
        check(problem, recipe, arrays)
    assert gemm_cublaslt.recipes(problem, arrays, 80) == ()
    assert gemm_cusparselt.recipes(problem, arrays, 80) == ()


def test_fp8_rows_have_scales() -> None:
    problem = problem_of(FP8, "bfloat16", Finish(by_rows=True))
    arrays = arrays_of(problem)
    for tactic in (gemm_cublaslt, gemm_cusparselt):
        for recipe in tactic.recipes(problem, arrays, 90):
            check(problem, recipe, arrays)


@pytest.mark.parametrize(
    ("dtype", "rows", "channels"),
    [("int8", 7, 64), ("float16", 3, 64), ("int8", 16, 76), ("float16", 1, 68), (FP8, 5, 96)],
)
def test_what_is_no_multiple_goes_by_im2col(dtype: str, rows: int, channels: int) -> None:
    finish = replace(QUANTIZED, y_factor=1.0) if dtype != "float16" else REAL
    problem = problem_of(dtype, dtype, finish, rows=rows, channels=channels)
    arrays = arrays_of(problem)
    recipes = gemm_cusparselt.recipes(problem, arrays, 90)
    assert recipes
    assert all(config.startswith("im2col, ") for config in configs(recipes))
    for recipe in recipes:
        check(problem, recipe, arrays)
        product = read_product(called(recipe).settings, CUSPARSELT)
        assert recipe.constants["w"].shape == (product.n, product.k)
        assert recipe.scratch["cols"] == product.m * product.k * (2 if dtype == "float16" else 1)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("size", [5, 7])
def test_windows_go_by_im2col(dtype: str, size: int) -> None:
    finish = replace(QUANTIZED, y_factor=3.0) if dtype == "int8" else replace(REAL, low=0.0)
    x, y = View.dense(dtype, size, size, 16), View.dense(dtype, *[(size + 1) // 2] * 2, 32)
    problem = ConvProblem(
        2, size, size, 16, 32, x, y, PADDED, finish=finish, pattern="2:4", x_zero=0
    )
    if dtype == "int8":
        problem = replace(problem, x_zero=-3)
    arrays = arrays_of(problem)
    recipes = gemm_cusparselt.recipes(problem, arrays, 90)
    whole = not problem.rows % (16 if dtype == "int8" else 8)
    assert len(recipes) == 1 + (whole or dtype == "int8")
    for recipe in recipes:
        check(problem, recipe, arrays)
    assert gemm_cublaslt.recipes(problem, arrays, 90) == ()


def test_what_sparse_tensor_cores_cannot_take_is_refused() -> None:
    good = problem_of("int8", "int8", QUANTIZED)
    arrays = arrays_of(good)
    assert gemm_cusparselt.takes(good, 80)
    for bad in (
        replace(good, pattern=""),
        replace(good, out_channels=48),
        replace(good, channels=66),
        replace(good, channels=32),
        replace(good, groups=2),
        replace(good, x=replace(good.x, dtype="float32")),
    ):
        assert not gemm_cusparselt.takes(bad, 90)
        assert gemm_cusparselt.recipes(bad, arrays, 90) == ()
    assert not gemm_cusparselt.takes(good, 75)
    assert gemm_cusparselt.recipes(good, {}, 90) == ()
    assert gemm_cublaslt.recipes(good, {}, 90) == ()


def test_float32_is_not_rounded_to_fewer_bits() -> None:
    problem = problem_of("float32", "float32", REAL)
    arrays = arrays_of(problem)
    recipes = gemm_cublaslt.recipes(problem, arrays, 90)
    assert not any(read_product(called(each).settings, CUBLASLT).fast for each in recipes)
    for recipe in recipes:
        check(problem, recipe, arrays)


def test_a_bias_has_room_for_whole_floats() -> None:
    problem = problem_of("bfloat16", "bfloat16", REAL)
    recipe = gemm_cublaslt.recipes(problem, arrays_of(problem), 90)[0]
    assert recipe.constants["bias"].nbytes == 4 * 32
    assert recipe.constants["w"].dtype == np.uint16

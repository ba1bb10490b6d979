"""The end of every product: scale, bias, residual, activation, bounds, rounding."""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.cuda.interpret import TORCH, interpret, tensor_of, values_of
from twofour.core.float8 import ROUNDING as FP8
from twofour.core.functions import PLAIN, Activation
from twofour.core.numerics import Window
from twofour.kernels.cuda.finish import coarse_gelu, finish_call, finish_constants
from twofour.kernels.cuda.kernel import Kernel, Recipe
from twofour.kernels.cuda.problem import ConvProblem, Finish, View
from twofour.kernels.cuda.reference import conv_reference

LAST_PLACE = {"float32": 2e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float8e4m3fn": 2 * FP8}


def problem_of(finish: Finish, y: str, *, r: str | None = None, gap: int = 0) -> ConvProblem:
    """Rows of 5 channels, 2 images of 3 x 3 pixels; x is what the sums are made of."""
    x = View.dense("float32", 3, 3, 5)
    out = View(y, 9 * (5 + gap) + gap, 3 * (5 + gap), 5 + gap)
    residual = None if r is None else View.dense(r, 3, 3, 5)
    return ConvProblem(2, 3, 3, 5, 5, x, out, Window((1, 1)), 1, residual, finish)


def check(problem: ConvProblem, parts: int = 1, spread: float = 30.0) -> None:
    """The kernel on its own sums against the definition, where the weight is the identity."""
    rng = np.random.default_rng(problem.rows)
    sums = (rng.standard_normal((parts, 2, 3, 3, 5)) * spread).astype(np.float32)
    arrays = {
        "scale": rng.uniform(0.05, 0.1, 5).astype(np.float32),
        "bias": rng.standard_normal(5).astype(np.float32),
        "row_scale": rng.uniform(0.5, 2, problem.rows).astype(np.float32),
    }
    tensors = {"sums": torch.from_numpy(sums)}
    if problem.r is not None:
        r = rng.integers(-128, 128, (2, 3, 3, 5)).astype(np.float32)
        tensors["r"] = tensor_of(r, problem.r.dtype)
        arrays["r"] = values_of(tensors["r"])
    tensors["row_scale"] = torch.from_numpy(arrays["row_scale"])
    size = 2 * problem.y.image
    tensors["y"] = tensor_of(np.full(size, 7.0, np.float32), problem.y.dtype)
    call = finish_call(problem, "float32", parts=parts)
    interpret(Recipe("test", "", (call,), finish_constants(problem, arrays)), tensors)

    arrays |= {"x": sums.sum(axis=0), "w": np.eye(5, dtype=np.float32).reshape(5, 5, 1, 1)}
    expected = conv_reference(problem, arrays)
    stored = values_of(tensors["y"])
    places = np.ravel(
        np.arange(2)[:, None, None, None] * problem.y.image
        + np.arange(3)[:, None, None] * problem.y.row
        + np.arange(3)[:, None] * problem.y.pixel
        + np.arange(5)
    )
    found = stored[places].reshape(expected.shape)
    assert (np.delete(stored, places) == 7).all(), "wrote between the pixels"
    if problem.y.dtype == "int8":
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found != expected).mean() < 0.05
    else:
        bound = LAST_PLACE[problem.y.dtype] * (np.abs(expected) + 1)
        assert (np.abs(found - expected) <= bound).all(), np.abs(found - expected).max()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8e4m3fn", "int8"])
@pytest.mark.parametrize("r", [None, "float32", "int8", "float8e4m3fn"])
def test_types(dtype: str, r: str | None) -> None:
    quantized = dtype in ("int8", "float8e4m3fn")
    zero = 3 if dtype == "int8" else 0
    finish = Finish(0.03, y_factor=20.0 if quantized else 1.0, y_zero=zero)
    check(problem_of(finish, dtype, r=r, gap=3))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_activations(name: str, dtype: str) -> None:
    finish = Finish(activation=Activation(name), y_factor=30.0 if dtype == "int8" else 1.0)
    check(problem_of(finish, dtype))


@pytest.mark.parametrize(("dtype", "r", "zero"), [("float32", "float32", 0), ("int8", "int8", 5)])
def test_a_residual_behind_the_activation(dtype: str, r: str, zero: int) -> None:
    factor, silu = 1.0 if dtype == "float32" else 9.0, Activation("Silu")
    finish = Finish(0.02, silu, y_factor=factor, y_zero=zero, add_last=True, residual_zero=-zero)
    check(problem_of(finish, dtype, r=r, gap=3))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_bounds(dtype: str) -> None:
    zero = -20 if dtype == "int8" else 0
    check(problem_of(Finish(low=-19.0, high=20.0, y_zero=zero, y_factor=8.0), dtype))
    check(problem_of(Finish(activation=Activation("Clip", -0.5, 1.5), y_zero=zero), dtype))


def test_rows_have_scales_of_their_own_and_parts_are_added() -> None:
    check(problem_of(Finish(by_rows=True), "float32"), parts=3)
    check(problem_of(Finish(scaled=False, by_rows=True), "float16"), spread=2.0)
    check(problem_of(Finish(scaled=False), "bfloat16"), spread=2.0)


def test_activations_are_right_far_from_zero() -> None:
    far = np.array([-np.inf, -1e30, -200, -30, 30, 200, 1e30, np.inf, np.nan], np.float32)
    view = View.dense("float32", 1, 1, 9)
    for name in PLAIN:
        finish = Finish(scaled=False, activation=Activation(name))
        problem = ConvProblem(1, 1, 1, 9, 9, view, view, finish=finish)
        call = finish_call(problem, "float32", biased=False)
        y = torch.zeros(9, dtype=TORCH["float32"])
        recipe = Recipe("test", "", (call,), finish_constants(problem, {}))
        with np.errstate(all="ignore"):
            interpret(recipe, {"sums": torch.from_numpy(far), "y": y})
            expected = Activation(name).apply(far)
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5, err_msg=name)


@triton.jit
def _coarse_gelu(x, y, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(y + places, coarse_gelu(tl.load(x + places)))


def test_gelu_of_a_quantized_result_is_nearer_than_any_step() -> None:
    v = torch.linspace(-12, 12, 1 << 14)
    found = torch.zeros_like(v)
    operands = (("x", "float32"), ("y", "float32"))
    interpret(Kernel(_coarse_gelu, operands, {"COUNT": 1 << 14}, (1, 1, 1)), {"x": v, "y": found})
    away = (found - torch.nn.functional.gelu(v.double())).abs()
    assert away[v.abs() <= 4].max() <= 5e-5
    assert (away <= 5e-5 * v.abs().clamp(min=4)).all()

"""Windows side by side: equal to core's patches, with what a library wants around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.cuda.interpret import interpret, tensor_of
from twofour.core.numerics import Window, patches
from twofour.kernels.cuda.im2col import flat_weight, im2col_bytes, im2col_call, rounded_up
from twofour.kernels.cuda.kernel import compile_kernel
from twofour.kernels.cuda.problem import ConvProblem, View

WINDOWS = {
    "1x1": Window((1, 1)),
    "3x3": Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    "stride": Window((3, 2), (2, 2), (1, 1), (0, 1, 1, 0)),
    "dilation": Window((3, 3), (1, 2), (2, 1), (2, 0, 2, 1)),
}


def problem_of(window: Window, dtype: str, gap: int = 0, channels: int = 12) -> ConvProblem:
    """Two images of 5 x 6 pixels."""
    pixel = channels + gap
    x = View(dtype, 5 * (6 * pixel + gap), 6 * pixel + gap, pixel)
    height, width = window.output_size(5, 6)
    y = View.dense("float32", height, width, 32)
    zero = -7 if dtype == "int8" else 0
    return ConvProblem(2, 5, 6, channels, 32, x, y, window, x_zero=zero, pattern="2:4")


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float8e4m3fn", "float32"])
@pytest.mark.parametrize("name", WINDOWS)
def test_rows_are_the_patches(name: str, dtype: str) -> None:
    problem = problem_of(WINDOWS[name], dtype, gap=3 if name == "stride" else 0)
    rng = np.random.default_rng(5)
    held = rng.integers(-100, 100, 2 * problem.x.image).astype(np.int8 if dtype == "int8" else "f4")
    x = tensor_of(held, dtype)
    rows, columns = rounded_up(problem.rows, 16), rounded_up(problem.k, 32)
    size = x.element_size()
    assert im2col_bytes(problem, rows, columns) == rows * columns * size
    cols = torch.full((rows * columns * size,), 85, dtype=torch.uint8)
    interpret(im2col_call(problem, rows, columns), {"x": x, "cols": cols})
    bits = x.view(torch.uint8).numpy().view(f"u{size}")
    strides = [size * step for step in (problem.x.image, problem.x.row, problem.x.pixel, 1)]
    image = np.lib.stride_tricks.as_strided(bits, (2, 5, 6, problem.channels), strides)
    zero = np.array(problem.x_zero).astype(np.int8).view(np.uint8) if dtype == "int8" else 0
    inside = patches(image, problem.window, zero).reshape(problem.rows, problem.k)
    expected = np.full((rows, columns), zero, inside.dtype)
    expected[: problem.rows, : problem.k] = inside
    np.testing.assert_array_equal(cols.numpy().view(f"u{size}").reshape(rows, columns), expected)


def test_the_weight_goes_with_the_rows() -> None:
    problem = problem_of(WINDOWS["3x3"], "float32")
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 5, 6, 12)).astype(np.float32)
    w = rng.standard_normal((32, 12, 3, 3)).astype(np.float32)
    flat = flat_weight(w, 128)
    rows = patches(x, problem.window, 0.0).reshape(problem.rows, problem.k)
    wide = np.pad(rows, ((0, 0), (0, 128 - problem.k)))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(w), padding=1
    )
    found = (wide @ flat.T).reshape(2, 5, 6, 32).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_it_becomes_machine_code() -> None:
    problem = problem_of(WINDOWS["3x3"], "int8", channels=64)
    made = compile_kernel(im2col_call(problem, 64, 576), 90)
    assert made.cubin.startswith(b"\x7fELF")

"""Times of the 2:4 convolution beside torch's dense kernels: prints, asserts no speed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.launch import capability, compile_all, median_us, prepared, require_alone
from tests.gpu.test_conv_sparse import NETWORK_TYPES, problem_of
from tests.kernels.cuda.interpret import tensor_of
from twofour.kernels.cuda.conv_sparse import MMA, WGMMA, recipes
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import ConvProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SPEED = [  # batch, channels, out channels, kernel, size
    (32, 64, 64, 3, 56),
    (32, 256, 64, 1, 56),
    (32, 128, 128, 3, 28),
    (32, 512, 128, 1, 28),
    (32, 256, 256, 3, 14),
    (32, 1024, 256, 1, 14),
    (32, 512, 512, 3, 7),
    (256, 256, 256, 3, 14),
    (1, 256, 256, 3, 14),
    (1, 512, 512, 3, 7),
    (4096, 4096, 4096, 1, 1),
]


def speed_recipes(problem: ConvProblem) -> tuple[Recipe, ...]:
    """Candidates for a weight that keeps the first and third of each four."""
    n, c, kernel = problem.out_channels, problem.channels, problem.window.kernel[0]
    fours = np.tile(np.array([1, 0, 1, 0], np.int8), c // 4)[:, None, None]
    first = np.random.default_rng(0).integers(1, 9, (n, 1, 1, 1))
    w = np.broadcast_to(fours * first, (n, c, kernel, kernel))
    constants = {"w": w.astype(np.int8 if problem.x.dtype == "int8" else np.float32)}
    constants |= {role: np.ones(n, np.float32) for role in ("scale", "bias")}
    found = recipes(problem, constants, capability())
    wanted = {MMA: 2, WGMMA: 5}
    return tuple(
        made
        for tactic, count in wanted.items()
        for made in [made for made in found if made.tactic == tactic][:count]
    )


def speed_problems(dtype: str) -> list[ConvProblem]:
    """Those of SPEED, every other one but for int8."""
    shapes = SPEED if dtype == "int8" else SPEED[::2]
    return [problem_of(dtype, c, n, k, size=size, batch=b) for b, c, n, k, size in shapes]


@pytest.mark.parametrize("dtype", NETWORK_TYPES)
def test_speed(dtype: str) -> None:
    """Prints microseconds of each candidate beside torch's dense convolution and product."""
    require_alone()
    found = [(problem, speed_recipes(problem)) for problem in speed_problems(dtype)]
    compile_all([made for _, some in found for made in some], capability())
    for problem, some in found:
        x = torch.randint(-9, 9, (problem.batch * problem.x.image,), device="cuda")
        kind = tensor_of(np.zeros(1, np.float32), dtype).dtype
        y = torch.zeros(problem.batch * problem.y.image, dtype=kind, device="cuda")
        tensors = {"x": x.to(kind), "y": y}
        times = []
        for made in some:
            run = prepared(made, tensors, capability())
            times.append((median_us(run, repeats=10, rounds=3), f"{made.tactic} {made.config}"))
        assert times, f"no kernel takes {problem}"
        best = min(times)
        rate = 2 * problem.rows * problem.out_channels * problem.k / best[0] / 1e6
        kernel = problem.window.kernel[0]
        print(f"\n{dtype} {problem.batch}x{problem.height}x{problem.width}x{problem.channels} ->")
        print(f"  {problem.out_channels}, {kernel}x{kernel}: {best[0]:.1f} us, {best[1]},")
        print(f"  {rate:.0f} T/s as if dense; {dense_times(problem)}")
        for us, name in times:
            print(f"    {us:8.1f} us  {name}")


def dense_times(problem: ConvProblem) -> str:
    """Torch's dense fp16 convolution and, for products, its int8 product, without any ending."""
    n, c, kernel = problem.out_channels, problem.channels, problem.window.kernel[0]
    x = torch.randn(problem.batch, c, problem.height, problem.width, device="cuda").half()
    w = torch.randn(n, c, kernel, kernel, device="cuda").half()
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    texts = []
    if kernel == 1:
        rows = x.permute(0, 2, 3, 1).reshape(-1, c)
        flat = w.reshape(n, c).t()
        texts.append(f"fp16 product {median_us(lambda: rows @ flat, 10, 3):.1f} us")
        if problem.rows > 16:
            a, b = rows.to(torch.int8), w.reshape(n, c).to(torch.int8).t()
            texts.append(f"int8 product {median_us(lambda: torch._int_mm(a, b), 10, 3):.1f} us")
    if problem.height > 1:
        conv = torch.nn.functional.conv2d
        us = median_us(lambda: conv(x, w, padding=kernel // 2), 10, 3)
        texts.append(f"fp16 convolution {us:.1f} us")
    return "torch: " + ", ".join(texts)

"""Pooling kernels against plain numpy: windows clipped at borders, channels around the lanes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.harness import targets
from tests.kernels.strided import Strided, compiled, in_parts
from twofour.core.numerics import Window, patches
from twofour.core.pooling import average_pool, tap_factors
from twofour.kernels.cpu.pool import PoolProblem, emit_pool, pack_average, pack_mean
from twofour.kernels.cpu.pool_chain import can_chain, emit_pool_chain
from twofour.kernels.cpu.problem import Strides
from twofour.runtime.cpu import address

TARGETS = targets()
HALO = (1, 2, 2, 1)
DTYPES = {"u8": np.uint8, "float32": np.float32}
WINDOWS = [
    Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1)),
    Window((2, 2), (2, 2)),
    Window((3, 2), (1, 2), (1, 1), (2, 0, 1, 1)),
    Window((2, 3), (2, 1), (2, 2), (1, 2, 1, 2)),
    Window((6, 7)),
]
CHANNELS = (1, 15, 16, 17, 48)


def strides(one: Strided) -> Strides:
    return Strides(*one.values.strides[:3])


def naive_max(x: np.ndarray, window: Window) -> np.ndarray:
    """Padding never wins."""
    out_h, out_w = window.output_size(x.shape[1], x.shape[2])
    y = np.empty((x.shape[0], out_h, out_w, x.shape[3]), x.dtype)
    for i, j in np.ndindex(out_h, out_w):
        rows = (
            i * window.stride[0] - window.pads[0] + window.dilation[0] * np.arange(window.kernel[0])
        )
        columns = (
            j * window.stride[1] - window.pads[1] + window.dilation[1] * np.arange(window.kernel[1])
        )
        rows = rows[(rows >= 0) & (rows < x.shape[1])]
        columns = columns[(columns >= 0) & (columns < x.shape[2])]
        y[:, i, j] = x[:, rows][:, :, columns].max((1, 2))
    return y


def problem_of(op: str, x: Strided, y: Strided, kind: str, out: str, window: Window) -> PoolProblem:
    return PoolProblem(op, *x.values.shape, kind, strides(x), strides(y), window, out)


def run(kernel, problem: PoolProblem, x: Strided, y: Strided, header, parts: int) -> np.ndarray:
    pointers = (x.address, address(header), y.address, 0)
    in_parts(kernel, pointers, problem.pieces, problem.blocks, parts)
    return y.take()


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_maximum(target, kind) -> None:
    random = np.random.default_rng(0)
    made = []
    for index, window in enumerate(WINDOWS):
        for channels in (CHANNELS[index], 16):
            x = Strided((2, 6, 7, channels), DTYPES[kind], halo=HALO)
            shape = (2, *window.output_size(6, 7), channels)
            made.append((window, x, Strided(shape, DTYPES[kind], halo=HALO)))
    problems = [problem_of("max", x, y, kind, kind, window) for window, x, y in made]
    texts = {f"max{i}_": emit_pool(f"max{i}_", p) for i, p in enumerate(problems)}
    kernels = compiled(texts, target, vectorize=False)
    header = np.zeros(64, np.uint8)
    for kernel, problem, (window, x, y) in zip(kernels, problems, made, strict=True):
        if kind == "u8":
            # Small values: a padding of 0 or of the halo's guard bytes would show.
            data = random.integers(0, 20, x.values.shape)
        else:
            data = random.normal(-5, 1, x.values.shape)
        x.values[...] = data
        for parts in (1, 3):
            got = run(kernel, problem, x, y, header, parts)
            assert (got == naive_max(x.values, window)).all(), problem


def test_maximum_of_extremes() -> None:
    for kind, values in (("u8", (0, 255)), ("float32", (-np.inf, np.finfo(np.float32).min))):
        x, y = (Strided((1, s, s, 16), DTYPES[kind]) for s in (4, 2))
        problem = problem_of("max", x, y, kind, kind, Window((2, 2), (2, 2)))
        (kernel,) = compiled({"m_": emit_pool("m_", problem)}, TARGETS[0], vectorize=False)
        for value in values:
            x.values[...] = value
            assert (run(kernel, problem, x, y, np.zeros(64, np.uint8), 1) == value).all()


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("include_pad", [False, True])
def test_average_of_bytes(target, include_pad) -> None:
    """Bit for bit core.pooling, also where a window hangs over several borders."""
    random = np.random.default_rng(0)
    made = []
    for index, window in enumerate(WINDOWS):
        for channels in (CHANNELS[index], 64):
            x = Strided((2, 6, 7, channels), np.uint8, halo=HALO)
            y = Strided((2, *window.output_size(6, 7), channels), np.uint8, halo=HALO)
            problem = problem_of("average", x, y, "u8", "u8", window)
            made.append((replace(problem, include_pad=include_pad), x, y))
    texts = {f"average{i}_": emit_pool(f"average{i}_", p) for i, (p, *_) in enumerate(made)}
    kernels = compiled(texts, target, vectorize=False)
    for kernel, (problem, x, y) in zip(kernels, made, strict=True):
        x.values[...] = random.integers(0, 256, x.values.shape)
        for zero_points, scale in (((128, 128), 0.9), ((0, 255), 30.0), ((255, 0), 1.0)):
            header = pack_average(scale, *zero_points, problem.window)
            want = average_pool(
                x.values, problem.window, scale, zero_points, include_pad=include_pad
            )
            for parts in (1, 3):
                assert (run(kernel, problem, x, y, header, parts) == want).all(), problem


@pytest.mark.parametrize(("kind", "out"), [("float32", "float32"), ("u8", "float32")])
@pytest.mark.parametrize("include_pad", [False, True])
def test_average_as_floats(kind, out, include_pad) -> None:
    random = np.random.default_rng(1)
    for window in WINDOWS:
        x = Strided((2, 6, 7, 17), DTYPES[kind], halo=HALO)
        y = Strided((2, *window.output_size(6, 7), 17), np.float32, halo=HALO)
        problem = replace(problem_of("average", x, y, kind, out, window), include_pad=include_pad)
        (kernel,) = compiled({"a_": emit_pool("a_", problem)}, TARGETS[0], vectorize=False)
        x.values[...] = random.integers(0, 256, x.values.shape)
        got = run(kernel, problem, x, y, pack_average(0.5, 3, 0, window), 2)
        values = 0.5 * (x.values.astype(np.float64) - (3 if kind == "u8" else 0))
        taps = window.kernel[0] * window.kernel[1]
        sums = patches(values, window, 0).sum((3, 4))
        inside = patches(np.ones(x.values.shape), window, 0).sum((3, 4))
        want = sums / (taps if include_pad else inside)
        # Sums of bytes are exact: the factor and the product are rounded.
        assert (np.abs(got - want) <= 2.0**-22 * np.abs(want)).all(), problem


def test_tap_factors_are_rounded_once() -> None:
    want = [0, 0.3, 0.3 / 2, 0.3 / 3]
    assert tap_factors(0.3, 3).tolist() == [float(np.float32(v)) for v in want]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("kind", "out"), [("u8", "u8"), ("u8", "float32"), ("float32", "float32")])
def test_mean(target, kind, out) -> None:
    random = np.random.default_rng(1)
    made = []
    for channels in CHANNELS if target == TARGETS[0] else CHANNELS[3:]:
        x = Strided((2, 5, 7, channels), DTYPES[kind], halo=HALO)
        y = Strided((2, 1, 1, channels), DTYPES[out], halo=HALO)
        made.append((problem_of("mean", x, y, kind, out, Window((1, 1))), x, y))
    texts = {f"mean{i}_": emit_pool(f"mean{i}_", p) for i, (p, *_) in enumerate(made)}
    kernels = compiled(texts, target, vectorize=False)
    for kernel, (problem, x, y) in zip(kernels, made, strict=True):
        if kind == "u8":
            x.values[...] = random.integers(0, 256, x.values.shape)
            _check_integer_mean(kernel, problem, x, y)
        else:
            x.values[...] = random.normal(size=x.values.shape)
            got = run(kernel, problem, x, y, pack_mean(1 / 35, 0, 0), 2)
            want = x.values.astype(np.float64).mean((1, 2), keepdims=True)
            # 34 additions and one product, each rounded.
            bound = 36 * np.finfo(np.float32).eps * np.abs(x.values).mean((1, 2), keepdims=True)
            assert (np.abs(got - want) <= bound).all()


def _check_integer_mean(kernel, problem: PoolProblem, x: Strided, y: Strided) -> None:
    """y = round((sum - 35 x_zero) * scale) + y_zero with one float32 product."""
    for x_zero, y_zero, scale in ((128, 128, 0.9 / 35), (0, 255, 7.0), (255, 0, 1 / 35)):
        header = pack_mean(scale, 35 * x_zero, y_zero)
        centred = x.values.astype(np.int32).sum((1, 2), keepdims=True) - 35 * x_zero
        real = centred.astype(np.float32) * np.float32(scale)
        want = real
        if problem.out == "u8":
            want = np.clip(np.rint(np.clip(real, -300, 300)) + y_zero, 0, 255).astype(np.uint8)
        assert (run(kernel, problem, x, y, header, 2) == want).all(), problem


def test_mean_rounds_ties_to_even() -> None:
    x, y = Strided((1, 1, 2, 16), np.uint8), Strided((1, 1, 1, 16), np.uint8)
    problem = problem_of("mean", x, y, "u8", "u8", Window((1, 1)))
    (kernel,) = compiled({"m_": emit_pool("m_", problem)}, TARGETS[0], vectorize=False)
    x.values[0, 0, 0], x.values[0, 0, 1] = np.arange(16), 1
    for y_zero in (0, 1):
        got = run(kernel, problem, x, y, pack_mean(0.5, 0, y_zero), 1).reshape(-1)
        assert (got == np.rint((np.arange(16) + 1) / 2) + y_zero).all()


def test_work_is_counted_in_rows_and_images() -> None:
    flat = Strides(1, 1, 1)
    pool = PoolProblem("max", 3, 8, 8, 17, "u8", flat, flat, WINDOWS[0])
    assert (pool.pieces, pool.blocks) == (3 * 4, 2)
    assert replace(pool, op="mean").pieces == 3
    assert replace(pool, op="average").pieces == 3 * 4


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_maxima_of_maxima(target, kind) -> None:
    """Three in a row; all shapes and blocks of channels, results side by side in one tensor."""
    random = np.random.default_rng(1)
    made = []
    for size, kernel, channels in (
        ((6, 7), (5, 5), 16),
        ((1, 9), (3, 5), 17),
        ((9, 1), (5, 1), 1),
        ((2, 2), (7, 7), 128),
        ((5, 4), (1, 3), 256),
    ):
        half = kernel[0] // 2, kernel[1] // 2
        window = Window(kernel, pads=(*half, *half))
        x = Strided((2, *size, channels), DTYPES[kind], halo=HALO)
        made.append((window, x, Strided((2, *size, 3 * channels), DTYPES[kind], halo=HALO)))
    problems = []
    for window, x, wide in made:
        assert can_chain(window)
        by = strides(wide)
        problems.append(replace(problem_of("max", x, wide, kind, kind, window), further=(by, by)))
    texts = {f"chain{i}_": emit_pool_chain(f"chain{i}_", p) for i, p in enumerate(problems)}
    kernels = compiled(texts, target, vectorize=False)
    for kernel, problem, (window, x, wide) in zip(kernels, problems, made, strict=True):
        low = random.integers(0, 20, x.values.shape)
        x.values[...] = low if kind == "u8" else random.normal(-5, 1, x.values.shape)
        step = problem.channels * x.values.itemsize
        table = np.array([x.address, *(wide.address + i * step for i in range(3))], np.int64)
        want = [x.values]
        for _ in range(3):
            want.append(naive_max(want[-1], window))
        for parts in (1, 3):
            in_parts(kernel, (address(table), 0, 0, 0), problem.pieces, problem.blocks, parts)
            assert (wide.take() == np.concatenate(want[1:], 3)).all(), problem

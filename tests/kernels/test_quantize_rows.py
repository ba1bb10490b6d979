"""Rows quantized at run time: the definition bit for bit, its bytes and what stands behind them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.harness import GUARD, targets
from tests.kernels.strided import Strided, compiled
from twofour.core.dynamic import quantize_rows, quantize_tensor
from twofour.kernels.cpu.quantize_rows import SHARES, STEPS_OF, RowsProblem, emit_rows, row_tail
from twofour.runtime.cpu import address, allocate

TARGETS = targets()
DEFINED = {"row": quantize_rows, "tensor": quantize_tensor}
# (rows, channels): channels around the vector, and around what one turn of the loop takes.
SIZES = [(1, 1), (3, 15), (4, 16), (5, 17), (2, 63), (9, 64), (6, 65), (4, 384), (70, 131)]


def values(rows: int, channels: int, seed: int = 0) -> Strided:
    """Rows of very different sizes, with a gap behind each."""
    x = Strided((rows, 1, 1, channels), np.float32, "nhwc", (0, 0, 0, 2))
    random = np.random.default_rng(seed)
    sizes = np.exp(random.normal(0, 3, (rows, 1, 1, 1)))
    x.values[...] = random.normal(0.2, 1, x.values.shape) * sizes
    return x


def kernels(form: str, x: Strided, target) -> list:
    """The kernels of a form, in order."""
    channels, pixel = x.values.shape[-1], x.values.strides[0]
    steps = STEPS_OF[form]
    texts = {f"{s}_": emit_rows(f"{s}_", RowsProblem(s, channels, pixel)) for s in steps}
    return compiled(texts, target, vectorize=False)


def run(form: str, made: list, x: Strided, parts: int = 1) -> tuple[np.ndarray, ...]:
    """Bytes, scales and zero points; fails if anything else was written."""
    rows, channels = x.values.shape[0], x.values.shape[-1]
    begin, pixel = row_tail(channels)
    memory = allocate(rows * pixel + 128)
    memory[:] = GUARD
    y, body = address(memory) + 64, memory[64 : 64 + rows * pixel].reshape(rows, pixel)
    for step, kernel in zip(STEPS_OF[form], made, strict=True):
        for part in range(parts):
            if step == "tensor":
                share = (0, rows, SHARES * part // parts, SHARES * (part + 1) // parts)
            else:
                share = (rows * part // parts, rows * (part + 1) // parts, 0, 1)
            kernel(x.address, y, y, y, *share)
    used = 16 if form == "tensor" else 8
    assert (body[:, channels:begin] == GUARD).all()
    assert (body[:, begin + used :] == GUARD).all()
    assert (memory[:64] == GUARD).all()
    assert (memory[64 + rows * pixel : 128 + rows * pixel] == GUARD).all()
    tails = np.ascontiguousarray(body[:, begin : begin + 8])
    return body[:, :channels], tails[:, :4].view(np.float32), tails[:, 4:].view(np.int32)


def check(form: str, got: tuple[np.ndarray, ...], x: Strided) -> None:
    want = DEFINED[form](x.values[:, 0, 0])
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("form", DEFINED)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_size_is_the_definition(target, form) -> None:
    for seed, size in enumerate(SIZES):
        x = values(*size, seed)
        made = kernels(form, x, target)
        for parts in (1, 3):
            check(form, run(form, made, x, parts), x)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_extreme_rows(target) -> None:
    """Zeros of both signs, the smallest and largest numbers, halves, NaN, infinity."""
    x = values(9, 37)
    x.values[0] = 0
    x.values[1] = -0.0
    x.values[2], x.values[2, ..., 3] = 0, 1e-45
    x.values[3], x.values[3, ..., 36] = 1e38, -3.4e38
    x.values[4] = np.arange(37) - 18.5  # scaled, some lie halfway
    x.values[5], x.values[5, ..., 0] = np.arange(37) + 0.5, -127
    x.values[6, ..., 36] = np.nan
    x.values[7, ..., 9] = -np.inf
    x.values[8] *= 1e-38
    with np.errstate(all="ignore"):
        check("row", run("row", kernels("row", x, target), x), x)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(
    "scale", [(0, 0), (0, 1), (-1, 0), (3, 5), (-5, -3), (-1e-30, 1e30)], ids=str
)
def test_extreme_ranges(target, scale) -> None:
    """A tensor of zeros, of one sign, away from zero, lopsided."""
    x = values(5, 33)
    low, high = scale
    x.values[...] = np.random.default_rng(1).uniform(low, high, x.values.shape)
    made = kernels("tensor", x, target)
    check("tensor", run("tensor", made, x), x)

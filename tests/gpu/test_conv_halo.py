"""Convolutions that read x with its halo, on a GPU: every tile, type and window, 2:4 and dense."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.gpu.launch import capability, compile_all, launch
from tests.gpu.test_conv_sparse import (
    TYPES,
    Array,
    arrays_of,
    compare,
    constants_of,
    found_of,
    problem_of,
    tensors_of,
)
from tests.kernels.cuda.test_conv_halo import WINDOWS
from twofour.core.cuda_program import DTYPES
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv_sparse_tiles
from twofour.kernels.cuda.conv_halo import recipe, tiles
from twofour.kernels.cuda.conv_sparse import compressed_weight, dense_weight, pack
from twofour.kernels.cuda.conv_sparse_tiles import WGMMA_CAPABILITY
from twofour.kernels.cuda.problem import ConvProblem, View
from twofour.kernels.cuda.reference import conv_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and capability() != WGMMA_CAPABILITY, reason="not for this GPU"
    ),
]
ALL = 99
DENSE = pytest.mark.parametrize("dense", [False, True], ids=["2:4", "dense"])


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of five multiprocessors: each block has many parts of y."""
    monkeypatch.setattr(conv_sparse_tiles, "MULTIPROCESSORS", 5)


def check(problem: ConvProblem, arrays: dict[str, Array], most: int, *, dense: bool) -> None:
    """So many tiles, the best guesses, against the definition."""
    weight: tuple[Array, ...]
    if dense:
        arrays = {**arrays, "w": filled(arrays["w"])}
        weight = (dense_weight(problem, arrays["w"]),)
    else:
        weight = compressed_weight(problem, arrays["w"])
    expected, constants = conv_reference(problem, arrays), constants_of(arrays)
    chosen = tiles(problem, capability(), dense=dense)[:most]
    found = [recipe(problem, constants, tile, pack(weight, tile)) for tile in chosen]
    assert found
    if "PYTEST_XDIST_WORKER" not in os.environ:
        compile_all(found, capability())
    for made in found:
        tensors = tensors_of(problem, arrays)
        launch(made, tensors, capability())
        compare(problem, found_of(problem, tensors["y"]), expected, made.config)


def filled(w: Array) -> Array:
    """The weight with other values of it in the place of its zeros."""
    others = np.random.default_rng(3).choice(w[w != 0], w.shape)
    return np.where(w == 0, others, w).astype(w.dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channel_bytes", [64, 128, 256])
@DENSE
def test_tiles(dtype: str, channel_bytes: int, dense: bool) -> None:
    """One chunk of channels or two; channels and cells that fill no block, a residual."""
    problem = problem_of(dtype, channel_bytes // DTYPES[dtype], 200, 3, size=19, batch=3)
    r = View.dense("int8" if dtype == "int8" else "float16", 19, 19, 200)
    problem = replace(problem, r=r)
    check(problem, arrays_of(problem), ALL if dtype == "int8" else 5, dense=dense)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channel_bytes", [64, 128, 256, 512])
@DENSE
def test_products(dtype: str, channel_bytes: int, dense: bool) -> None:
    """Pixels and channels that fill no block, a residual of y's type."""
    problem = problem_of(dtype, channel_bytes // DTYPES[dtype], 200, 1, size=19, batch=3)
    problem = replace(problem, r=View.dense(dtype, 19, 19, 200))
    check(problem, arrays_of(problem), ALL if dtype == "int8" else 3, dense=dense)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@DENSE
def test_windows(window: Window, dense: bool) -> None:
    """Padding on any side or none, dilation, gaps between the pixels of y."""
    plain = problem_of("int8", 64, 72, 3, size=9)
    out_h, out_w = window.output_size(9, 9)
    gap = View("int8", out_h * out_w * 80 + 80, out_w * 80, 80)
    arrays = arrays_of(plain)
    arrays["w"] = arrays["w"][..., : window.kernel[0], : window.kernel[1]].copy()
    arrays["row_scale"] = arrays["row_scale"][: 2 * out_h * out_w]
    check(replace(plain, window=window, y=gap), arrays, 3, dense=dense)


@pytest.mark.parametrize("y", ["int8", "float16", "float32"])
@pytest.mark.parametrize("r", ["int8", "float16", "bfloat16", "float32", "float8e4m3fn"])
def test_residuals(y: str, r: str) -> None:
    """Of each type, in the room of y or in its own; factors of rows; pieces of 16 bytes."""
    plain = problem_of("int8", 64, 80, 3, size=9)
    finish = replace(plain.finish, residual_scale=0.3, by_rows=True)
    finish = finish if y == "int8" else replace(finish, y_zero=0)
    problem = replace(plain, r=View.dense(r, 9, 9, 80), y=View.dense(y, 9, 9, 80), finish=finish)
    check(problem, arrays_of(problem), 2, dense=False)

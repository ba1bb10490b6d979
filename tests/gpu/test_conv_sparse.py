"""The 2:4 convolution on a GPU: its instructions alone, small problems, ResNet's layers, times."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.launch import capability, compile_all, launch
from tests.kernels.cuda.fragments import b_of, metadata_places, sparse_operand
from tests.kernels.cuda.interpret import tensor_of, values_of
from tests.kernels.cuda.test_conv_sparse import weight_of
from twofour.core.cuda_program import DTYPES
from twofour.core.functions import Activation
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv_sparse_tiles
from twofour.kernels.cuda.conv_sparse import (
    compressed_weight,
    pack,
    recipe,
    recipes,
)
from twofour.kernels.cuda.conv_sparse_text import _mma
from twofour.kernels.cuda.conv_sparse_tiles import Tile, candidates
from twofour.kernels.cuda.kernel import NvidiaSource, Recipe
from twofour.kernels.cuda.problem import ConvProblem, Finish, View
from twofour.kernels.cuda.reference import conv_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
Array = np.ndarray[Any, np.dtype[Any]]
KINDS = {"int8": np.int8, "float16": np.float16}


@pytest.fixture(scope="module")
def _machine_code() -> None:
    """Everything compiled side by side; one by one it would take minutes."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    found = []
    for dtype, tile in itertools.product(TYPES, TILES):
        if is_here(tile, dtype):
            found.append(recipe_of(problem := tile_problem(dtype), arrays_of(problem), tile))
    for dtype, shape in itertools.product(NETWORK_TYPES, RESNET):
        found += resnet_recipes(problem := resnet_problem(dtype, shape), arrays_of(problem))
    compile_all(found, capability())


# ---- the instruction alone ---------------------------------------------------------------------


def probe_text(dtype: str) -> str:
    """A kernel of one warp that does one instruction with registers as they are given."""
    problem = problem_of(dtype, 16, 16, 1)
    sums = "int" if dtype == "int8" else "float"
    return (
        f"#define SUM {sums}\n{_mma(problem)}"
        'extern "C" __global__ void probe(const uint4* a, const unsigned* e, const uint4* b,'
        " SUM* d) {\n"
        "  SUM v[4] = {0, 0, 0, 0};\n  int lane = threadIdx.x;\n"
        "#if HALF\n  mma_sparse_1(v, a[lane], b[lane], e[lane]);\n"
        "#else\n  mma_sparse_0(v, a[lane], b[lane], e[lane]);\n#endif\n"
        "  for (int i = 0; i < 4; i++) d[lane * 4 + i] = v[i];\n}\n"
    )


@pytest.mark.parametrize(("dtype", "half"), [("int8", 0), ("float16", 0), ("float16", 1)])
def test_instruction(dtype: str, half: int) -> None:
    """mma.sp alone: A, metadata, B and the sums lie as the packing says, or it prints how."""
    rng, kind = np.random.default_rng(half), KINDS[dtype]
    size = np.dtype(kind).itemsize
    a = rng.integers(-8, 9, (32, 16 // size)).astype(kind)
    b = rng.integers(-8, 9, (32, 16 // size)).astype(kind)
    nibbles = rng.choice(np.array([4, 8, 12, 9, 13, 14]), (32, 8)).astype(np.uint32)
    e = np.bitwise_or.reduce(nibbles << (4 * np.arange(8)).astype(np.uint32), axis=1)
    e = e.astype(np.uint32)
    d = torch.zeros(128, dtype=torch.int32, device="cuda")
    operands = (("a", "uint8"), ("e", "int32"), ("b", "uint8"), ("d", "int32"))
    text = f"#define HALF {half}\n" + probe_text(dtype)
    tensors = {
        "a": torch.from_numpy(a.view(np.uint8)).cuda(),
        "e": torch.from_numpy(e.view(np.int32)).cuda(),
        "b": torch.from_numpy(b.view(np.uint8)).cuda(),
        "d": d,
    }
    launch(NvidiaSource(text, "probe", operands, (1, 1, 1), 32), tensors, capability())
    raw = d.cpu().numpy().reshape(32, 4)
    found = np.zeros((16, 8))
    values = raw if dtype == "int8" else raw.view(np.float32)
    for lane, i in itertools.product(range(32), range(4)):
        found[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] = values[lane, i]
    holding, orders = [], [[0, 1, 2, 3], [0, 2, 1, 3]]
    for selector, a_order, b_order in itertools.product((0, 1), orders, orders):
        registers = a.view(np.uint8).reshape(32, 4, 4)[:, a_order]
        left = np.ascontiguousarray(registers).view(kind).reshape(32, -1)
        right = b_of(b.view(np.uint8).reshape(32, 4, 4)[:, b_order], size).view(kind)
        dense = sparse_operand(left, e, selector).astype(float)
        if (dense @ right.astype(float).T == found).all():
            holding.append((selector, a_order, b_order))
    print(f"{dtype} half {half}: (selector, order of A, order of B) that hold: {holding}")
    expected = (half if size == 2 else 0, orders[0], orders[0])
    assert expected in holding, f"found\n{found}\nlane 0..3 say {metadata_places(1, size, 0)}"


# ---- problems ----------------------------------------------------------------------------------


def problem_of(
    dtype: str, c: int, n: int, kernel: int, *, size: int = 6, batch: int = 2, stride: int = 1
) -> ConvProblem:
    """Square images; the padding that keeps their size."""
    window = Window((kernel, kernel), (stride, stride), pads=(kernel // 2,) * 4)
    x = View.dense(dtype, size, size, c)
    out_h, out_w = window.output_size(size, size)
    y = View.dense(dtype, out_h, out_w, n)
    quantized = dtype in ("int8", "float8e4m3fn")
    finish = Finish(y_factor=0.5, y_zero=3 if dtype == "int8" else 0, low=-90, high=100)
    finish = finish if quantized else Finish(activation=Activation("Relu"))
    zero = 7 if dtype == "int8" else 0
    return ConvProblem(batch, size, size, c, n, x, y, window, finish=finish, x_zero=zero)


def arrays_of(problem: ConvProblem) -> dict[str, Array]:
    """Operands by role, as values; sums end up well inside y's type."""
    rng, dtype = np.random.default_rng(problem.k), problem.x.dtype
    n, shape = problem.out_channels, (problem.batch, problem.height, problem.width)
    w = weight_of(n, problem.channels, problem.window.kernel[0])
    x: Array = rng.integers(-100, 100, (*shape, problem.channels)).astype(np.int8)
    spread = 0.7 * 57 * 73 * problem.k**0.5
    if dtype != "int8":
        w = (w / 128).astype(np.float32)
        x, spread = (x / 64).astype(np.float32), spread / 128 / 64
        x = values_of(tensor_of(x, dtype))
    arrays = {
        "x": x,
        "w": w,
        "scale": rng.uniform(0.5, 1, n).astype(np.float32) * np.float32(60 / spread),
        "bias": rng.uniform(-20, 20, n).astype(np.float32),
        "row_scale": rng.uniform(0.5, 1, problem.rows).astype(np.float32),
    }
    if problem.r is not None:
        r = rng.integers(-60, 60, (problem.batch, *problem.out_size, n)).astype(np.int8)
        arrays["r"] = values_of(tensor_of(r.astype(np.float32), problem.r.dtype))
    return arrays


def constants_of(arrays: dict[str, Array]) -> dict[str, Array]:
    return {role: arrays[role] for role in ("w", "scale", "bias")}


def recipe_of(problem: ConvProblem, arrays: dict[str, Array], tile: Tile) -> Recipe:
    compressed = compressed_weight(problem, arrays["w"])
    return recipe(problem, constants_of(arrays), tile, pack(compressed, tile))


def tensors_of(problem: ConvProblem, arrays: dict[str, Array]) -> dict[str, torch.Tensor]:
    """On the GPU; y is full of 77."""
    tensors = {"x": tensor_of(arrays["x"], problem.x.dtype).cuda()}
    tensors["row_scale"] = torch.from_numpy(arrays["row_scale"]).cuda()
    if problem.r is not None:
        tensors["r"] = tensor_of(arrays["r"], problem.r.dtype).cuda()
    size = problem.batch * problem.y.image
    tensors["y"] = tensor_of(np.full(size, 77, np.float32), problem.y.dtype).cuda()
    return tensors


def found_of(problem: ConvProblem, y: torch.Tensor) -> Array:
    """Values of y [batch, OH, OW, N]."""
    out_h, out_w = problem.out_size
    stored = values_of(y)
    places = (
        np.arange(problem.batch)[:, None, None, None] * problem.y.image
        + np.arange(out_h)[:, None, None] * problem.y.row
        + np.arange(out_w)[:, None] * problem.y.pixel
        + np.arange(problem.out_channels)
    )
    between = np.delete(stored, places.reshape(-1))
    assert (between == 77).all(), "wrote between the pixels"
    return np.asarray(stored[places])


def check(problem: ConvProblem, tile: Tile, arrays: dict[str, Array] | None = None) -> None:
    """One tile against the definition; says where it differs."""
    arrays = arrays or arrays_of(problem)
    tensors = tensors_of(problem, arrays)
    launch(recipe_of(problem, arrays, tile), tensors, capability())
    compare(problem, found_of(problem, tensors["y"]), conv_reference(problem, arrays), str(tile))


def compare(problem: ConvProblem, found: Array, expected: Array, name: str) -> None:
    """Results within the rounding of y; a map of what is wrong where they are not."""
    error = np.abs(found.astype(np.float64) - expected)
    last = {"int8": 0.0, "float16": 2**-10, "bfloat16": 2**-7, "float8e4m3fn": 2**-3}
    # Sums of fp8 keep 14 bits or so on the way; all others are right to float32.
    loose = 1.0 if problem.y.dtype == "int8" else 0.02
    loose += 0.5 * (problem.x.dtype == "float8e4m3fn")
    wrong = error > loose + 2 * last.get(problem.y.dtype, 1e-5) * np.abs(expected)
    if problem.y.dtype == "int8":
        assert (error > 0).mean() < 0.02, f"{name}: {(error > 0).mean():.1%} are off by one or more"
    wrong |= ~np.isfinite(found)
    if wrong.any():
        flat = wrong.reshape(-1, wrong.shape[-1])
        print(f"{name} {problem.x.dtype}: {wrong.mean():.2%} wrong, worst {error.max():.4g}")
        print("  by channel % 64:", np.flatnonzero([flat[:, i::64].any() for i in range(64)]))
        print("  by pixel % 64:", np.flatnonzero([flat[i::64].any() for i in range(64)]))
        at = tuple(np.argwhere(wrong)[0])
        print(f"  first at {at}: found {found[at]}, expected {expected[at]}")
        print("  found   ", found.reshape(flat.shape)[:2, :8])
        print("  expected", expected.reshape(flat.shape)[:2, :8])
    assert not wrong.any(), f"{name}: {wrong.mean():.2%} wrong"


TILES = [tile for tile in candidates(problem_of("int8", 64, 64, 1), 90)]
TYPES = ["int8", "float16", "bfloat16", "float8e4m3fn"]


def is_here(tile: Tile, dtype: str) -> bool:
    """Whether this GPU is one for the tile."""
    return tile in candidates(problem_of(dtype, 64, 64, 1), capability())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("columns", ["first 64 bytes", "last 64 bytes", "one step", "two steps"])
def test_one_block(dtype: str, wgmma: bool, columns: str) -> None:
    """The smallest product of one block, only a part of whose weight is not zero."""
    tile = next(t for t in TILES[::-1] if t.wgmma == wgmma and t.pixels == 32)
    if not is_here(tile, dtype):
        pytest.skip(f"not for this GPU: {dtype}, {tile}")
    step = 128 // DTYPES[dtype]
    problem = problem_of(dtype, 2 * step if columns == "two steps" else step, 64, 1, size=4)
    arrays = arrays_of(problem)
    if "64 bytes" in columns:
        half = slice(0, step // 2) if columns.startswith("last") else slice(step // 2, step)
        arrays["w"][:, half] = 0
    check(problem, tile, arrays)


def tile_problem(dtype: str) -> ConvProblem:
    """3x3 with padding, ends of channels, pixels and K that fill no block."""
    return problem_of(dtype, 48, 200, 3, size=9, batch=3)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{'w' * t.wgmma}{t.channels}x{t.pixels}")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("_machine_code")
def test_tiles(dtype: str, tile: Tile) -> None:
    """Each tile and type."""
    if not is_here(tile, dtype):
        pytest.skip(f"not for this GPU: {dtype}, {tile}")
    check(tile_problem(dtype), tile)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{'w' * t.wgmma}{t.channels}x{t.pixels}")
@pytest.mark.parametrize("images", [2, 7])
@pytest.mark.parametrize("dtype", TYPES)
def test_products(dtype: str, images: int, tile: Tile) -> None:
    """Pixels side by side: 512, which fill all blocks, or 1575, which do not."""
    if not is_here(tile, dtype):
        pytest.skip(f"not for this GPU: {dtype}, {tile}")
    size = 16 if images == 2 else 15
    check(problem_of(dtype, 256, 200, 1, size=size, batch=images), tile)


STAYING = [replace(t, held=held) for t in TILES if t.persistent for held in (False, True)]


@pytest.mark.parametrize("tile", STAYING, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_blocks_that_stay(
    dtype: str, kernel: int, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU of five multiprocessors: each block has many parts of y."""
    if not is_here(replace(tile, held=True), dtype):
        pytest.skip(f"not for this GPU: {dtype}, {tile}")
    monkeypatch.setattr(conv_sparse_tiles, "MULTIPROCESSORS", 5)
    problem = problem_of(dtype, 64, 200, kernel, size=30, batch=3)
    r = View.dense("int8" if dtype == "int8" else "float16", 30, 30, 200)
    check(replace(problem, r=r), tile)


SOME = [TILES[0], TILES[2], TILES[8], TILES[-1]]


@pytest.mark.parametrize("tile", SOME, ids=str)
def test_windows(tile: Tile) -> None:
    """Strides, dilation, padding on some sides only, gaps between the pixels of y."""
    if not is_here(tile, "int8"):
        pytest.skip(f"not for this GPU: {tile}")
    plain = problem_of("int8", 32, 72, 3, size=9)
    window = Window((3, 2), (2, 1), (1, 2), (0, 2, 1, 0))
    out_h, out_w = window.output_size(9, 9)
    gap = View("int8", out_h * out_w * 80 + 80, out_w * 80, 80)
    arrays = arrays_of(plain)
    arrays["w"] = np.ascontiguousarray(arrays["w"][..., :2])
    check(replace(plain, window=window, y=gap), tile, arrays)


@pytest.mark.parametrize("r", ["int8", "float16", "bfloat16", "float32", "float8e4m3fn"])
def test_residuals(r: str) -> None:
    """Residuals of each type, factors of rows."""
    plain = problem_of("int8", 32, 72, 3, size=9)
    finish = replace(plain.finish, residual_scale=0.3, by_rows=True)
    check(replace(plain, r=View.dense(r, 9, 9, 72), finish=finish), TILES[-1])


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("y", ["float32", "float16", "bfloat16", "int8"])
def test_types_of_results(y: str, split: int) -> None:
    """Activations that are more than bounds, real results of bytes, sums of several blocks."""
    zero = 3 if y == "int8" else 0
    finish = Finish(activation=Activation("Silu"), y_zero=zero)
    problem = problem_of("int8", 256, 72, 3, size=9)
    problem = replace(problem, y=View.dense(y, 9, 9, 72), finish=finish)
    tile = next(tile for tile in TILES if is_here(tile, "int8"))
    check(problem, replace(tile, split=split))


RESNET = [  # channels, out channels, kernel, size, stride
    (64, 64, 3, 56, 1),
    (64, 256, 1, 56, 1),
    (256, 512, 1, 56, 2),
    (128, 128, 3, 28, 1),
    (256, 256, 3, 28, 2),
    (1024, 256, 1, 14, 1),
    (512, 512, 3, 7, 1),
    (512, 2048, 1, 7, 1),
]


NETWORK_TYPES = ["int8", "float16", "float8e4m3fn"]


def resnet_problem(dtype: str, shape: tuple[int, int, int, int, int]) -> ConvProblem:
    """A layer at batch 1."""
    c, n, kernel, size, stride = shape
    return problem_of(dtype, c, n, kernel, size=size, batch=1, stride=stride)


def resnet_recipes(problem: ConvProblem, arrays: dict[str, Array]) -> tuple[Recipe, ...]:
    """The two best guesses."""
    return recipes(problem, constants_of(arrays), capability(), effort=1)[:2]


@pytest.mark.parametrize("dtype", NETWORK_TYPES)
@pytest.mark.parametrize("shape", RESNET, ids=str)
@pytest.mark.usefixtures("_machine_code")
def test_resnet(dtype: str, shape: tuple[int, int, int, int, int]) -> None:
    """The best guesses for layers of ResNet-50 against a convolution in float64."""
    problem = resnet_problem(dtype, shape)
    arrays = arrays_of(problem)
    found = resnet_recipes(problem, arrays)
    assert found
    tensors, expected = tensors_of(problem, arrays), reference_of(problem, arrays)
    for made in found:
        launch(made, tensors, capability())
        compare(problem, found_of(problem, tensors["y"]), expected, f"{made.tactic} {made.config}")


def reference_of(problem: ConvProblem, arrays: dict[str, Array]) -> Array:
    """`conv_reference` with the sums of torch in float64 on the GPU, which is quick."""
    x = torch.from_numpy(arrays["x"].astype(np.float64) - problem.x_zero).cuda().permute(0, 3, 1, 2)
    w = values_of(tensor_of(arrays["w"], problem.x.dtype)).astype(np.float64)
    pads = problem.window.pads[:2]
    sums = torch.nn.functional.conv2d(
        x, torch.from_numpy(w).cuda(), stride=problem.window.stride, padding=pads
    )
    whole = problem.x_zero * w.reshape(w.shape[0], -1).sum(1)
    v = sums.permute(0, 2, 3, 1).cpu().numpy() + whole
    eye = np.eye(problem.out_channels, dtype=np.float32)[:, :, None, None]
    out_h, out_w = problem.out_size
    point = replace(
        problem,
        height=out_h,
        width=out_w,
        channels=problem.out_channels,
        x=View.dense("float32", out_h, out_w, problem.out_channels),
        window=Window((1, 1)),
        x_zero=0,
    )
    return conv_reference(point, arrays | {"x": v.astype(np.float32), "w": eye})

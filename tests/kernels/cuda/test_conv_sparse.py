"""The 2:4 convolution in CUDA C++: packing against sparse tensor cores in numpy; compiling."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cuda.fragments import b_of, ldmatrix, sparse_operand
from twofour.core.bfloat16 import from_bf16
from twofour.core.errors import UnsupportedError
from twofour.core.float8 import from_fp8
from twofour.core.functions import Activation
from twofour.core.numerics import Window, patches
from twofour.kernels.cuda.conv_sparse import (
    MMA,
    WGMMA,
    compressed_weight,
    converted,
    dense_weight,
    in_order,
    pack,
    recipes,
    refusals,
)
from twofour.kernels.cuda.conv_sparse_text import conv_text, taps_inside
from twofour.kernels.cuda.conv_sparse_tiles import Tile, candidates, shared_bytes, tiles
from twofour.kernels.cuda.kernel import NvidiaSource
from twofour.kernels.cuda.nvrtc import compile_source, cubin_of
from twofour.kernels.cuda.problem import ConvProblem, Finish, View
from twofour.kernels.cuda.reference import conv_sums
from twofour.kernels.cuda.sparse_fragments import compress, is_two_four, record_bytes, steps_of

Array = np.ndarray[Any, np.dtype[Any]]
WIDE, NARROW = Tile(128, 128, 256, 3, warps_m=2), Tile(64, 32, 128, 4, warps_m=2)
GROUPS = Tile(256, 128, 256, 4, wgmma=True)
SIZES = {"int8": 1, "float8e4m3fn": 1, "float16": 2, "bfloat16": 2}


def weight_of(n: int, c: int, kernel: int, *, seed: int = 0, kept: int = 2) -> Array:
    """int8 [N, C, K, K], 2:4 along C, the places different everywhere."""
    rng = np.random.default_rng(seed)
    places = np.argsort(rng.random((n, kernel, kernel, c // 4, 4)), axis=-1) < kept
    w = rng.integers(-127, 128, places.shape) * places
    return w.reshape(n, kernel, kernel, c).transpose(0, 3, 1, 2).astype(np.int8)


def problem_of(dtype: str = "int8", *, c: int = 32, n: int = 24, kernel: int = 3) -> ConvProblem:
    """2 images of 5 x 6 pixels."""
    window = Window((kernel, kernel), pads=(kernel // 2,) * 4)
    x, y = View.dense(dtype, 5, 6, c), View.dense(dtype, 5, 6, n)
    return ConvProblem(2, 5, 6, c, n, x, y, window, x_zero=5 if dtype == "int8" else 0)


def values_of(elements: Array, dtype: str) -> Array:
    """What converted elements stand for."""
    decode = {"bfloat16": from_bf16, "float8e4m3fn": from_fp8}.get(dtype)
    return elements.astype(np.float32) if decode is None else decode(elements)


def unpacked(records: Array, dtype: str, tile: Tile) -> Array:
    """The weight [rows, K] that tensor cores make of records [steps, tiles, bytes]."""
    size, columns = SIZES[dtype], []
    kind = {"int8": np.int8, "float16": np.float16, "bfloat16": np.uint16}.get(dtype, np.uint8)
    for step in records:
        for half in range(2):
            rows = []
            for record in step:
                a = record[512 * half : 512 * (half + 1)].view(kind).reshape(32, -1)
                words = record[1024:].view(np.uint32)
                e = words[32 * half : 32 * (half + 1)] if size == 1 else words
                rows.append(sparse_operand(a, e, half if size == 2 else 0))
            columns.append(np.concatenate(rows))
    rows = np.concatenate(columns, axis=1)
    dense = np.zeros_like(rows)
    for block in range(rows.shape[0] // tile.channels):
        mine = slice(block * tile.channels, (block + 1) * tile.channels)
        dense[mine][tile.order] = rows[mine]
    return dense


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("tile", [WIDE, NARROW, GROUPS], ids=str)
def test_tensor_cores_find_the_weight_again(dtype: str, tile: Tile) -> None:
    problem = problem_of(dtype, c=32, n=72)
    w = weight_of(72, 32, 3)
    packed = pack(compressed_weight(problem, w), tile)
    tiles = 256 // 16 if tile is GROUPS else 8
    assert packed.shape == (steps_of(288, SIZES[dtype]), tiles, record_bytes(SIZES[dtype]))
    rows = w.transpose(0, 2, 3, 1).reshape(72, -1)
    found = unpacked(packed, dtype, tile)
    assert (found[:72, :288] == converted(rows, dtype)).all()
    assert not found[72:].any()
    assert not found[:, 288:].any()


@pytest.mark.parametrize("dtype", SIZES)
def test_a_dense_weight_is_found_again(dtype: str) -> None:
    """Lane = 4 g + t holds rows g and g + 8, of each 32 bytes those from 4 t and 16 + 4 t."""
    problem, tile = problem_of(dtype, c=32, n=72), replace(GROUPS, dense=True)
    w = np.random.default_rng(0).integers(-127, 128, (72, 32, 3, 3)).astype(np.int8)
    packed = pack((dense_weight(problem, w),), tile)
    size = SIZES[dtype]
    assert packed.shape == (steps_of(288, size), 16, record_bytes(size, dense=True))
    # step, record, 32 bytes, g, t, 16 bytes, 8 rows, byte
    registers = packed.reshape(-1, 16, 4, 8, 4, 2, 2, 4)
    rows = registers.transpose(1, 6, 3, 0, 2, 5, 4, 7).reshape(256, -1)
    found = np.zeros_like(rows)
    found[tile.order] = rows
    values = w.transpose(0, 2, 3, 1).reshape(72, -1)
    wanted = converted(values, dtype).view(np.uint8)
    assert (found[:72, : 288 * size] == wanted).all()
    assert not found[72:].any()
    assert not found[:, 288 * size :].any()


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_steps_of_a_convolution(dtype: str) -> None:
    """Shared memory as the kernel fills it, fragments as it loads them: the sums of the problem."""
    problem = problem_of(dtype, c=16)
    size, pixels = SIZES[dtype], 60
    rng = np.random.default_rng(1)
    x = rng.integers(-20, 20, (2, 5, 6, 16)).astype(np.int8)
    w = weight_of(24, 16, 3)
    rows = unpacked(pack(compressed_weight(problem, w), NARROW), dtype, NARROW)
    kind = np.int8 if dtype == "int8" else np.float16
    found = patches(x, problem.window, problem.x_zero).reshape(pixels, -1).astype(kind)
    steps = steps_of(144, size)
    padded = np.zeros((64, steps * 128 // size), kind)
    padded[:pixels, :144] = found
    sums = np.zeros((64, 64), np.float64)
    for step in range(steps):
        shared = swizzled(padded[:, step * 128 // size : (step + 1) * 128 // size])
        for half in range(2):
            first = (2 * step + half) * 64 // size
            a = values_of(rows[:, first : first + 64 // size], dtype).astype(np.float64)
            for tile in range(8):
                lane = np.arange(32)
                piece = (half * 4 + (lane >> 3)) ^ (lane & 7)
                registers = ldmatrix(shared, tile * 1024 + (lane & 7) * 128 + (piece << 4))
                b = b_of(registers, size).view(kind).astype(np.float64)
                sums[:, 8 * tile : 8 * tile + 8] += a @ b.T
    real = x if dtype == "int8" else x.astype(np.float32)
    expected = conv_sums(problem, real, w).reshape(pixels, 24)
    assert (sums.T[:pixels, :24] == expected).all()


def swizzled(tile: Array) -> Array:
    """Rows of 128 bytes as they lie in shared memory."""
    pieces = tile.view(np.uint8).reshape(-1, 8, 16)
    shared = np.zeros_like(pieces)
    for row in range(pieces.shape[0]):
        shared[row, np.arange(8) ^ row % 8] = pieces[row]
    return shared.reshape(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 2))
def test_compressed_weights_are_the_same_weights(seed: int, fours: int, kept: int) -> None:
    w = weight_of(3, 4 * fours, 1, seed=seed, kept=kept)[:, :, 0, 0]
    values, nibbles = compress(w)
    low, high = nibbles & 3, nibbles >> 2
    assert (low < high).all(), "the tensor core wants places in order"
    dense = np.zeros((3, fours, 4), np.int8)
    for place, column in ((low, 0), (high, 1)):
        np.put_along_axis(
            dense, place[..., None].astype(int), values.reshape(3, fours, 2)[..., [column]], 2
        )
    assert (dense.reshape(3, -1) == w).all()


def test_pattern() -> None:
    assert is_two_four(np.array([[0, 1, 2, 0, 3, 0, 0, 0]]))
    assert not is_two_four(np.array([[0, 1, 2, 1, 3, 0, 0, 0]]))
    assert not is_two_four(np.zeros((1, 6)))


def constants_of(problem: ConvProblem, kernel: int = 3) -> dict[str, Array]:
    n = problem.out_channels
    w = weight_of(n, problem.channels, kernel)
    return {"w": w, "scale": np.ones(n, np.float32), "bias": np.zeros(n, np.float32)}


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({"x": View.dense("float32", 5, 6, 32)}, 90, "x is float32"),
        ({"groups": 2}, 90, "2 groups"),
        ({"x": View("int8", 64 * 30, 64 * 6, 64)}, 90, "do not begin at multiples of 16"),
        ({"channels": 24, "x": View.dense("int8", 5, 6, 24)}, 90, "multiples of 16"),
        ({"y": View.dense("int64", 5, 6, 24)}, 90, "no conversion for int64"),
        ({"y": View.dense("float8e4m3fn", 5, 6, 24)}, 80, "does not know float8"),
        ({"x": View.dense("float8e4m3fn", 5, 6, 32)}, 80, "no sparse tensor cores for float8"),
        ({}, 75, "no sparse tensor cores for int8"),
    ],
)
def test_refusals(change: dict[str, Any], capability: int, reason: str) -> None:
    problem = replace(problem_of(), **change)
    constants = constants_of(problem)
    assert any(reason in found for found in refusals(problem, constants["w"], capability))
    assert recipes(problem, constants, capability) == ()


def test_a_dense_weight_is_refused() -> None:
    problem = problem_of()
    constants = constants_of(problem) | {"w": weight_of(24, 32, 3, kept=3)}
    assert recipes(problem, constants, 90) == ()


def test_recipes() -> None:
    problem = problem_of(c=256, n=96)
    found = recipes(problem, constants_of(problem), 90)
    assert 6 < len(found) <= 20
    assert {recipe.tactic for recipe in found} == {MMA, WGMMA}
    assert len({(recipe.tactic, recipe.config) for recipe in found}) == len(found)
    assert any(recipe.scratch for recipe in found), "so few pixels ask for split sums"
    assert {recipe.tactic for recipe in recipes(problem, constants_of(problem), 80)} == {MMA}
    assert len(recipes(problem, constants_of(problem), 80, effort=0)) == 1
    for recipe in found:
        assert all(isinstance(call, NvidiaSource) for call in recipe.calls)
        roles = {role for call in recipe.calls for role in getattr(call, "roles", ())}
        assert roles - set(recipe.constants) - set(recipe.scratch) == {"x", "y"}
    fp8 = problem_of("float8e4m3fn", c=64)
    assert {recipe.tactic for recipe in recipes(fp8, constants_of(fp8), 90)} == {WGMMA}
    assert {recipe.tactic for recipe in recipes(fp8, constants_of(fp8), 89)} == {MMA}


COMPILED = [
    ("int8", "int8", 80),
    ("float16", None, 80),
    ("int8", None, 90),
    ("bfloat16", "float32", 90),
    ("float8e4m3fn", "float8e4m3fn", 90),
    ("float8e4m3fn", "float16", 89),
]


@pytest.mark.parametrize(("dtype", "r", "capability"), COMPILED)
def test_compiles(dtype: str, r: str | None, capability: int) -> None:
    """Of each tactic one with split sums, that is two kernels, and one without."""
    problem = problem_of(dtype, c=256, n=40)
    finish = Finish(activation=Activation("Silu"), add_last=r is not None, by_rows=True)
    residual = None if r is None else View.dense(r, 5, 6, 40)
    problem = replace(problem, finish=finish, r=residual)
    found = recipes(problem, constants_of(problem), capability)
    kinds = {(recipe.tactic, len(recipe.calls)): recipe.calls for recipe in found}
    calls = {call for some in kinds.values() for call in some}
    assert len(calls) >= 3
    for call in calls:
        assert isinstance(call, NvidiaSource)
        made = compile_source(call, capability)
        assert made.cubin[:4] == b"\x7fELF"
        assert made.nulls == 0


@pytest.mark.parametrize(("c", "kernel"), [(64, 3), (128, 3), (256, 3), (256, 1)])
def test_order_of_k(c: int, kernel: int) -> None:
    """What the kernel reads of x in its steps: pieces of 16 channels of a tap."""
    problem = problem_of(c=c, kernel=kernel)
    w = np.arange(c * kernel**2, dtype=np.int32).reshape(1, c, kernel, kernel)
    found = in_order(problem, w)[0]
    for k in range(0, found.size, 16):
        step, piece = divmod(k // 16, 8)
        tap, channel = divmod(k // 16, c // 16)
        if taps_inside(problem):
            tap, channel = step % kernel**2, step // kernel**2 * 8 + piece
        expected = w[0, 16 * channel : 16 * channel + 16, tap // kernel, tap % kernel]
        assert (found[k : k + 16] == expected).all()


def test_lanes_hold_neighbours() -> None:
    """Rows g and g + 8 of all tiles of a warp are one run of channels."""
    for tile in candidates(problem_of(kernel=1), 90):
        assert sorted(tile.order) == list(range(tile.channels))
        rows = tile.order.reshape(-1, 2, 8)  # record, half, g
        warps = tile.threads // 32 if tile.wgmma else tile.warps_m
        if tile.wgmma:
            mine = rows.reshape(-1, tile.tiles_m, 4, 2, 8).transpose(0, 2, 1, 3, 4)
        else:
            mine = rows.reshape(warps, tile.tiles_m, 2, 8)
        runs = mine.reshape(warps, tile.tiles_m * 2, 8)
        assert (np.diff(runs, axis=1) == 1).all()


def test_tiles_fit() -> None:
    for capability in (80, 90):
        for tile in candidates(problem_of(kernel=1), capability):
            assert tile.threads % 64 == 0
            assert tile.threads % (tile.channels // 4) == 0
            assert tile.shared_bytes(1, 3) <= (163 if capability == 80 else 227) * 1024


def stack_bytes(text: str, folder: Path) -> int:
    """What a kernel keeps in memory for want of registers."""
    binaries = pytest.importorskip("triton.backends.nvidia").__path__[0]
    made = folder / "kernel.cubin"
    made.write_bytes(cubin_of(text, 90))
    command = [Path(binaries, "bin", "cuobjdump"), "-res-usage", made]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"STACK:(\d+)", told)
    return int(found)


def test_three_groups_are_for_products_and_their_sums_stay_in_registers(tmp_path: Path) -> None:
    three = {tile for tile in candidates(problem_of(kernel=1), 90) if tile.threads == 384}
    assert len(three) == 1
    assert not three & {*candidates(problem_of(kernel=3), 90)}
    for dtype, y in (("int8", "int8"), ("float16", "float16"), ("float8e4m3fn", "bfloat16")):
        x = View.dense(dtype, 1, 1, 768)
        problem = ConvProblem(4000, 1, 1, 768, 768, x, View.dense(y, 1, 1, 768), Window((1, 1)))
        assert stack_bytes(conv_text(problem, *three, "k"), tmp_path) == 0


@pytest.mark.parametrize("side", [4096, 8192, 16384])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_the_best_guess_is_the_tile_that_was_the_fastest(dtype: str, side: int) -> None:
    """On an H200: benchmarks/cuda_kernels.json."""
    ends = [View.dense(dtype, 1, 1, side)] * 2
    guess = tiles(ConvProblem(side, 1, 1, side, side, *ends, pattern="2:4"), 90)[0]
    assert str(guess) == "256x128, 256 threads, 4 stages"


def test_the_compilers_log_is_in_the_error() -> None:
    with pytest.raises(UnsupportedError, match=r"sm_90a(?s:.)*identifier \"no_such\" is undefined"):
        cubin_of("__global__ void k() { no_such(); }", 90)


@pytest.mark.parametrize(
    ("capability", "kilobytes"), [(80, 163), (86, 99), (87, 163), (89, 99), (90, 227), (121, 99)]
)
def test_tiles_fit_shared_memory(capability: int, kilobytes: int) -> None:
    """Of each GPU there is: a block of 121 has as much as one of 120."""
    problem = problem_of("int8", c=256, n=256)
    found = tiles(problem, capability)
    assert found
    assert all(shared_bytes(problem, tile) <= kilobytes * 1024 for tile in found)

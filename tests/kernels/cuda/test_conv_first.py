"""First layers: the kernel over pixels of four bytes, run on the CPU by the emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.cuda.emulate import COMPILER, EmulatorError, emulate
from twofour.core.functions import Activation
from twofour.core.numerics import Window
from twofour.kernels.cuda import conv_first
from twofour.kernels.cuda.conv_first import Tile, pack, recipe, recipes, refusals, tiles
from twofour.kernels.cuda.kernel import Array, NvidiaSource
from twofour.kernels.cuda.nvrtc import cubin_of
from twofour.kernels.cuda.problem import ConvProblem, Finish, View
from twofour.kernels.cuda.reference import conv_reference

emulated = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
STEM = Window((7, 7), (2, 2), pads=(3, 3, 3, 3))
SMALL = Window((3, 3), (2, 2), pads=(1, 1, 1, 1))
STRANGE = Window((3, 2), (1, 3), (2, 1), (0, 2, 1, 0))
ONE, TWO = Tile(4, 8, 64, 128, 1), Tile(2, 16, 32, 64, 1)
PAIRS = Tile(4, 32, 64, 128, 2, together=2)


def problem_of(
    window: Window, channels: int = 3, n: int = 64, *, y: str = "int8", gap: int = 0
) -> ConvProblem:
    """2 images of 14 x 22 pixels."""
    height, width = 14, 22
    out_h, out_w = window.output_size(height, width)
    pixel = n + gap
    finish = Finish(y_factor=0.5, y_zero=3, low=-90, high=100) if y == "int8" else Finish()
    return ConvProblem(
        2,
        height,
        width,
        channels,
        n,
        View("int8", height * width * 4, width * 4, 4),
        View(y, out_h * out_w * pixel + gap, out_w * pixel, pixel),
        window,
        finish=finish,
        x_zero=7,
    )


def arrays_of(problem: ConvProblem) -> dict[str, Array]:
    rng = np.random.default_rng(problem.k + problem.out_channels)
    n, kernel = problem.out_channels, problem.window.kernel
    return {
        "x": rng.integers(-100, 100, (2, problem.height, problem.width, 4)).astype(np.int8),
        "w": rng.integers(-90, 90, (n, problem.channels, *kernel)).astype(np.int8),
        "scale": rng.uniform(0.5, 1, n).astype(np.float32) / np.float32(40 * problem.k**0.5),
        "bias": rng.uniform(-20, 20, n).astype(np.float32),
    }


def away(problem: ConvProblem, tile: Tile, folder: Path, *, change: str = "") -> Array:
    """How far the results are from the definition, of both ways to copy."""
    arrays = arrays_of(problem)
    made = recipe(problem, arrays, tile)
    (call,) = made.calls
    assert isinstance(call, NvidiaSource)
    if change:
        old, new = change.split(" -> ")
        assert old in call.text
        made = replace(made, calls=(replace(call, text=call.text.replace(old, new)),))
    out_h, out_w = problem.out_size
    view = problem.y
    places = (
        np.arange(2)[:, None, None, None] * view.image
        + np.arange(out_h)[:, None, None] * view.row
        + np.arange(out_w)[:, None] * view.pixel
        + np.arange(problem.out_channels)
    )
    found = []
    for eager in (False, True):
        stored = np.full(2 * view.image, 77, view.dtype)
        emulate(made, arrays | {"y": stored}, folder, "int8", eager=eager)
        assert (np.delete(stored, places.reshape(-1)) == 77).all(), "wrote between the pixels"
        found.append(stored[places].astype(np.float64))
    seen = arrays | {"x": arrays["x"][..., : problem.channels]}
    return np.abs(np.stack(found) - conv_reference(problem, seen))


@emulated
@pytest.mark.parametrize("tile", [ONE, TWO, PAIRS], ids=str)
@pytest.mark.parametrize(
    "window", [STEM, SMALL, STRANGE, Window((1, 1))], ids=["7x7", "3x3", "strange", "1x1"]
)
def test_windows(window: Window, tile: Tile, tmp_path: Path) -> None:
    """Padding, strides, dilation; what lies in the room of the fourth channel does not count."""
    assert away(problem_of(window), tile, tmp_path).max() <= 1


@emulated
@pytest.mark.parametrize(("channels", "n", "gap"), [(4, 24, 8), (1, 40, 0), (2, 70, 3), (3, 16, 0)])
def test_channels(channels: int, n: int, gap: int, tmp_path: Path) -> None:
    """Of x fewer than a word has, of y no multiple of a block's, and gaps between its pixels."""
    problem = problem_of(SMALL, channels, n, gap=gap)
    assert away(problem, tiles(problem)[0], tmp_path).max() <= 1


@emulated
@pytest.mark.parametrize("name", ["Relu", "Silu", "HardSwish"])
def test_activations(name: str, tmp_path: Path) -> None:
    problem = problem_of(SMALL, y="float32")
    problem = replace(problem, finish=replace(problem.finish, activation=Activation(name)))
    if name == "Relu":
        problem = replace(problem, finish=replace(problem.finish, low=0.0))
    assert away(problem, TWO, tmp_path).max() <= 1e-3


@emulated
@pytest.mark.parametrize("tile", [ONE, TWO, PAIRS], ids=str)
@pytest.mark.parametrize("window", [STEM, STRANGE], ids=["7x7", "strange"])
def test_blocks_that_stay(
    window: Window, tile: Tile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next part of x is copied while one is computed."""
    monkeypatch.setattr(conv_first, "_MULTIPROCESSORS", 1)
    assert away(problem_of(window), tile, tmp_path).max() <= 1


@emulated
def test_a_part_that_comes_too_early_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_first, "_MULTIPROCESSORS", 1)
    change = "__syncthreads();  // this tile -> (void)0;  //"
    assert away(problem_of(STEM), ONE, tmp_path, change=change).max() > 1


@emulated
@pytest.mark.parametrize(
    "change",
    [
        *("wait_copies<0>() -> (void)0", "+ part; -> + part ^ 1;", "column * X_PIXEL -> column"),
        "  wait_for_others(); -> (void)0;",
    ],
)
def test_the_emulator_finds_mistakes(change: str, tmp_path: Path) -> None:
    try:
        worst = away(problem_of(STEM), ONE, tmp_path, change=change).max()
    except EmulatorError:
        return
    assert worst > 1


def test_all_weights_are_packed_once() -> None:
    w = np.arange(1, 1 + 40 * 3 * 9, dtype=np.int64).reshape(40, 3, 3, 3) % 127
    packed = pack(w.astype(np.int8), ONE)
    assert packed.shape == (1, 2, 4, 32, 16)
    values, counts = np.unique(packed[packed != 0], return_counts=True)
    wanted, often = np.unique(w[w != 0], return_counts=True)
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_array_equal(counts, often)


def test_candidates_compile_for_gpus() -> None:
    size = (224 * 224 * 4, 224 * 4, 4)
    out = View.dense("int8", 112, 112, 64)
    problem = ConvProblem(32, 224, 224, 3, 64, View("int8", *size), out, STEM)
    found = recipes(problem, arrays_of(replace(problem, batch=2)), 90)
    assert len({each.config for each in found}) == len(found) > 4
    for made in found[:2]:
        (call,) = made.calls
        assert isinstance(call, NvidiaSource)
        for capability in (80, 90):
            assert cubin_of(call.text, capability)[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": View.dense("int8", 14, 22, 3)}, "words"),
        ({"x": View.dense("float16", 14, 22, 4)}, "words"),
        ({"groups": 3}, "groups"),
        ({"r": View.dense("int8", 7, 11, 64)}, "residual"),
        ({"window": Window((9, 9), pads=(4, 4, 4, 4))}, "9x9"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    problem = problem_of(SMALL)
    assert refusals(problem, 90) == ()
    changed = replace(problem, **change)  # type: ignore[arg-type]
    assert reason in " ".join(refusals(changed, 90))
    assert recipes(changed, arrays_of(problem), 90) == ()
    assert refusals(problem, 75)

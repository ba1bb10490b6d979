"""Convolutions in bfloat16 within the derived bound: tactics x configurations x sizes x data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.bf16 import TARGET, needs_bf16
from tests.kernels.harness import Case, float_bound, make, real, run, tactic
from twofour.core.bfloat16 import from_bf16, round_bf16, to_bf16
from twofour.core.functions import PLAIN, Activation
from twofour.core.numerics import Window
from twofour.kernels.cpu.conv_sparse import Sparse, compress
from twofour.kernels.cpu.conv_sparse_f32 import Permuted
from twofour.kernels.cpu.problem import Config, ConvProblem
from twofour.kernels.cpu.tactic import Tactic, tactics

pytestmark = needs_bf16

TACTICS = [t for t in tactics() if t.dtype == "bfloat16" and not t.depthwise]
FOUR_OF_EIGHT = tactic("4:8", "bfloat16")
KINDS = [(t, t.pattern) for t in TACTICS] + [(FOUR_OF_EIGHT, "2:4")]
every_kind = pytest.mark.parametrize(
    ("t", "pattern"), KINDS, ids=[f"{t.name} of {pattern or 'dense'}" for t, pattern in KINDS]
)
WINDOWS = {
    "1x1 stride 2": Window((1, 1), (2, 2)),
    "3x3": Window((3, 3)),
    "3x3 stride 2": Window((3, 3), (2, 2)),
    "3x3 dilation 2": Window((3, 3), (1, 1), (2, 2)),
    "1x3": Window((1, 3)),
    "3x1 stride 1x2": Window((3, 1), (1, 2)),
}


def options_for(t: Tactic, problem: ConvProblem) -> list[tuple[Tactic, Config]]:
    """All its configurations, with the other loop order, and one prefetching."""
    configs = t.configs(problem, TARGET.isa)
    assert configs
    other = replace(configs[0], panels_outside=not configs[0].panels_outside)
    return [(t, c) for c in (*configs, other, replace(configs[0], prefetch_bytes=256))]


def channels(least: int, pattern: str) -> int:
    """So many input channels, or as many more as groups of the pattern need."""
    return -(-least // 8) * 8 if pattern == "4:8" else least


def check(case: Case, t: Tactic, parts: int = 1) -> None:
    """All configurations of the tactic give results within the bound."""
    problem = case.problem()
    assert t.refuse(problem, case.w, TARGET.isa) == ""
    expected, bound = case.expected(), float_bound(case)
    options = options_for(t, problem)
    for (_, config), got in zip(options, run(case, options, TARGET, parts), strict=True):
        assert got.dtype == np.float32
        error = np.abs(got.astype(np.float64) - expected)
        assert (error <= bound).all(), f"{t.name} {config}: {np.nanmax(error / bound)} bounds"


@every_kind
@pytest.mark.parametrize("m", [1, 27, 28, 29])
def test_matrix_products_around_the_tile_and_vector_width(t, pattern, m) -> None:
    rng = np.random.default_rng(m)
    for n, k in ((16, 4), (32, 20), (96, 68)):
        if pattern == "2:4/pair" and n == 16:
            continue
        shape = {"height": m, "width": 1, "c": channels(k, pattern), "n": n}
        check(make(rng, **shape, window=Window((1, 1)), pattern=pattern, dtype="bfloat16"), t)


@every_kind
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows(t, pattern, window) -> None:
    rng = np.random.default_rng(1)
    sizes = {"batch": 2, "height": 11, "width": 13, "c": 8, "n": 32, "window": window}
    check(make(rng, **sizes, pattern=pattern, dtype="bfloat16"), t, parts=3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("c", [4, 8, 12, 16, 24, 40, 64])
def test_four_of_eight_picks_nothing_beyond_a_run(dtype, c, monkeypatch) -> None:
    """What lies between pixels, and behind the last one, is NaN; some channels keep nothing."""
    monkeypatch.setattr("tests.kernels.harness.GUARD", 0xFF)
    rng = np.random.default_rng(c)
    sizes = {"height": 5, "width": 5, "c": c, "n": 32, "dtype": dtype}
    case = make(rng, **sizes, pattern="2:4" if c % 8 else "4:8")
    w = np.where(rng.random((32, c, 1, 1)) < 0.5, case.w, np.float32(0))
    w[3] = w[20, c // 8 * 8 :] = 0
    t = FOUR_OF_EIGHT if dtype == "bfloat16" else tactic("2:4", dtype)
    for weights in (case.w, w):
        for gap in (0, 4, 6):
            check(replace(case, w=weights, x_gap=gap * case.x.itemsize), t)


@pytest.mark.parametrize(("c", "kernel"), [(3, (7, 7)), (2, (1, 1)), (5, (1, 1)), (7, (3, 3))])
def test_odd_runs_read_nothing_beyond_them(c, kernel, monkeypatch) -> None:
    """What lies between pixels, and behind the last one, is NaN."""
    monkeypatch.setattr("tests.kernels.harness.GUARD", 0xFF)
    rng = np.random.default_rng(c)
    case = make(rng, height=9, width=9, c=c, n=16, window=Window(kernel), dtype="bfloat16")
    check(case, tactic("dense", "bfloat16"))
    check(replace(case, x_gap=2), tactic("dense", "bfloat16"))


@every_kind
@pytest.mark.parametrize("add", ["", "bfloat16", "float32"])
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_residuals_and_outputs_that_do_not_fill_the_last_block(t, pattern, add, out) -> None:
    rng = np.random.default_rng(4)
    for n in (1, 15, 17, 33) if pattern != "2:4/pair" else (32,):
        shape = {"height": 3, "width": 3, "c": channels(12, pattern), "n": n}
        form = {"pattern": pattern, "dtype": "bfloat16", "out": out, "add": add}
        check(replace(make(rng, **shape, window=Window((1, 1)), **form), y_gap=6), t)


@pytest.mark.parametrize("name", sorted({*PLAIN, "Clip"}))
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_activations(name, out) -> None:
    rng = np.random.default_rng(5)
    activation = Activation(name, -0.75, 1.5) if name == "Clip" else Activation(name)
    sizes = {"height": 4, "width": 4, "c": 8, "n": 20, "window": Window((1, 1))}
    case = make(rng, **sizes, dtype="bfloat16", out=out, add=out, activation=activation)
    check(case, tactic("dense", "bfloat16"))


def test_groups() -> None:
    rng = np.random.default_rng(6)
    case = make(rng, c=12, n=48, groups=3, dtype="bfloat16")
    check(case, tactic("dense", "bfloat16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_depthwise_reads_bfloat16_stores_it_and_adds_it(dtype, out) -> None:
    """Its weights are float32, not rounded."""
    rng = np.random.default_rng(7)
    for channels in (5, 16, 40):
        for window in (Window((3, 3)), Window((3, 3), (2, 2))):
            sizes = {"height": 9, "width": 9, "c": channels, "n": channels, "groups": channels}
            case = make(rng, **sizes, window=window, dtype=dtype, out=out, add="bfloat16")
            w = rng.standard_normal(case.w.shape, np.float32)
            (t,) = (t for t in tactics() if t.depthwise and t.dtype == dtype)
            check(replace(case, w=w), t)


def test_other_instruction_sets_and_single_channels_are_refused_with_the_reason() -> None:
    rng = np.random.default_rng(8)
    case = make(rng, c=1, n=32, window=Window((1, 1)), dtype="bfloat16")
    for t in TACTICS:
        assert "pair" in t.refuse(case.problem(), case.w, TARGET.isa)
        assert "avx2" in t.refuse(case.problem(), case.w, "avx2")
    dense = make(rng, c=8, n=32, dtype="bfloat16")
    for t in TACTICS:
        assert bool(t.refuse(dense.problem(), dense.w, TARGET.isa)) == bool(t.pattern)
    wide = make(rng, c=8, n=32, dtype="bfloat16", pattern="4:8")
    assert tactic("2:4 H", "bfloat16").refuse(wide.problem(), wide.w, TARGET.isa)
    assert not FOUR_OF_EIGHT.refuse(wide.problem(), wide.w, TARGET.isa)
    wide.w[5, :5, 0, 1] = 1
    reason = FOUR_OF_EIGHT.refuse(wide.problem(), wide.w, TARGET.isa)
    assert "output channel 5, tap (0,1)" in reason


def test_indices_and_values_are_the_kept_weights() -> None:
    """The packed group, read back by the loop that conv_sparse.py documents."""
    rng = np.random.default_rng(9)
    w = rng.standard_normal((2, 2, 16, 2, 4)).astype(np.float32)
    w[..., rng.permutation(4)[:2]] = 0
    w[0, 0, 3] = 0
    bits = to_bf16(w + np.float32(0))
    packed = Sparse(1, "bfloat16").pack_group(bits)
    meta = packed[:, :128].reshape(2, 2, 16, 4)
    values = from_bf16(packed[:, 128:].view(np.uint16)).reshape(2, 2, 2, 16, 2)
    back = np.zeros_like(w)
    for step in range(2):
        index = (meta >> (4 * step)) & 15
        assert (index[..., 1::2] == index[..., ::2] + 1).all()
        for j in range(2):
            at = (index[..., 2 * j] // 2)[..., None].astype(int)
            kept = np.take_along_axis(back[:, :, :, step], at, -1) + values[:, step, :, :, j, None]
            np.put_along_axis(back[:, :, :, step], at, kept, -1)
    np.testing.assert_array_equal(back, round_bf16(w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_permuted_weights_are_the_kept_weights(dtype, steps) -> None:
    """The packed group, read back by the loop that conv_sparse_f32.py documents."""
    rng = np.random.default_rng(steps)
    form = Permuted(dtype)
    steps = min(steps, form.steps_per_group)
    w = rng.standard_normal((2, 2, 16, steps, 8)).astype(np.float32)
    w[..., rng.permutation(8)[:4]] = 0
    w[0, 0, 3] = w[1, 1, 5, :, 2:] = 0
    stored = to_bf16(w + np.float32(0)) if dtype == "bfloat16" else w
    each, bits, count = (2, 5, 3) if dtype == "bfloat16" else (1, 4, 8)
    picks = steps * 4 // each
    vectors = -(-picks // count)
    packed = form.pack_group(stored)
    assert packed.shape == (2, form.group_bytes(2, steps))
    parts = packed.view(stored.dtype).reshape(2, 2, vectors + picks, 16, each)
    words = parts[:, :, :vectors].view(f"u{stored.itemsize}")
    back = np.zeros((2, 2, 16, steps * 8), np.float32)
    for j in range(picks):
        at = (words[:, :, j // count] >> (bits * (j % count))) & ((1 << bits) - 1)
        values = parts[:, :, vectors + j]
        values = from_bf16(values) if dtype == "bfloat16" else values
        for k in range(each):
            where = at[..., k, None].astype(int)
            kept = np.take_along_axis(back, where, -1) + values[..., k, None]
            np.put_along_axis(back, where, kept, -1)
    want = round_bf16(w) if dtype == "bfloat16" else w
    np.testing.assert_array_equal(back, want.reshape(back.shape))


def test_more_than_the_pattern_allows_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="more than 4 of 8"):
        Permuted("bfloat16").pack_group(np.ones((1, 1, 16, 1, 8), np.uint16))
    with pytest.raises(ValueError, match="more than 2 of 4"):
        compress(np.ones((1, 1, 16, 1, 4), np.uint16))


def test_the_harness_sees_bfloat16() -> None:
    case = make(np.random.default_rng(0), dtype="bfloat16")
    assert case.x.dtype == np.uint16
    assert case.problem().dtype == case.problem().out == "bfloat16"
    np.testing.assert_array_equal(round_bf16(real(case.x)), real(case.x))

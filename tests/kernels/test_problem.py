"""How a convolution is cut: pieces, tiles, groups and runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.core.numerics import Window, convolve
from twofour.core.target import ISAS
from twofour.kernels.cpu.problem import (
    LANES,
    ConvProblem,
    Pieces,
    Strides,
    merge_groups,
    segments_of,
    tiles_for,
    tilings,
)
from twofour.kernels.cpu.tactic import tactics

# Accumulators an instruction set has room for.
REGISTERS = {"dotprod": 6, "avx512vnni": 28, "avx2": 6, "vector": 3}


def problem(
    out_h: int, out_w: int, c: int, n: int, window: Window | None = None, dtype: str = "int8"
) -> ConvProblem:
    """A convolution of one dense image."""
    window = window or Window((1, 1))
    size = 1 if dtype == "int8" else 4
    width = (out_w - 1) * window.stride[1] + (window.kernel[1] - 1) * window.dilation[1] + 1
    height = (out_h - 1) * window.stride[0] + (window.kernel[0] - 1) * window.dilation[0] + 1
    x = Strides(height * width * c * size, width * c * size, c * size)
    y = Strides(out_h * out_w * n * size, out_w * n * size, n * size)
    return ConvProblem(
        1, out_h, out_w, c, n, dtype, x, y, dtype, window.kernel, window.stride, window.dilation
    )


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300))
def test_pieces_are_few_and_nearly_equal(total, at_most) -> None:
    pieces = Pieces.of(total, at_most)
    sizes = [pieces.size] * pieces.big_count + [pieces.size - 1] * (pieces.count - pieces.big_count)
    assert sum(sizes) == total
    assert 1 <= min(sizes) <= max(sizes) <= at_most
    assert max(sizes) - min(sizes) <= 1
    assert pieces.sizes == tuple(sorted(set(sizes), reverse=True))
    assert (pieces.count - 1) * at_most < total


shapes = st.builds(
    problem,
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([3, 16, 64, 256]),
    st.sampled_from([1, 10, 16, 32, 48, 64, 512]),
    st.sampled_from([Window((1, 1)), Window((3, 3)), Window((3, 3), (2, 2))]),
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(ISAS))
def test_every_tactic_proposes_legal_tiles(shape, isa) -> None:
    for tactic in tactics():
        if not tactic.is_for(isa):
            continue
        if tactic.depthwise or (tactic.pattern == "2:4/pair" and shape.blocks % 2):
            continue  # not asked, or refused
        configs = tactic.configs(shape, isa)
        assert configs
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert shape.blocks % config.blocks == 0
            assert 1 <= config.tile_h <= shape.out_h
            assert 1 <= config.tile_w <= shape.out_w
            rows = config.tile_h * config.tile_w
            assert rows == 1 or rows * config.blocks <= REGISTERS[isa]
            assert tactic.pattern != "2:4/pair" or config.blocks % 2 == 0


def test_large_weights_are_tried_in_the_outer_loop() -> None:
    small, large = problem(14, 14, 64, 64), problem(14, 14, 1024, 512)
    for one, outside in ((small, False), (large, True)):
        found = tiles_for(one, "avx512vnni", blocks=(1, 2), count=2)
        assert any(c.panels_outside for c in found) == outside


def test_few_positions_take_wide_panels() -> None:
    found = tiles_for(problem(1, 1, 512, 1024), "avx512vnni", blocks=(1,), count=1)
    assert max(c.blocks for c in found) > 1
    assert all(c.tile_h * c.tile_w == 1 for c in found)


def test_tiles_use_the_registers_of_a_large_image() -> None:
    best = tilings(problem(56, 56, 64, 64), 28, 1, 2)[0]
    assert best.tile_h * best.tile_w >= 24


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([Window((1, 1)), Window((2, 3))]),
)
def test_merged_groups_compute_the_same(groups, outs, ins, window) -> None:
    random = np.random.default_rng(groups * 100 + outs * 10 + ins)
    x = random.integers(0, 256, (1, 3, 4, groups * ins)).astype(np.uint8)
    w = random.integers(-128, 128, (groups * outs, ins, *window.kernel)).astype(np.int8)
    merged, fewer = merge_groups(w, groups)
    assert merged.dtype == w.dtype
    assert groups % fewer == 0
    if outs == ins == 1:
        assert fewer == groups, "a depthwise convolution stays as it is"
    else:
        assert fewer == 1 or (w.shape[0] // fewer) % LANES == 0
    assert (convolve(x, w, window, groups, 7) == convolve(x, merged, window, fewer, 7)).all()


@pytest.mark.parametrize("step", [1, 4, 8, 16])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2)])
@pytest.mark.parametrize(("c", "n"), [(3, 5), (16, 32), (20, 17)])
def test_runs_hold_each_weight_once(step, dilation, c, n) -> None:
    """Walking the runs in the kernel's order gives back the filter."""
    window = Window((2, 3), (1, 1), dilation)
    w = np.arange(1, 1 + n * c * 6, dtype=np.float32).reshape(n, c, 2, 3)
    shape = problem(4, 5, c, n, window)
    runs = segments_of(w, shape, step)
    joined = dilation == (1, 1)
    assert shape.taps_joined == joined
    assert runs.shape[:3] == (-(-n // 16), LANES, 2 if joined else 6)
    flat = runs.reshape(-1, runs.shape[2], runs.shape[3] * step)
    assert (flat[n:] == 0).all()
    assert (flat[:, :, shape.segment_k :] == 0).all()
    order = flat[:n, :, : shape.segment_k].reshape(n, 2, 3, c).transpose(0, 3, 1, 2)
    assert (order == w).all()


def test_taps_lie_apart_where_pixels_have_gaps_or_groups() -> None:
    one = problem(4, 4, 16, 16, Window((3, 3)))
    assert one.taps_joined
    assert (one.segments, one.segment_k) == (3, 48)
    for apart in (
        replace(one, x=replace(one.x, pixel=17)),
        replace(one, groups=2),
        replace(one, dilation=(1, 2)),
    ):
        assert not apart.taps_joined
        assert (apart.segments, apart.segment_k) == (9, 16)
    assert one.macs == replace(one, dilation=(1, 2)).macs == 16 * 16 * 16 * 9


def test_flattening_merges_images_only_where_they_follow_each_other() -> None:
    one = replace(problem(4, 5, 8, 16), batch=3)
    flat = one.flattened()
    assert (flat.batch, flat.out_h, flat.out_w, flat.macs) == (1, 60, 1, one.macs)
    assert flat.x.row == flat.x.pixel == one.x.pixel
    halo = Strides(7 * 6 * 8, 7 * 8, 8)
    for kept in (
        replace(one, x=halo),
        replace(one, y=replace(one.y, image=one.y.image + 64)),
        replace(one, r=replace(one.y, row=one.y.row + 16), add="int8"),
        replace(one, stride=(1, 2)),
        replace(one, kernel=(1, 2)),
    ):
        assert kept.flattened() == kept

"""Channels-last tensors with a halo: where pixels lie, and that every window stays inside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from twofour.compiler.layout import Tensor
from twofour.core.numerics import Window

pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
windows = st.builds(Window, pairs, pairs, pairs, st.tuples(*[st.integers(0, 3)] * 4))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(windows, min_size=1, max_size=3))
def test_every_window_reads_inside_the_tensor(height, width, all_windows) -> None:
    one = Tensor("t", 2, height, width, 3, "u8")
    for window in all_windows:
        assume(min(window.output_size(height, width)) >= 1)
        one.widen(window)
    one.offset = 64
    top, left, bottom, right = one.halo
    strides = one.strides
    for window in all_windows:
        out_h, out_w = window.output_size(height, width)
        first = one.at(*window.pads[:2])
        reach = [
            (out - 1) * s + (k - 1) * d
            for out, s, k, d in zip(
                (out_h, out_w), window.stride, window.kernel, window.dilation, strict=True
            )
        ]
        row, column = divmod((first - one.offset) // strides.pixel, strides.row // strides.pixel)
        assert (row, column) == (top - window.pads[0], left - window.pads[1])
        assert 0 <= row <= row + reach[0] < top + height + bottom
        assert 0 <= column <= column + reach[1] < left + width + right


def test_the_halo_is_as_wide_as_the_widest_reader_and_no_wider() -> None:
    one = Tensor("t", 1, 8, 8, 4, "float32")
    one.widen(Window((1, 1)))
    assert one.halo == [0, 0, 0, 0]
    one.widen(Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1)))
    assert one.halo == [1, 1, 0, 0]  # with stride 2 the last row is not padded
    one.widen(Window((3, 3), pads=(0, 2, 1, 0)))
    assert one.halo == [1, 2, 1, 0]


@pytest.mark.parametrize(("kind", "size"), [("u8", 1), ("float32", 4)])
def test_strides_are_those_of_a_padded_array(kind, size) -> None:
    one = Tensor("t", 3, 5, 7, 6, kind, halo=[1, 2, 3, 4])
    whole = np.zeros((3, 5 + 4, 7 + 6, 6), np.dtype(f"V{size}"))
    assert one.size_bytes == whole.nbytes
    assert (one.strides.image, one.strides.row, one.strides.pixel) == whole.strides[:3]
    one.offset = 128
    inner = whole[:, 1:, 2:]
    begin = inner.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    assert one.at() == 128 + begin
    assert one.at(1, 2) == 128
    assert one.view.channel == size


def test_layouts_differ_in_all_that_a_kernel_sees() -> None:
    def layout(**changes) -> tuple[int, ...]:
        given = {"batch": 1, "height": 4, "width": 4, "channels": 8, "kind": "u8", "fill": 128}
        return Tensor("t", **{**given, "halo": [1, 1, 1, 1], **changes}).layout

    others = [
        {"batch": 2},
        {"height": 5},
        {"width": 5},
        {"channels": 9},
        {"kind": "float32"},
        {"fill": 0},
        {"halo": [1, 1, 1, 2]},
    ]
    assert layout() == layout()
    assert len({layout(), *(layout(**change) for change in others)}) == len(others) + 1

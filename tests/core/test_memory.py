"""Blocks that native code may read beyond the end of: used as they are, or copied."""

from __future__ import annotations

import numpy as np

from twofour.core.memory import address, allocate, with_slack


def test_memory_is_zero_aligned_and_its_own() -> None:
    a, b = allocate(5), allocate(3 << 21, huge=True)
    assert not a.any()
    assert address(a) % 4096 == address(b) % 4096 == 0
    b[:] = 1
    assert not a.any()


def test_what_has_room_is_not_copied() -> None:
    block = allocate(100 + 50)
    for data in (block[:100], block[:120][:100]):
        assert with_slack(data, 50) is data
    assert with_slack(block[:100], 51) is not block


def test_what_has_none_is_copied_to_where_there_is() -> None:
    block = allocate(8192)
    block[:] = np.arange(8192) % 251
    for data in (
        block[:100],
        block[1:90],
        block,
        np.arange(100, dtype=np.uint8),
        np.zeros(0, np.uint8),
    ):
        copy = with_slack(data, 8192)
        assert copy is not data
        np.testing.assert_array_equal(copy, data)
        assert not np.shares_memory(copy, data)
        assert address(copy) % 4096 == 0
        base = copy.base
        assert base is not None
        assert base.nbytes == data.nbytes + 8192
        assert not base[data.nbytes :].any()

"""Copies between arrays, by one thread and by several."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.runtime.cuda import copies
from twofour.runtime.cuda.copies import copied, copy


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (513,), (64, 65, 3)])
@pytest.mark.parametrize("large_bytes", [0, 1 << 30])
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_all_is_copied(
    shape: tuple[int, ...], large_bytes: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "LARGE_BYTES", large_bytes)
    source = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    source = np.asarray(source)
    into = np.full(shape, 1, dtype)
    copy(into, source)
    assert np.array_equal(into, source)
    found = copied(source)
    assert np.array_equal(found, source)
    assert found.shape == source.shape
    assert not np.shares_memory(found, source)

"""Values in types that numpy lacks, read out of an arena."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.core.bfloat16 import to_bf16
from twofour.core.float8 import to_fp8
from twofour.engine import Strided, TensorInfo, Write
from twofour.runtime.taps import read

VALUES = np.array([[1.5, -2.0, 0.25], [448.0, 3.0, -0.5]], np.float32)  # exact in all of them


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("float32", VALUES),
        ("float16", VALUES.astype(np.float16)),
        ("bfloat16", to_bf16(VALUES)),
        ("float8e4m3fn", to_fp8(VALUES)),
    ],
)
@pytest.mark.parametrize("scale", [(), (0.5,), (0.5, 1.0, 2.0)])
def test_small_floats_are_what_they_stand_for(
    dtype: str, bits: np.ndarray, scale: tuple[float, ...]
) -> None:
    arena = np.full(256, 0x7F, np.uint8)
    arena[16 : 16 + bits.nbytes] = bits.reshape(-1).view(np.uint8)
    at = Strided(16, 3 * bits.itemsize, 0, 0)
    write = Write(TensorInfo("t", dtype, (2, 3)), at=at, scale=scale)
    expected = VALUES * np.array(scale or 1, np.float32)
    np.testing.assert_array_equal(read(write, arena, {}, ()), expected)

"""float8 as numbers and bits."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.core.float8 import LARGEST, SMALLEST, from_fp8, round_fp8, to_fp8


def test_every_pattern_of_bits_stands_for_its_number() -> None:
    bits = np.arange(256, dtype=np.uint8)
    expected = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(from_fp8(bits), expected)


def test_numbers_are_rounded_to_nearest_even() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(20000).astype(np.float32) * np.float32(10) ** rng.integers(
        -4, 3, 20000
    )
    values = from_fp8(np.arange(0x7E, dtype=np.uint8))
    halves = (values[1:] + values[:-1]) / 2
    numbers = np.concatenate([numbers, halves, -halves, values]).astype(np.float32)
    numbers = numbers[np.abs(numbers) <= LARGEST]
    expected = numbers.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(to_fp8(numbers), expected.view(np.uint8))


def test_what_is_too_large_saturates_and_nan_stays() -> None:
    large = np.array([449, 480, 1e30, np.inf, -500, -np.inf], np.float32)
    np.testing.assert_array_equal(round_fp8(large), np.sign(large) * np.float32(LARGEST))
    assert np.isnan(round_fp8(np.array([np.nan, -np.nan], np.float32))).all()
    assert round_fp8(np.array([SMALLEST / 2], np.float32)) == 0


@given(st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=20))
def test_any_numbers_are_rounded_as_others_round_them(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    np.testing.assert_array_equal(to_fp8(x), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3), (5, (1 << 15) + 1)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = np.asarray(x).T
    bits = to_fp8(x)
    assert bits.shape == x.shape
    np.testing.assert_array_equal(bits, x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))

"""Differences from the reference, in numbers that are right for known vectors."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.bench.versus import differences


def test_differences_of_known_vectors() -> None:
    got = {"y": np.array([[3.0, 4.0]], np.float32), "other": np.zeros(2)}
    expected = {"y": np.array([[4.0, 3.0]], np.float32), "missing": np.zeros(2)}
    (found,) = differences(got, expected)
    assert found.name == "y"
    assert found.cosine == pytest.approx(24 / 25)
    assert found.max_abs == 1.0
    assert found.reference_max_abs == 4.0


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_equal_outputs_have_cosine_1(value: float) -> None:
    same = {"y": np.full((1, 3), value, np.float32)}
    (found,) = differences(same, same)
    assert (found.cosine, found.max_abs) == (1.0, 0.0)


def test_integers_do_not_wrap() -> None:
    low, high = np.array([-128], np.int8), np.array([127], np.int8)
    (found,) = differences({"y": low}, {"y": high})
    assert found.max_abs == 255.0
    assert found.cosine == pytest.approx(-1.0)


def test_other_shapes_are_not_compared() -> None:
    assert differences({"y": np.zeros(3)}, {"y": np.zeros(4)}) == []

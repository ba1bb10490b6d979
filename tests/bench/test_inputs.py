"""Inputs: open sizes get numbers, contradictions are refused, random data is the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.sample_models import conv_model
from twofour.bench.declared import ModelInput, random_feeds, static_inputs
from twofour.bench.inputs import model_inputs, require_feeds
from twofour.core.errors import InputError
from twofour.engine import TensorInfo

OPEN = ModelInput("x", "float32", ("batch", 3, 32, 32))
IMAGE = ModelInput("x", "float32", ("n", 3, "h", "w"))
WIDE = ModelInput("x", "float32", ("batch", 3, None, "w"))
FIXED = ModelInput("x", "float32", (2, 3))


def test_inputs_of_a_file(tmp_path: Path) -> None:
    path = conv_model(tmp_path / "m.onnx")
    assert model_inputs(path) == (ModelInput("x", "float32", ("batch", 4, 8, 8)),)


@pytest.mark.parametrize(
    ("declared", "shapes", "batch", "shape"),
    [
        (OPEN, {}, None, (1, 3, 32, 32)),
        (OPEN, {}, 8, (8, 3, 32, 32)),
        (OPEN, {"x": [4, 3, 32, 32]}, None, (4, 3, 32, 32)),
        (WIDE, {"x": [1, 3, 16, 24]}, None, (1, 3, 16, 24)),
        (FIXED, {}, None, (2, 3)),
        (FIXED, {}, 2, (2, 3)),
        (ModelInput("x", "int64", ()), {}, None, ()),
    ],
)
def test_open_sizes_get_numbers(
    declared: ModelInput, shapes: dict[str, list[int]], batch: int | None, shape: tuple[int, ...]
) -> None:
    (found,) = static_inputs([declared], shapes, batch)
    assert found == TensorInfo("x", declared.dtype, shape)


@pytest.mark.parametrize(
    ("declared", "shapes", "batch", "message"),
    [
        (WIDE, {}, None, "has open sizes"),
        (IMAGE, {}, None, "as --shapes x:1x3x224x224"),
        (FIXED, {}, 3, "cannot have shape 3x3"),
        (FIXED, {"x": [2, 4]}, None, "cannot have shape 2x4"),
        (FIXED, {"x": [2]}, None, "cannot have shape 2"),
        (OPEN, {"y": [2]}, None, "no input 'y'"),
    ],
)
def test_contradictions_are_refused(
    declared: ModelInput, shapes: dict[str, list[int]], batch: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        static_inputs([declared], shapes, batch)


def test_random_feeds_are_the_same_each_time() -> None:
    infos = [
        TensorInfo("x", "float32", (2, 3)),
        TensorInfo("i", "int64", (4,)),
        TensorInfo("b", "bool", (5,)),
        TensorInfo("h", "float16", ()),
    ]
    first, second = random_feeds(infos), random_feeds(infos)
    assert list(first) == ["x", "i", "b", "h"]
    for info in infos:
        assert first[info.name].dtype == info.dtype
        assert first[info.name].shape == info.shape
        np.testing.assert_array_equal(first[info.name], second[info.name])
    assert not np.array_equal(first["x"], random_feeds(infos, seed=1)["x"])


def test_an_input_beyond_memory() -> None:
    with pytest.raises(InputError, match="too large"):
        random_feeds([TensorInfo("x", "float32", (1 << 20, 1 << 20))])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"y": np.zeros((2, 3), np.float32)}, "has other inputs"),
        ({"x": np.zeros((2, 3), np.float64)}, "has another type"),
        ({"x": np.zeros((2, 4), np.float32)}, "cannot have shape 2x4"),
    ],
)
def test_a_model_with_other_inputs(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        require_feeds(feeds, [FIXED], Path("m.onnx"))

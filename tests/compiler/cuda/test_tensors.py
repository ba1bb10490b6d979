"""Values on the GPU as looks at buffers: the same elements as numpy's views have."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from twofour.compiler.cuda.tensors import Tensor


def seen(tensor: Tensor, elements: np.ndarray) -> np.ndarray:
    """The elements of a tensor, of a buffer of float32."""
    steps = tuple(4 * step for step in tensor.strides)
    return as_strided(elements[tensor.offset :], tensor.dims, steps)


def laid(dims: tuple[int, ...]) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A held tensor, its buffer, and the array that it stands for."""
    tensor = Tensor.held("x", "float32", dims)
    elements = np.arange(np.prod(dims), dtype=np.float32)
    return tensor, elements, seen(tensor, elements)


def test_images_lie_channels_last() -> None:
    tensor, elements, array = laid((2, 6, 4, 5))
    assert np.array_equal(array.transpose(0, 2, 3, 1).reshape(-1), elements)
    assert tensor.view.is_flat(4, 5)


def test_three_channels_take_the_room_of_four() -> None:
    tensor = Tensor.held("x", "float32", (2, 3, 4, 5))
    elements = np.arange(2 * 4 * 4 * 5, dtype=np.float32).reshape(2, 4, 5, 4)
    array = seen(tensor, elements.reshape(-1))
    assert np.array_equal(array.transpose(0, 2, 3, 1), elements[..., :3])
    assert tensor.view.is_flat(4, 5)
    assert tensor.span_bytes == 4 * (elements.size - 1)


def test_some_channels() -> None:
    tensor, elements, array = laid((2, 6, 4, 5))
    part = tensor.channels(2, (2, 3, 4, 5))
    assert np.array_equal(seen(part, elements), array[:, 2:5])
    assert part.has_channels_together
    assert part.view.pixel == 6


def test_channels_of_rows() -> None:
    tensor, elements, array = laid((2, 7, 12))
    part = tensor.channels(4, (2, 7, 4))
    assert np.array_equal(seen(part, elements), array[..., 4:8])
    assert part.row_stride == 12


def test_one_row_of_each_sequence() -> None:
    tensor, elements, array = laid((3, 5, 8))
    first = tensor.rows(2, 5, (3, 8))
    assert np.array_equal(seen(first, elements), array[:, 2])
    assert first.row_stride == 40


def test_pixels_become_tokens() -> None:
    tensor, elements, array = laid((2, 8, 3, 4))
    tokens = tensor.pixels((2, 12, 8))
    assert np.array_equal(seen(tokens, elements), array.reshape(2, 8, 12).transpose(0, 2, 1))
    assert tokens.row_stride == 8


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 3, 4), (6, 4)),
        ((6, 4), (2, 3, 4)),
        ((5, 8, 1, 1), (5, 8)),
        ((5, 8), (5, 8, 1, 1)),
        ((1, 4), (4,)),
    ],
)
def test_reshapes_that_move_nothing(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    tensor, elements, array = laid(before)
    assert np.array_equal(seen(tensor.reshaped(after), elements), array.reshape(after))


def test_rows_that_lie_unevenly_are_told() -> None:
    tensor = Tensor("x", "float32", (2, 3, 4), (100, 4, 1))
    assert tensor.row_stride is None
    assert not tensor.has_channels_together


def test_a_span_ends_behind_the_last_element() -> None:
    tensor = Tensor("x", "float16", (2, 3), (10, 2), 4)
    assert (tensor.offset_bytes, tensor.span_bytes) == (8, 30)

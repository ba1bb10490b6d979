"""Tensors as raw bytes, as both transports have them: little-endian, row-major."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.serve.errors import MalformedError, TooLargeError
from twofour.serve.limits import Limits

Array = NDArray[Any]


def require_size(name: str, shape: Sequence[int], dtype: np.dtype[Any], limits: Limits) -> None:
    """Refuses a tensor beyond the limits, before anything is allocated for it.

    Args:
        name: of the input, for messages.
        shape: sizes of 0 or more.
        dtype: of its elements.
        limits: that it has to keep.

    Raises:
        TooLargeError: it has too many dimensions, or takes too many bytes.
    """
    if len(shape) > limits.rank:
        raise TooLargeError(
            f"input {name!r} has too many dimensions",
            [f"expected at most {limits.rank}", f"got {len(shape)}"],
            "send the shape that the model's metadata names",
        )
    # Each size counts, so that an empty tensor has no dimension beyond what numpy can express.
    size_bytes = math.prod([size or 1 for size in shape]) * dtype.itemsize
    if size_bytes > limits.tensor_bytes:
        raise TooLargeError(
            f"input {name!r} is too large",
            [f"expected at most {limits.tensor_bytes} bytes", f"got {size_bytes}"],
            "send fewer rows in one request",
        )


def tensor_at(
    body: bytes | bytearray | memoryview,
    begin: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    name: str,
) -> Array:
    """The tensor whose bytes lie in a body: a view where it is aligned, otherwise a copy.

    Args:
        body: as long as it takes.
        begin: of the tensor.
        shape: of the tensor.
        dtype: of its elements.
        name: of the input, for messages.

    Raises:
        MalformedError: a BOOL is neither 0 nor 1.
    """
    count = math.prod(shape)
    array = np.frombuffer(body, dtype, count, begin) if count else np.empty(0, dtype)
    if dtype.kind == "b" and array.view(np.uint8).max(initial=0) > 1:
        raise MalformedError(
            f"input {name!r} has unusable data",
            ["expected each BOOL to be a byte 0 or 1", "got another byte"],
            "send the bytes 0 and 1",
        )
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    return array.reshape(shape)


def texts_of(array: Array) -> bytes:
    """Texts as raw bytes: each behind its length, 4 bytes, little-endian.

    Args:
        array: object, of bytes.
    """
    texts: list[bytes] = array.reshape(-1).tolist()
    return b"".join([part for text in texts for part in (len(text).to_bytes(4, "little"), text)])

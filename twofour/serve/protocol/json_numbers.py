"""Numbers of a JSON document as a tensor: flat or nested lists, each value checked exactly."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.serve.errors import MalformedError

Array = NDArray[Any]


def tensor(data: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> Array:
    """The tensor that a JSON value holds.

    Args:
        data: a list of all elements in row-major order, or lists nested as `shape` says.
        shape: of the tensor, checked to be dimensions.
        dtype: bool, an integer or a float type.
        name: of the tensor, for messages.

    Returns:
        A new array of `shape` and `dtype`.

    Raises:
        MalformedError: the lists do not have the shape, an element is not of the type, or lies
            beyond its range.
    """
    flat = flatten(data, shape, name)
    kinds = set(map(type, flat))
    expected = {bool} if dtype.kind == "b" else {int} if dtype.kind in "iu" else {int, float}
    if not kinds <= expected:
        names = " or ".join(sorted(JSON_NAMES[kind] for kind in expected))
        got = next(value for value in flat if type(value) not in expected)
        raise refused(name, f"expected values that are {names}", f"got {shown(got)}")
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        low, high = min(flat), max(flat)
        if low < limits.min or high > limits.max:
            got = low if low < limits.min else high
            raise refused(
                name, f"expected integers from {limits.min} to {limits.max}", f"got {shown(got)}"
            )
    with np.errstate(over="ignore"):
        array = np.array(flat, dtype).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        got = flat[int(np.argmin(np.isfinite(array.reshape(-1))))]
        raise refused(
            name,
            f"expected values that {dtype.name} can hold",
            f"got {shown(got)}, which it cannot",
        )
    return array


JSON_NAMES = {bool: "true and false", int: "integers", float: "numbers with a fraction"}


def flatten(data: Any, shape: tuple[int, ...], name: str) -> list[Any]:
    """The elements of a list that is flat, or nested as `shape` says."""
    count = math.prod(shape)
    if not isinstance(data, list):
        raise refused(name, "expected data to be a list", f"got {shown(data)}")
    level = data
    if len(shape) > 1 and data and isinstance(data[0], list):
        if len(data) != shape[0]:
            raise refused(name, f"expected {shape[0]} rows of data", f"got {len(data)}")
        for axis, size in enumerate(shape[1:], 1):
            if set(map(type, level)) != {list}:
                if level:
                    wrong = next(item for item in level if not isinstance(item, list))
                    raise refused(name, f"expected lists along axis {axis}", f"got {shown(wrong)}")
                break
            lengths = set(map(len, level))
            if lengths != {size}:
                wrong = next(length for length in sorted(lengths) if length != size)
                expected = f"expected lists of {size} elements along axis {axis}"
                raise refused(name, expected, f"got one of {wrong}")
            level = list(chain.from_iterable(level))
    if len(level) != count:
        expected = f"expected {count} elements for shape {list(shape)}"
        raise refused(name, expected, f"got {len(level)}")
    return level


def shown(value: Any) -> str:
    """A value of a JSON document, cut to what a message can hold."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refused(name: str, expected: str, got: str) -> MalformedError:
    """The refusal of one tensor's data."""
    fix = "send data as the shape and datatype of the input say, or as binary data"
    return MalformedError(f"input {name!r} has unusable data", [expected, got], fix)

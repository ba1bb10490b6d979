"""The bits of float32, from which narrower types are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Bits = NDArray[np.uint32]

MAGNITUDE = np.uint32(0x7FFFFFFF)
"""All but the sign."""
INFINITE = np.uint32(0x7F800000)
"""Of infinity; a larger magnitude is no number."""
_RUN = 1 << 15


def narrowed(x: Array, dtype: DTypeLike, convert: Callable[[Bits], Bits]) -> Array:
    """Float32 in another type, run by run: what lies between stays in the CPU's cache.

    Args:
        x: float32, any shape.
        dtype: of the result.
        convert: bits [count] -> values of `dtype` [count].
    """
    flat = np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint32)
    found = np.empty(flat.size, dtype)
    for first in range(0, flat.size, _RUN):
        run = slice(first, first + _RUN)
        found[run] = convert(flat[run])
    return found.reshape(np.shape(x))

"""Copies between arrays of the CPU: large ones by several threads, since one fills no bus."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.machine import usable_cores

Array = NDArray[Any]
_MOST_THREADS = 8
_LARGE_BYTES = 8 << 20
_ALIGNMENT = 64


@functools.cache
def _pool() -> ThreadPoolExecutor:
    threads = max(1, min(_MOST_THREADS, usable_cores()))
    return ThreadPoolExecutor(threads, "twofour-copies")


def copy(to: Array, source: Array) -> None:
    """Copies an array into another of its shape and type, both C-contiguous.

    Args:
        to: is written.
        source: is read.
    """
    if to.nbytes < _LARGE_BYTES:
        np.copyto(to, source)
        return
    into, flat = to.reshape(-1), source.reshape(-1)
    pool = _pool()
    step = -(-max(flat.size, 1) // _MOST_THREADS // _ALIGNMENT) * _ALIGNMENT
    parts = [slice(begin, begin + step) for begin in range(0, flat.size, step)]
    list(pool.map(lambda part: np.copyto(into[part], flat[part]), parts))


def copied(source: Array) -> Array:
    """A new array with the same content."""
    found = np.empty_like(source)
    copy(found, source)
    return found

"""Copies between arrays of the CPU: large ones by several threads, since one fills no bus."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.machine import usable_cores

Array = NDArray[Any]
_MOST_THREADS = 8
LARGE_BYTES = 8 << 20
"""From so many on several threads copy."""
_PARTS, _ALIGNMENT = 16, 64


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
    if to.nbytes < LARGE_BYTES:
        np.copyto(to, source)
        return
    for _ in copied_parts(to, source):
        continue


def copied_parts(to: Array, source: Array) -> Iterator[slice]:
    """Copies by several threads; gives each part of the flat array once it is there, in order.

    Args:
        to: is written; C-contiguous.
        source: is read; likewise, of the same shape and type.
    """
    into, flat = to.reshape(-1), source.reshape(-1)
    step = -(-max(flat.size, 1) // _PARTS // _ALIGNMENT) * _ALIGNMENT
    parts = [slice(begin, min(begin + step, flat.size)) for begin in range(0, flat.size, step)]

    def work(part: slice) -> slice:
        np.copyto(into[part], flat[part])
        return part

    yield from _pool().map(work, parts)


def copied(source: Array) -> Array:
    """A new array with the same content."""
    found = np.empty_like(source)
    copy(found, source)
    return found

"""Named ranges that NVIDIA's profilers show (NVTX), where a library for them is installed."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libnvToolsExt.so.1"


@dataclass(frozen=True)
class Ranges:
    """What begins and ends a range in this thread.

    Attributes:
        push: begins one with this name.
        pop: ends the one that began last.
        by: what does it.
    """

    push: Callable[[str], Any]
    pop: Callable[[], Any]
    by: str


@functools.cache
def ranges() -> Ranges | None:
    """The package `nvtx`, else the library of older versions of CUDA; None without either."""
    try:
        package = importlib.import_module("nvtx")
    except ImportError:
        return _library_ranges()
    return Ranges(package.push_range, package.pop_range, "nvtx")


def _library_ranges() -> Ranges | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    push = library.nvtxRangePushA
    push.argtypes = (ctypes.c_char_p,)
    return Ranges(lambda name: push(name.encode()), library.nvtxRangePop, _LIBRARY)


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """What happens inside is shown under this name."""
    found = ranges()
    if found is None:
        yield
        return
    found.push(name)
    try:
        yield
    finally:
        found.pop()

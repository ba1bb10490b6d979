"""Memory that native code works on: mappings of their own, page-aligned."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import UnsupportedError

if sys.platform != "win32":
    import resource

Bytes = NDArray[np.uint8]
# Private: after a fork neither process sees what the other computes. Windows has no flags.
_PRIVATE = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)
_HUGE_BYTES = 1 << 21
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def allocate(size_bytes: int, *, huge: bool = False) -> Bytes:
    """Zeroed, page-aligned memory of its own mapping.

    Args:
        size_bytes: how much.
        huge: advise the system to back it with huge pages (fewer TLB misses on large weights).

    Raises:
        UnsupportedError: there is not so much.
    """
    try:
        mapping = mmap.mmap(-1, max(size_bytes, 1), **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise UnsupportedError(
            f"cannot get {size_bytes:,} bytes of memory",
            [str(error)],
            "give smaller inputs, or run where there is more memory",
        ) from error
    if huge and hasattr(mmap, "MADV_HUGEPAGE") and size_bytes >= _HUGE_BYTES:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


def limit_bytes() -> int:
    """The most memory that this process may ever use: what the machine has, or its limit."""
    if sys.platform == "win32":
        return sys.maxsize
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return most if soft == resource.RLIM_INFINITY else min(most, soft)


def give_back() -> None:
    """Has the C library give pages back that nobody uses; of another one than glibc, nothing.

    It keeps what is freed between two blocks that are in use, in each of its arenas: a process that
    loads and drops large things grows by that, for a while.
    """
    if _TRIM is not None:
        _TRIM(0)


def address(array: NDArray[Any]) -> int:
    """The address of an array's first element."""
    return int(array.__array_interface__["data"][0])


def with_slack(data: Bytes, slack_bytes: int) -> Bytes:
    """The same bytes at the start of a mapping that goes on for `slack_bytes` behind them.

    Args:
        data: uint8 [bytes]; if it is the start of such an `allocate`d block it is returned as it
            is, else copied.
        slack_bytes: that may be read beyond.
    """
    block = data.base
    if isinstance(block, np.ndarray) and _is_mapping(block) and address(block) == address(data):
        if block.nbytes >= data.nbytes + slack_bytes:
            return data
    copy = allocate(data.nbytes + slack_bytes, huge=True)[: data.nbytes]
    copy[:] = data
    return copy


def _is_mapping(block: NDArray[Any]) -> bool:
    """Whether an array is all of what `allocate` gave."""
    return isinstance(block.base, memoryview) and isinstance(block.base.obj, mmap.mmap)

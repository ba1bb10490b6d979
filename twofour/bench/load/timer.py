"""A timer of an event loop that is exact to some microseconds: the loop's own rounds up to 1 ms.

Source: Linux, timerfd_create(2).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable

_CLOCK_MONOTONIC, _ABSOLUTE = 1, 1


class Timer:
    """Calls back at a time of time.monotonic_ns, once for each time that it is set."""

    def __init__(self, callback: Callable[[], None]) -> None:
        """Belongs to the running loop.

        Raises:
            OSError: the system has no file descriptor left for it.
        """
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._when = (ctypes.c_long * 4)()  # interval s, ns; value s, ns
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._fired)

    def set(self, when_ns: int) -> None:
        """Replaces the time set before; one that has passed is due at once."""
        self._when[2], self._when[3] = divmod(max(when_ns, 1), 1_000_000_000)
        self._libc.timerfd_settime(self._fd, _ABSOLUTE, self._when, None)

    def close(self) -> None:
        """No call comes after this."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _fired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # set anew since
        self._callback()

"""Clients that do not read: how long one has taken nothing, and the end of its connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_AT_ONCE = struct.pack("ii", 1, 0)  # struct linger: on, for no seconds


def reset(transport: asyncio.Transport) -> None:
    """Closes a connection and drops what its client has not taken.

    After a plain close the kernel keeps that, megabytes a connection, and asks the client again and
    again whether it has room, for a minute and more.
    """
    found = transport.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):  # it is closed already
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    transport.abort()


class Unsent:
    """What waits in a transport for a client that reads slowly, or not at all."""

    def __init__(self) -> None:
        """Nothing waits yet."""
        self.bytes, self.since = 0, 0.0

    def begin(self, transport: asyncio.Transport, now: float) -> None:
        """From now on the socket takes nothing.

        Args:
            transport: of the connection.
            now: of the loop's clock.
        """
        self.bytes, self.since = transport.get_write_buffer_size(), now

    def check(self, transport: asyncio.Transport, now: float, most_s: float) -> None:
        """Resets the connection of a client that has taken nothing for so many seconds.

        Args:
            transport: of the connection.
            now: of the loop's clock.
            most_s: seconds.
        """
        left = transport.get_write_buffer_size()
        if left < self.bytes:
            self.bytes, self.since = left, now
        elif now - self.since > most_s:
            reset(transport)

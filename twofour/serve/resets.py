"""The end of a connection whose client does not read."""

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

"""What a client that never read finds when it looks, behind its end."""

from __future__ import annotations

import socket


def assert_dropped(client: socket.socket) -> None:
    """No more than its own kernel has: the server's keeps nothing for it."""
    taken, gone = 0, False
    while not gone:
        try:
            got = client.recv(1 << 16)
        except ConnectionResetError:
            gone = True
        else:
            assert got, "the server sent it to the end"
            taken += len(got)
    assert taken < 1 << 16

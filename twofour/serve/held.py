"""The memory that bodies take: counted over all connections of a server, of both protocols.

A body is counted as it is read, what it inflates to as it inflates, until its request is answered.
"""

from __future__ import annotations

import threading

from twofour.serve.errors import BusyError


class Held:
    """What all requests of a server hold; bodies are inflated in threads, so it has a lock.

    Attributes:
        bytes: that are held.
    """

    def __init__(self, most_bytes: int) -> None:
        """Nothing is held yet.

        Args:
            most_bytes: that may be.
        """
        self.bytes = 0
        self.most_bytes = most_bytes
        self.lock = threading.Lock()


class Share:
    """What one request holds of it.

    Attributes:
        bytes: that it holds.
    """

    __slots__ = ("_closed", "_held", "bytes")

    def __init__(self, held: Held) -> None:
        """Nothing yet."""
        self.bytes = 0
        self._held, self._closed = held, False

    def take(self, size: int) -> None:
        """Holds more.

        Raises:
            BusyError: the others leave no room, or nobody waits for the request any more.
        """
        held = self._held
        with held.lock:
            full = held.bytes + size > held.most_bytes
            if not (full or self._closed):
                held.bytes += size
                self.bytes += size
                return
        if not full:
            raise BusyError("the request has ended")
        taken = f"the bodies of other requests take {held.bytes} of {held.most_bytes} bytes"
        raise BusyError("the server has no room for the body", [taken], "try again later")

    def give(self, size: int) -> None:
        """Holds less, but not less than nothing."""
        with self._held.lock:
            size = min(size, self.bytes)
            self._held.bytes -= size
            self.bytes -= size

    def close(self) -> None:
        """Gives everything back; nothing is taken from now on."""
        with self._held.lock:
            self._held.bytes -= self.bytes
            self.bytes, self._closed = 0, True

"""What a client may send before the server has taken what came: windows, and room for messages.

    window + held <= STREAM_WINDOW + reserved        of each stream, in bytes

A stream may always hold `STREAM_WINDOW`. A larger message says its size in its prefix; room for it
is reserved in the connection's budget, where it waits for its turn, and only then its client may
send the rest. So what a connection holds is bounded, and a message that has room can be completed.

Source: RFC 9113, 5.2 and 6.9.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

STREAM_WINDOW = 1 << 18
CONNECTION_WINDOW = 1 << 24
"""Granted again as bytes come: streams bound what is held."""


class Budget:
    """Room for the large messages of one connection."""

    def __init__(self, size_bytes: int) -> None:
        """At least that of the largest message."""
        self._left = size_bytes
        self._waiting: deque[Inflow] = deque()

    def ask(self, flow: Inflow) -> None:
        """Reserves what a stream wants, now or when others have given theirs back."""
        self._waiting.append(flow)
        self._serve()

    def give_back(self, flow: Inflow) -> None:
        """Takes what a stream had reserved, or its wish."""
        if flow.reserved:
            self._left += flow.reserved
        elif flow.wanted:
            self._waiting.remove(flow)
        flow.reserved = flow.wanted = 0
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0].wanted <= self._left:
            flow = self._waiting.popleft()
            self._left -= flow.wanted
            flow.reserved = flow.wanted
            flow.granted()


class Inflow:
    """What one stream may send.

    Attributes:
        reserved: room beyond that of every stream.
        wanted: that was asked for.
        granted: is called when it is reserved.
    """

    def __init__(self, budget: Budget, granted: Callable[[], None]) -> None:
        """With the window that every stream has."""
        self.reserved = self.wanted = 0
        self.granted = granted
        self._budget = budget
        self._window, self._held = STREAM_WINDOW, 0

    @property
    def waits(self) -> bool:
        """Whether it asked for room that others have: its client may not go on."""
        return self.wanted > self.reserved

    def came(self, size: int, kept: int) -> bool:
        """Counts bytes that came, and those of them that are kept; False: too many came."""
        self._window -= size
        self._held += kept
        return self._window >= 0

    def took(self, size: int) -> None:
        """Counts a message that was taken, with its prefix."""
        self._held -= size
        if size > STREAM_WINDOW:
            self._budget.give_back(self)

    def need(self, size: int) -> None:
        """Asks for room for the message that comes next, of so many bytes with its prefix."""
        if size > STREAM_WINDOW and not self.wanted:
            self.wanted = size - STREAM_WINDOW
            self._budget.ask(self)

    def grant(self, missing: int) -> int:
        """Bytes to grant now, 0 for none.

        Args:
            missing: of the message that has begun.
        """
        room = STREAM_WINDOW + self.reserved - self._window - self._held
        if room <= 0 or (2 * room < STREAM_WINDOW and self._window >= missing):
            return 0
        self._window += room
        return room

    def close(self) -> None:
        """Gives back what was reserved."""
        if self.wanted:
            self._budget.give_back(self)

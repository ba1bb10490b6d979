"""What a connection sends: bytes within the windows of its client, in turns between its streams.

A stream whose client grants nothing keeps what it has to send, and the call waits with it; so does
every stream while the socket takes nothing.

Source: RFC 9113, 5.2 and 6.9.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from twofour.serve.grpc.frames import (
    DATA,
    FIRST_WINDOW,
    INITIAL_WINDOW,
    LEAST_FRAME_BYTES,
    MOST_FRAME,
    MOST_WINDOW,
    Code,
    ConnectionFault,
    head,
)

MOST_UNSENT_BYTES = 1 << 19
"""In the transport, before the socket counts as stuck."""
MOST_SENT_FRAME_BYTES = 1 << 17


class Outflow:
    """What one stream has to send.

    Attributes:
        number: of the stream.
        window: bytes that its client takes; may be below 0.
        parts: of its messages, that wait.
        after: frames behind them, that end it; b"": they do not come yet.
        since: when its last bytes went, on the loop's clock.
        drained: is called when nothing waits any more.
    """

    def __init__(self, number: int, window: int, drained: Callable[[], None]) -> None:
        """Of a stream that has sent nothing."""
        self.number, self.window, self.drained = number, window, drained
        self.parts: deque[memoryview] = deque()
        self.after = b""
        self.since = 0.0


class Outbox:
    """The sending side of a connection.

    Attributes:
        first_window: of streams to come, as the client has set it.
        stuck: the socket takes nothing.
        sent: frames of DATA.
    """

    def __init__(self, transport: asyncio.Transport, clock: Callable[[], float]) -> None:
        """Before the client's settings are known."""
        self._transport, self._clock = transport, clock
        self.first_window = self._window = FIRST_WINDOW
        self._frame_bytes = LEAST_FRAME_BYTES
        self._ready: dict[int, Outflow] = {}
        self.stuck = False
        self.sent = 0
        transport.set_write_buffer_limits(MOST_UNSENT_BYTES)

    def write(self, frames: bytes) -> None:
        """Sends frames that no window bounds."""
        self._transport.write(frames)

    def send(
        self, flow: Outflow, before: bytes, message: tuple[bytes, bytes], after: bytes
    ) -> bool:
        """Sends a message, or as much of it as there is room for; the rest follows.

        Args:
            flow: of its stream, in which nothing waits.
            before: frames before it.
            message: its prefix and its bytes.
            after: frames that end the stream; b"": it goes on.

        Returns:
            Whether all of it is on its way; otherwise `flow.drained` will be called.
        """
        size = len(message[0]) + len(message[1])
        if size <= min(self._window, flow.window, self._frame_bytes) and not self.stuck:
            self._window -= size
            flow.window -= size
            self.sent += 1
            lead = head(size, DATA, 0, flow.number)
            self._transport.write(b"".join((before, lead, *message, after)))
            return True
        if before:
            self._transport.write(before)
        prefix, body = message
        most = self._frame_bytes - len(prefix)
        flow.parts.append(memoryview(prefix + body[:most]))
        if len(body) > most:
            flow.parts.append(memoryview(body)[most:])
        flow.after, flow.since = after, self._clock()
        self.open(flow)
        self.pump()
        return not flow.parts

    def open(self, flow: Outflow) -> None:
        """A stream's window may have grown."""
        if flow.parts and flow.window > 0:
            self._ready[flow.number] = flow

    def pump(self) -> None:
        """Sends what there is room for, a frame of each stream in its turn."""
        while self._ready and self._window > 0 and not self.stuck:
            flow = self._ready.pop(next(iter(self._ready)))
            room = min(self._window, flow.window, self._frame_bytes)
            part = flow.parts.popleft()
            if len(part) > room:
                flow.parts.appendleft(part[room:])
                part = part[:room]
            size = len(part)
            self._window -= size
            flow.window -= size
            flow.since = self._clock()
            self.sent += 1
            self._transport.writelines([head(size, DATA, 0, flow.number), part])
            if flow.parts:
                self.open(flow)
            else:
                if flow.after:
                    self._transport.write(flow.after)
                flow.drained()

    def forget(self, flow: Outflow) -> None:
        """Drops what a stream has to send."""
        self._ready.pop(flow.number, None)
        flow.parts.clear()

    def grow(self, more: int) -> None:
        """The client takes more bytes on all streams together.

        Raises:
            ConnectionFault: more than there can be.
        """
        self._window += more
        if self._window > MOST_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "the window is too large")
        self.pump()

    def set(self, pairs: Iterable[tuple[int, int]], flows: Iterable[Outflow]) -> None:
        """Applies the client's settings, also to the streams that are open.

        Raises:
            ConnectionFault: a window gets larger than there can be.
        """
        flows = list(flows)
        for key, value in pairs:
            if key == MOST_FRAME:
                self._frame_bytes = min(value, MOST_SENT_FRAME_BYTES)
            elif key == INITIAL_WINDOW:
                more, self.first_window = value - self.first_window, value
                for flow in flows:
                    flow.window += more
                    if flow.window > MOST_WINDOW:
                        raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "a window is too large")
                    if flow.window <= 0:
                        self._ready.pop(flow.number, None)
                    self.open(flow)
        self.pump()

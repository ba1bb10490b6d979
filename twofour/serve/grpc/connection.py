"""One connection of HTTP/2, as far as gRPC needs it of a server: frames in, calls served.

    preface --> open --> closing (the client has been told why; the rest is dropped) --> closed

What a client may send is bounded before it is kept: frames, header blocks, calls at a time, the
bytes of messages (`flow`), and by `Allowance` what costs it nothing. Nothing is read while the
socket takes no answers.

Source: RFC 9113; CVE-2023-44487 (rapid reset), CVE-2024-27316 (endless CONTINUATION), CVE-2025-8671
(resets that a client makes the server send).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from twofour.serve.errors import BusyError
from twofour.serve.grpc import frames
from twofour.serve.grpc.allowance import (
    IDLE_FRAMES,
    IDLE_FRAMES_PER_S,
    Allowance,
)
from twofour.serve.grpc.call import Link, Served, ServerCall
from twofour.serve.grpc.calls import MOST_CALLS, Calls
from twofour.serve.grpc.flow import CONNECTION_WINDOW, STREAM_WINDOW, Budget
from twofour.serve.grpc.frames import (
    ACK,
    HEAD_BYTES,
    PING,
    PREFACE,
    SETTINGS,
    Code,
    ConnectionFault,
    StreamFault,
)
from twofour.serve.grpc.outbox import Outbox
from twofour.serve.grpc.timeouts import Timeouts
from twofour.serve.held import Held
from twofour.serve.limits import Limits
from twofour.serve.resets import Unsent, reset

FRAME_BYTES = 1 << 18
DRAIN_S = 1.0
"""For the answer to the ping that follows the first GOAWAY."""
_DRAIN, _ALIVE = b"draining", b"alive???"
_NOT_HTTP_2 = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nconnection: close\r\n"
    b"content-type: text/plain\r\n\r\nthis port speaks gRPC, over HTTP/2\n"
)


@dataclass(eq=False)
class Shared:
    """What the connections of a server have in common.

    Attributes:
        served: methods by their paths.
        limits: of a message, and of a header block.
        compression: of answers, for clients that take it.
        timeouts: of a client.
        most: connections at once; one more is closed as it comes.
        held: what messages take.
        connections: that are open.
        draining: the server stops.
    """

    served: Mapping[str, Served]
    limits: Limits
    compression: str
    timeouts: Timeouts
    most: int
    held: Held
    connections: set[Connection] = field(default_factory=set)
    draining: bool = False


class Connection(asyncio.Protocol):
    """Reads frames, and begins, feeds and ends calls."""

    def __init__(self, shared: Shared, loop: asyncio.AbstractEventLoop) -> None:
        """Ready for `loop` to call.

        Args:
            shared: with the other connections.
            loop: that runs all of them.
        """
        self.shared, self.loop = shared, loop
        self.transport: asyncio.Transport
        self.outbox: Outbox
        self.calls: Calls
        self.state, self.since = "preface", loop.time()
        self.heard, self.asked = self.since, 0.0
        self.unread = bytearray()
        self.needed = len(PREFACE)
        self.settled = False
        self.unsent = Unsent()
        self.drain_began: float | None = None
        self.idle = Allowance("frames that do nothing", IDLE_FRAMES, IDLE_FRAMES_PER_S)
        self.sent = 0
        self.takers: tuple[Callable[[int, int, bytes], None], ...] = ()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client is there."""
        self.transport = cast(asyncio.Transport, transport)
        self.outbox = Outbox(self.transport, self.loop.time)
        shared, limits = self.shared, self.shared.limits
        budget = Budget(2 * limits.body_bytes)
        link = Link(
            self.loop, self.outbox, budget, shared.held, limits, shared.compression, self.left
        )
        self.calls = Calls(link, shared.served, self.idle)
        self.takers = (
            self.calls.on_data,
            self.calls.on_headers,
            self.calls.on_priority,
            self.calls.on_reset,
            self.on_settings,
            self.on_push_promise,
            self.on_ping,
            self.on_goaway,
            self.on_window_update,
            self.calls.on_continuation,
        )
        self.shared.connections.add(self)
        if len(self.shared.connections) > self.shared.most:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone: nobody waits for its calls any more."""
        self.state = "closed"
        self.shared.connections.discard(self)
        self.calls.end()

    def pause_writing(self) -> None:
        """The client reads its answers too slowly: what it sends waits too."""
        self.outbox.stuck = True
        self.unsent.begin(self.transport, self.loop.time())
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It has read enough."""
        self.outbox.stuck = False
        if not self.transport.is_closing():
            self.transport.resume_reading()
        self.heard = self.loop.time()
        for call in self.calls.open.values():  # of which nothing was read meanwhile
            call.heard = self.heard
        self.outbox.pump()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self.state in ("closing", "closed"):
            return
        self.heard = self.calls.now = self.loop.time()
        self.asked = 0.0
        if self.unread:
            self.unread += data
            if len(self.unread) < self.needed:
                return
            data = bytes(self.unread)
            self.unread.clear()
        try:
            at = self.begin(data) if self.state == "preface" else 0
            at = self.read(data, at)
        except ConnectionFault as fault:
            self.fail(fault)
        else:
            if at < len(data) and self.state != "closing":
                self.unread += data[at:] if at else data

    # Reading.

    def begin(self, data: bytes) -> int:
        """Reads the preface, as far as it is there; where the frames begin."""
        if not PREFACE.startswith(data[: len(PREFACE)]):
            if data[:1].isalpha():
                self.transport.write(_NOT_HTTP_2)
                self.hang_up()
                return 0
            raise ConnectionFault(Code.PROTOCOL_ERROR, "no preface of HTTP/2")
        if len(data) < len(PREFACE):
            return 0
        self.state = "open"
        pairs = (
            (frames.MOST_STREAMS, MOST_CALLS),
            (frames.INITIAL_WINDOW, STREAM_WINDOW),
            (frames.MOST_FRAME, FRAME_BYTES),
            (frames.MOST_HEADERS, self.shared.limits.head_bytes),
        )
        more = frames.window_update(0, CONNECTION_WINDOW - frames.FIRST_WINDOW)
        self.transport.write(frames.settings(pairs) + more)
        if self.shared.draining:
            self.drain()
        return len(PREFACE)

    def read(self, data: bytes, at: int) -> int:
        """Reads whole frames from a place on; where the first that is not whole begins.

        Raises:
            ConnectionFault: the client broke the rules.
        """
        size = len(data)
        self.needed = HEAD_BYTES if self.state == "open" else len(PREFACE)
        while size - at >= HEAD_BYTES and self.state == "open":
            length, kind, flags, number = frames.read_head(data, at)
            if length > FRAME_BYTES:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a frame is too large")
            end = at + HEAD_BYTES + length
            if end > size:
                self.needed = end - at
                break
            if (self.calls.block is not None and kind != frames.CONTINUATION) or not self.settled:
                self.require_order(kind, flags)
            try:
                if kind < len(self.takers):
                    self.takers[kind](flags, number, data[at + HEAD_BYTES : end])
                else:
                    self.idle.spend(self.heard)
            except StreamFault as fault:
                self.calls.reset(fault)
            at = end
        return at

    def require_order(self, kind: int, flags: int) -> None:
        """Settings come first, and nothing comes within a header block."""
        if self.calls.block is not None and kind != frames.CONTINUATION:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a frame within a header block")
        if kind != SETTINGS or flags & ACK:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame is no SETTINGS")
        self.settled = True

    def on_settings(self, flags: int, number: int, payload: bytes) -> None:
        """SETTINGS."""
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & ACK:
            if payload:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "an ACK of SETTINGS with settings")
            self.idle.spend(self.heard)
            return
        pairs = frames.read_settings(payload)
        for _ in range(1 + len(pairs)):
            self.idle.spend(self.heard)
        self.outbox.write(frames.frame(SETTINGS, ACK, 0))
        self.outbox.set(pairs, [call.out for call in self.calls.open.values()])

    def on_ping(self, flags: int, number: int, payload: bytes) -> None:
        """PING."""
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PING of a stream")
        if len(payload) != 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "PING of another size")
        self.idle.spend(self.heard)
        if not flags & ACK:
            self.outbox.write(frames.frame(PING, ACK, 0, payload))
        elif payload == _DRAIN:
            self.drain_for_good()

    def on_window_update(self, flags: int, number: int, payload: bytes) -> None:
        """WINDOW_UPDATE: the client takes more."""
        more = frames.read_number(payload)
        self.idle.earn(4 * (self.outbox.sent - self.sent))
        self.sent = self.outbox.sent
        self.idle.spend(self.heard)
        if number:
            self.calls.grow(number, more)
        elif more:
            self.outbox.grow(more)
        else:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a window grows by nothing")

    def on_goaway(self, flags: int, number: int, payload: bytes) -> None:
        """GOAWAY: the client begins no further call, and may go on with those it has."""
        if number or len(payload) < 8:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "GOAWAY that is none")
        self.idle.spend(self.heard)

    def on_push_promise(self, flags: int, number: int, payload: bytes) -> None:
        """PUSH_PROMISE, which no client sends."""
        raise ConnectionFault(Code.PROTOCOL_ERROR, "PUSH_PROMISE of a client")

    # The end of calls, and of the connection.

    def left(self, call: ServerCall) -> None:
        """A call has ended; the last one of a server that stops ends the connection."""
        self.calls.left(call)
        if self.calls.closed_to_more and not self.calls.open and self.state == "open":
            self.hang_up()

    def fail(self, fault: ConnectionFault) -> None:
        """Ends the connection: the client reads why."""
        self.transport.write(frames.goaway(self.calls.last, fault.code, fault.text))
        self.hang_up()

    def hang_up(self) -> None:
        """Ends the connection so that what was sent can be read.

        Closing a socket with unread bytes resets it, and what was sent with it: what the client
        still sends is read and dropped for a while.
        """
        self.state, self.since = "closing", self.loop.time()
        self.unread.clear()
        self.calls.end()
        if self.transport.can_write_eof():
            with contextlib.suppress(OSError):
                self.transport.write_eof()

    def drain(self) -> None:
        """The server stops: calls that are on their way are still served.

        The first GOAWAY names no stream. When its ping comes back nothing is on its way any more,
        and the second one names the last.
        """
        if self.state != "open":
            self.transport.close()
        elif self.drain_began is None:
            self.drain_began = self.loop.time()
            self.outbox.write(frames.goaway(frames.MOST_WINDOW, Code.NO_ERROR))
            self.outbox.write(frames.frame(PING, 0, 0, _DRAIN))

    def drain_for_good(self) -> None:
        """No call that begins now is served."""
        if self.drain_began is None or self.calls.closed_to_more:
            return
        self.calls.closed_to_more = True
        self.outbox.write(frames.goaway(self.calls.last, Code.NO_ERROR))
        if not self.calls.open:
            self.hang_up()

    def cut(self) -> None:
        """The server stops now: calls that are left end with UNAVAILABLE."""
        for call in tuple(self.calls.open.values()):
            call.refuse(BusyError("the server stops"))
        self.transport.close()

    def check(self, now: float) -> None:
        """Ends calls and connection whose client is too slow, and asks whether it is there.

        Args:
            now: of the loop's clock.
        """
        timeouts = self.shared.timeouts
        if self.outbox.stuck:
            self.unsent.check(self.transport, now, timeouts.write_s)
        elif self.state == "closing":
            if now - self.since > timeouts.linger_s:
                self.transport.close()
        elif not self.settled or self.calls.block is not None:
            since = self.since if not self.settled else self.calls.block_began
            if now - since > timeouts.begin_s:
                self.fail(ConnectionFault(Code.SETTINGS_TIMEOUT, "the client takes too long"))
        else:
            self.check_calls(now)

    def check_calls(self, now: float) -> None:
        """As `check`, of an open connection."""
        timeouts = self.shared.timeouts
        for call in tuple(self.calls.open.values()):
            if call.stalls(now, timeouts.message_s, timeouts.write_s):
                self.outbox.write(frames.reset(call.number, Code.CANCEL))
                call.abandon()
        if self.asked:
            if now - self.asked > timeouts.alive_s:
                reset(self.transport)
        elif now - self.heard > timeouts.quiet_s:
            self.asked = now
            self.outbox.write(frames.frame(PING, 0, 0, _ALIVE))
        if self.drain_began is not None and now - self.drain_began > DRAIN_S:
            self.drain_for_good()

"""One connection of HTTP/1.1: bytes in, requests one after another, replies in their order.

    reading:  idle --> head --> body --> (waiting) --> idle      refused for good: closing
    replying: one request at a time; the next begins when the reply is with the transport

What a client may send is bounded before it is kept: the head by `Limits.head_bytes`, the body by
`Limits.body_bytes`, requests behind an unanswered one by `MOST_WAITING` and what one slice held.

The parser is llhttp in its strict mode. Source: RFC 9112; RFC 9110, 10.1.1 (Expect), 7.8 (Upgrade,
which is ignored).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import cast

import httptools

from twofour.serve.errors import BusyError, ServeError
from twofour.serve.held import Held, Share
from twofour.serve.http.api import Api
from twofour.serve.http.head import (
    ONCE,
    ambiguous,
    body_too_large,
    head_too_large,
    not_http,
    refusal,
    request_id,
)
from twofour.serve.http.messages import Reply, Request, error_reply, written
from twofour.serve.http.timeouts import Timeouts
from twofour.serve.limits import Limits
from twofour.serve.resets import Unsent

SLICE_BYTES = 1 << 16
"""The parser gets at most so many bytes at once, so that few requests can wait for their turn."""
QUIET_S = 0.5
"""A server that stops closes connections that had no request for so long, and answers requests
that were on their way when it began to."""
SMALL_BYTES = 512
"""Parts of a body below that are put together: each by itself takes more than its bytes."""
MOST_WAITING = 8
"""Requests behind an unanswered one, from which on the socket is not read."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(eq=False)
class Shared:
    """What the connections of a server have in common.

    Attributes:
        api: answers requests.
        limits: of a request.
        timeouts: of a client.
        most: connections at once; one more is closed as it comes.
        held: what bodies take that are being read, wait or are computed.
        connections: that are open.
        drain_began: when the server began to stop, on the loop's clock; None: it does not. From
            then on a reply that nothing waits behind is its connection's last.
    """

    api: Api
    limits: Limits
    timeouts: Timeouts
    most: int
    held: Held
    connections: set[Connection] = field(default_factory=set)
    drain_began: float | None = None


class Connection(asyncio.Protocol):
    """Reads requests, has them answered, writes replies."""

    def __init__(self, shared: Shared, loop: asyncio.AbstractEventLoop) -> None:
        """Ready for `loop` to call.

        Args:
            shared: with the other connections.
            loop: that runs all of them.
        """
        self.shared = shared
        self.loop = loop
        self.limits = shared.limits
        self.transport: asyncio.Transport
        self.parser = httptools.HttpRequestParser(self)
        self.waiting: deque[Request] = deque()
        self.waiting_bytes = 0
        self.active: Request | None = None
        self.task: asyncio.Task[Reply] | None = None
        self.unread: memoryview | None = None
        self.paused = self.stuck = False
        self.unsent = Unsent()
        self.begin_request()

    @property
    def full(self) -> bool:
        """Enough requests wait; while that is so a client that hangs up is not noticed."""
        return len(self.waiting) >= MOST_WAITING or self.waiting_bytes > SLICE_BYTES

    def begin_request(self) -> None:
        """Ready for the next head."""
        self.state = "idle"
        self.since = self.loop.time()
        self.head_bytes = 0
        self.counts_head = False
        self.target = b""
        self.headers: dict[str, str] = {}
        self.offers_upgrade = False
        self.broken: ServeError | None = None
        self.parts: list[bytes | bytearray] = []
        self.body_bytes = 0
        self.request: Request | None = None

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client is there."""
        self.transport = cast(asyncio.Transport, transport)
        self.shared.connections.add(self)
        if len(self.shared.connections) > self.shared.most:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone: nobody waits for its request any more."""
        self.state = "closed"
        self.unread = None
        self.shared.connections.discard(self)
        self.forget(self.request, self.active, *self.waiting)
        self.waiting.clear()
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self.state == "closing":
            return
        if self.unread is None and not (self.waiting and self.full) and len(data) <= SLICE_BYTES:
            self.feed(data)
        else:
            before = b"" if self.unread is None else bytes(self.unread)
            self.unread = memoryview(before + data)
        self.go_on()

    def pause_writing(self) -> None:
        """The client reads its replies too slowly."""
        self.stuck = True
        self.unsent.begin(self.transport, self.loop.time())

    def resume_writing(self) -> None:
        """It has read enough."""
        self.stuck = False
        self.go_on()

    # Reading. The parser calls the methods on_...

    def feed(self, data: bytes | memoryview) -> None:
        """Gives bytes to the parser, and counts those of a head that has not ended."""
        if self.state == "idle":
            self.state, self.since = "head", self.loop.time()
        self.counts_head = True
        body_bytes = self.body_bytes
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.pass_over_upgrade()
            rest = bytes(memoryview(data)[upgrade.args[0] :]) + bytes(self.unread or b"")
            self.unread = memoryview(rest) if rest else None
            return
        except httptools.HttpParserCallbackError:
            if self.broken is None:
                raise
            self.refuse(self.broken)
            return
        except httptools.HttpParserError as error:
            self.refuse(not_http(error))
            return
        if self.state == "body":  # trailers, and extensions of chunks: a body that does not grow
            grows = self.body_bytes != body_bytes
            self.head_bytes = 0 if grows else self.head_bytes + len(data)
        elif self.state == "head" and self.counts_head:
            self.head_bytes += len(data)
        else:
            return
        if self.head_bytes > self.limits.head_bytes:
            self.refuse(head_too_large(self.limits))

    def pass_over_upgrade(self) -> None:
        """Goes on with a request that offers another protocol as if it did not.

        The parser takes what follows such a head for that protocol, a body too. So another parser
        gets a head that says where this body ends, and nothing else.
        """
        request = cast(Request, self.request)
        self.offers_upgrade = False
        self.parser = httptools.HttpRequestParser(self)
        lines = [
            f"{name}: {request.headers[name]}\r\n"
            for name in ("content-length", "transfer-encoding")
            if name in request.headers
        ]
        head = f"POST / HTTP/1.1\r\nhost: a\r\n{''.join(lines)}\r\n"
        self.parser.feed_data(head.encode("latin-1"))

    def on_message_begin(self) -> None:
        """A request line begins."""
        if self.state == "idle":
            self.state = "head"

    def on_url(self, url: bytes) -> None:
        """The next part of the target."""
        if self.request is None:
            self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; or a trailer behind chunks, which is ignored."""
        if self.request is not None:
            return
        key, text = name.lower().decode("latin-1"), value.decode("latin-1")
        if key in self.headers:
            if key in ONCE:
                self.broken = ambiguous(f"the header {key} is there twice")
            text = f"{self.headers[key]}, {text}"
        self.headers[key] = text

    def on_headers_complete(self) -> None:
        """The head is there: what can be refused now is, before the body is kept."""
        if self.request is not None:
            return
        headers = self.headers
        method, version = self.parser.get_method().decode(), self.parser.get_http_version()
        request = Request(method, self.target, headers, request_id(headers))
        request.last = version != "1.1" or not self.parser.should_keep_alive()
        request.share = Share(self.shared.held)
        self.request = request
        self.state, self.since = "body", self.loop.time()
        self.head_bytes = 0
        self.broken = self.broken or refusal(request, version, self.limits)
        if self.broken is not None:
            raise self.broken
        self.offers_upgrade = self.parser.should_upgrade()
        try:
            self.shared.api.admit(request)
        except ServeError as error:
            request.refused = error
        if version == "1.1" and "expect" in headers:
            self.broken = request.refused
            if self.broken is not None:
                raise self.broken
            request.expects = True

    def on_body(self, body: bytes) -> None:
        """The next part of the body; of a refused request it is dropped."""
        self.body_bytes += len(body)
        if self.body_bytes > self.limits.body_bytes:
            self.broken = body_too_large(self.limits)
            raise self.broken
        request = cast(Request, self.request)
        if request.refused is not None:
            return
        share = cast(Share, request.share)
        try:
            share.take(len(body))
        except BusyError as error:
            request.refused = error
            share.close()
            self.parts.clear()
            return
        if len(body) < SMALL_BYTES and self.parts and type(self.parts[-1]) is bytearray:
            self.parts[-1] += body
        else:
            self.parts.append(bytearray(body) if len(body) < SMALL_BYTES else body)

    def on_message_complete(self) -> None:
        """All of a request is there."""
        if self.offers_upgrade:
            return
        request = cast(Request, self.request)
        one = len(self.parts) == 1
        request.body = self.parts[0] if one else b"".join(self.parts)
        request.arrived_ns = time.perf_counter_ns()
        request.expects = False
        self.begin_request()
        self.waiting.append(request)
        self.waiting_bytes += len(request.body)

    def refuse(self, error: ServeError) -> None:
        """The rest of what the client sends cannot be understood: its last reply says why."""
        request = self.request or Request("GET", b"", {}, request_id({}))
        request.refused, request.last = error, True
        self.forget(request)
        self.state, self.unread, self.parts = "closing", None, []
        self.waiting.append(request)

    # Answering.

    def go_on(self) -> None:
        """Does what can be done: begins the next request, or parses what was read."""
        while self.state != "closed":
            if self.waiting and self.active is None and not self.stuck:
                request = self.waiting.popleft()
                self.waiting_bytes -= len(request.body)
                self.begin(request)
            elif self.unread is not None and not self.full:
                part, rest = self.unread[:SLICE_BYTES], self.unread[SLICE_BYTES:]
                self.unread = rest if len(rest) else None
                self.feed(part)
            else:
                break
        if self.request is not None and self.request.expects and self.active is None:
            self.request.expects = False
            self.transport.write(CONTINUE)
        pauses = self.unread is not None or (bool(self.waiting) and self.full)
        if pauses != self.paused and not self.transport.is_closing():
            self.paused = pauses
            if pauses:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def begin(self, request: Request) -> None:
        """Has one request answered."""
        self.active = request
        if request.refused is not None:
            self.reply(request, error_reply(request.refused))
            return
        self.task = self.loop.create_task(self.shared.api.answer(request))
        self.task.add_done_callback(self.answered)

    def answered(self, task: asyncio.Task[Reply]) -> None:
        """The task has ended, in whichever way; of a client that has gone it was cancelled."""
        self.task = None
        if self.state == "closed" or self.active is None:
            if not task.cancelled():
                task.exception()
            return
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        request = self.active
        reply = task.result() if error is None else self.shared.api.failed(request, error)
        self.reply(request, reply)
        self.go_on()

    def reply(self, request: Request, reply: Reply) -> None:
        """Gives a reply to the transport; a client that reads it finds its body's room free."""
        if self.shared.drain_began is not None:
            nothing_comes = self.state == "idle" and not self.waiting and self.unread is None
            request.last = request.last or nothing_comes
        buffers = written(reply, request)
        self.forget(request)
        if len(buffers) == 1:
            self.transport.write(buffers[0])
        else:
            self.transport.writelines(buffers)
        self.active = None
        self.since = self.loop.time()
        if request.last:
            self.close_after_reply()

    # The end.

    def close_after_reply(self) -> None:
        """Ends the connection so that its client can read the last reply.

        Closing a socket with unread bytes resets it, and the reply with it: what the client still
        sends is read and dropped for a while.
        """
        lingers = self.state != "idle" or self.unread is not None
        self.state, self.unread = "closing", None
        self.forget(*self.waiting)
        self.waiting.clear()
        self.waiting_bytes = 0
        if not lingers:
            self.transport.close()
        elif self.transport.can_write_eof():
            with contextlib.suppress(OSError):
                self.transport.write_eof()

    def forget(self, *requests: Request | None) -> None:
        """Bodies of these are not kept any more."""
        for request in requests:
            if request is not None and request.share is not None:
                request.share.close()

    def finish(self, now: float) -> None:
        """The server drains: closes what waits for a request, and has for `QUIET_S` since then."""
        began = max(self.since, self.shared.drain_began or now)
        if self.active is None and not self.waiting and self.state == "idle":
            if now - began >= QUIET_S:
                self.transport.close()

    def check(self, now: float) -> None:
        """Ends the connection if its client is too slow.

        Args:
            now: of the loop's clock.
        """
        timeouts = self.shared.timeouts
        if self.stuck:
            self.unsent.check(self.transport, now, timeouts.write_s)
        elif self.active is None and not self.waiting:
            most_s = {
                "idle": timeouts.idle_s,
                "head": timeouts.head_s,
                "body": self.limits.body_s,
                "closing": timeouts.linger_s,
            }
            if now - self.since > most_s[self.state]:
                self.transport.close()

"""The calls of one connection: what the frames of streams do to them.

Source: RFC 9113, 5.1 (states of streams), 6.1 to 6.4, 6.10, 8.1; CVE-2023-44487 (rapid reset),
CVE-2024-27316 (endless CONTINUATION), CVE-2025-8671 (resets that a client makes the server send).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from twofour.serve.errors import ServeError
from twofour.serve.grpc import frames
from twofour.serve.grpc.allowance import RESETS, RESETS_PER_S, Allowance
from twofour.serve.grpc.call import Link, Served, ServerCall
from twofour.serve.grpc.flow import CONNECTION_WINDOW
from twofour.serve.grpc.frames import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    Code,
    ConnectionFault,
    StreamFault,
)
from twofour.serve.grpc.headers import Head, HeadReader, answer, http_status, trailers
from twofour.serve.grpc.status import STATUS, text_of

MOST_CALLS = 512
MOST_TASKS = 2 * MOST_CALLS
"""Handlers at a time, with those of calls that have ended: a client that cancels calls, and begins
others at once, waits for them too."""
MOST_CONTINUATIONS = 64
MOST_ABANDONED = 2048
"""Streams that the server ended first, of which frames may still be on their way."""
RAPID_S = 0.1
"""A client that cancels calls so soon is counted."""


class Calls:
    """Begins, feeds and ends calls, and refuses frames of streams that are none.

    Attributes:
        open: calls by the numbers of their streams.
        last: number of the last stream that began.
        now: when the frames came, on the loop's clock.
        block: the header block that has begun, which no other frame may interrupt; None: none has.
        block_began: when it did.
        closed_to_more: calls that begin from now on are not answered.
    """

    def __init__(self, link: Link, served: Mapping[str, Served], idle: Allowance) -> None:
        """Before the first.

        Args:
            link: that the calls have in common.
            served: methods by their paths.
            idle: of the connection, for frames that do nothing.
        """
        self.link, self.served, self.idle = link, served, idle
        self.outbox, self.open = link.outbox, link.calls
        self.last, self.now = 0, 0.0
        self.block: bytearray | None = None
        self.block_began = 0.0
        self.closed_to_more = False
        self._heads = HeadReader(link.limits)
        self._block_of, self._block_flags, self._continuations = 0, 0, 0
        self._window = CONNECTION_WINDOW
        self._abandoned: dict[int, None] = {}
        self._resets = Allowance("cancelled calls", RESETS, RESETS_PER_S)

    def on_data(self, flags: int, number: int, payload: bytes) -> None:
        """DATA."""
        size = len(payload)
        self._window -= size
        if self._window < 0:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "more data than the window has")
        if 2 * self._window < CONNECTION_WINDOW:
            self.outbox.write(frames.window_update(0, CONNECTION_WINDOW - self._window))
            self._window = CONNECTION_WINDOW
        data = frames.content(flags & PADDED, payload) if flags & PADDED else payload
        call = self.open.get(number)
        if call is None:
            self.require_abandoned(number, free=bool(data))
            return
        if call.half_closed:
            raise StreamFault(Code.STREAM_CLOSED, number)
        last = bool(flags & END_STREAM)
        if not data and not last:
            self.idle.spend(self.now)
        call.receive(size, data, last)

    def on_headers(self, flags: int, number: int, payload: bytes) -> None:
        """HEADERS: a call begins, or its client has sent all."""
        if number % 2 == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a stream of no client")
        block = frames.content(flags, payload)
        if len(block) > self.link.limits.head_bytes:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "a header block that is too long")
        if flags & END_HEADERS:
            self.on_block(flags, number, block)
            return
        self.block, self._block_of, self._block_flags = bytearray(block), number, flags
        self._continuations, self.block_began = 0, self.now

    def on_continuation(self, flags: int, number: int, payload: bytes) -> None:
        """CONTINUATION: more of a header block."""
        if self.block is None or number != self._block_of:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        self.block += payload
        self._continuations += 1
        too_long = len(self.block) > self.link.limits.head_bytes
        if too_long or self._continuations > MOST_CONTINUATIONS:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "a header block without an end")
        if flags & END_HEADERS:
            block, self.block = bytes(self.block), None
            self.on_block(self._block_flags, number, block)

    def on_block(self, flags: int, number: int, block: bytes) -> None:
        """A whole header block; each is read, for the table that they share."""
        head = self._heads.read(block)
        last = bool(flags & END_STREAM)
        call = self.open.get(number)
        if call is not None:
            if not last or call.half_closed:
                raise StreamFault(Code.STREAM_CLOSED, number)
            call.receive(0, b"", last)
        elif number <= self.last:
            self.require_abandoned(number)
        elif not self.closed_to_more:
            self.last = number
            self.begin(number, head, last)

    def begin(self, number: int, head: Head, last: bool) -> None:
        """Begins a call.

        Raises:
            StreamFault: it breaks the rules, or there are too many.
        """
        if head.fault:
            raise StreamFault(Code.PROTOCOL_ERROR, number)
        if len(self.open) >= MOST_CALLS or len(self.link.tasks) >= MOST_TASKS:
            raise StreamFault(Code.REFUSED_STREAM, number)
        served = self.served.get(head.path)
        if head.status != 200 or head.refusal is not None or served is None:
            self.idle.spend(self.now)
            self.refuse(number, head, last)
            return
        try:
            served.admit(head.headers)
        except ServeError as e:
            self.idle.spend(self.now)
            self.refuse(number, replace(head, refusal=(e.code, text_of(e))), last)
            return
        self.idle.earn(4)
        call = self.open[number] = ServerCall(self.link, number, head, served)
        if last:
            call.receive(0, b"", last)

    def refuse(self, number: int, head: Head, last: bool) -> None:
        """Answers what is no call of a method that is served."""
        if head.status != 200:
            block = http_status(head.status)
        else:
            code, text = head.refusal or ("UNIMPLEMENTED", "there is no such method")
            block = trailers_only(code, text)
        flags = END_HEADERS | END_STREAM
        self.outbox.write(frames.frame(HEADERS, flags, number, block))
        if not last:
            self.outbox.write(frames.reset(number, Code.NO_ERROR))
            self.abandon(number)

    def on_reset(self, flags: int, number: int, payload: bytes) -> None:
        """RST_STREAM: the client wants no answer."""
        frames.read_number(payload)
        self.require_known(number)
        call = self.open.get(number)
        if call is None:
            self.idle.spend(self.now)
            return
        if self.now - call.began < RAPID_S:
            self._resets.spend(self.now)
        call.half_closed = True
        call.abandon()

    def grow(self, number: int, more: int) -> None:
        """WINDOW_UPDATE of a stream: its client takes more."""
        self.require_known(number)
        if not more:
            raise StreamFault(Code.PROTOCOL_ERROR, number)
        call = self.open.get(number)
        if call is not None:
            call.out.window += more
            if call.out.window > frames.MOST_WINDOW:
                raise StreamFault(Code.FLOW_CONTROL_ERROR, number)
            self.outbox.open(call.out)
            self.outbox.pump()

    def on_priority(self, flags: int, number: int, payload: bytes) -> None:
        """PRIORITY, which says nothing any more."""
        if not number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PRIORITY of no stream")
        self.idle.spend(self.now)
        if len(payload) != 5:
            raise StreamFault(Code.FRAME_SIZE_ERROR, number)

    def require_known(self, number: int) -> None:
        """Refuses frames of streams that have not begun."""
        if number > self.last or number % 2 == 0:
            if not (self.closed_to_more and number % 2):
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a frame of a stream that is none")

    def require_abandoned(self, number: int, *, free: bool = False) -> None:
        """Refuses data and headers of streams that have not begun, or that the client ended.

        Args:
            number: of the stream.
            free: data that was on its way, which windows bound.
        """
        self.require_known(number)
        if not free:
            self.idle.spend(self.now)
        if number not in self._abandoned and number <= self.last:
            raise ConnectionFault(Code.STREAM_CLOSED, "a frame of a stream that has ended")

    def left(self, call: ServerCall) -> None:
        """A call has ended."""
        del self.open[call.number]
        if not call.half_closed:
            self.abandon(call.number)

    def abandon(self, number: int) -> None:
        """Frames of a stream may still come."""
        self._abandoned[number] = None
        if len(self._abandoned) > MOST_ABANDONED:
            del self._abandoned[next(iter(self._abandoned))]

    def reset(self, fault: StreamFault) -> None:
        """Ends a stream whose client broke a rule."""
        try:
            self._resets.spend(self.now)
        finally:
            self.outbox.write(frames.reset(fault.stream, fault.code))
            call = self.open.get(fault.stream)
            if call is not None:
                call.abandon()
            self.abandon(fault.stream)

    def end(self) -> None:
        """Cancels what is left."""
        for call in tuple(self.open.values()):
            call.abandon()


def trailers_only(code: str, text: str) -> bytes:
    """The block of an answer without messages, by the name of its status."""
    return answer("identity") + trailers(STATUS[code], text)

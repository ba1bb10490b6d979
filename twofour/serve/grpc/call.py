"""One call: what its handler reads and writes, its deadline, its end.

    unary    the handler begins when the request is whole; its answer goes out in one piece
    streams  the handler begins with the call, reads messages as they come, and writes them

A call ends once: with the handler's status, with its deadline, or with its client's or its
connection's end, which cancel the handler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from twofour.serve.errors import BusyError, ServeError, UnimplementedError
from twofour.serve.grpc.flow import Budget, Inflow
from twofour.serve.grpc.frames import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Code,
    StreamFault,
    frame,
    reset,
    window_update,
)
from twofour.serve.grpc.headers import Head, answer, trailers
from twofour.serve.grpc.messages import PREFIX, Messages, prefixed
from twofour.serve.grpc.outbox import Outbox, Outflow
from twofour.serve.grpc.status import STATUS, failed, text_of
from twofour.serve.held import Held, Share
from twofour.serve.limits import Limits
from twofour.serve.models.instances import clock_ns
from twofour.serve.protocol.content_encoding import deflate
from twofour.serve.service import Call

LOG = logging.getLogger(__name__)
LONGEST_S = 1e9
LARGE_BYTES = 1 << 17
"""From so many bytes on a message is compressed, or inflated, in a thread."""
_OK = trailers(0)
_ANSWERS = {name: answer(name) for name in ("identity", "deflate", "gzip")}


@dataclass(frozen=True, slots=True)
class Served:
    """A method that is served.

    Attributes:
        name: for the log.
        handler: of (bytes, call) where the client sends one message, otherwise of (call); what it
            returns is the answer where the server sends one message.
        many: messages that (the client, the server) may send.
        admit: raises ServeError where the metadata does not allow the call: before any message.
    """

    name: str
    handler: Callable[..., Awaitable[Any]]
    many: tuple[bool, bool]
    admit: Callable[[Mapping[str, str]], None] = lambda headers: None


@dataclass(eq=False)
class Link:
    """What the calls of a connection have in common.

    Attributes:
        loop: that runs them.
        outbox: sends.
        budget: room for large messages.
        held: what the messages of all connections take.
        limits: of a message.
        compression: of answers, for clients that take it.
        calls: that are open, by the numbers of their streams.
        tasks: of handlers, also of calls that have ended while theirs does not yet.
        left: is called with a call that has ended; whether its client knows is `call.half_closed`.
    """

    loop: asyncio.AbstractEventLoop
    outbox: Outbox
    budget: Budget
    held: Held
    limits: Limits
    compression: str
    left: Callable[[ServerCall], None]
    calls: dict[int, ServerCall] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class ServerCall:
    """A call that is served; handlers use `headers`, `about`, `read` and `write`.

    Attributes:
        number: of its stream.
        headers: its metadata, by lower-case name.
        deadline_ns: on the clock of requests; None: it has none.
        began: when it did, on the loop's clock.
        heard: when its last bytes came, or when more could come.
        half_closed: its client has sent all.
    """

    def __init__(self, link: Link, number: int, head: Head, served: Served) -> None:
        """Begins a call."""
        self.number, self.headers = number, head.headers
        self._link, self._head, self._served = link, head, served
        self.began = self.heard = link.loop.time()
        self.half_closed = self._answering = self._ended = False
        self.out = Outflow(number, link.outbox.first_window, self._drained)
        self._in = Inflow(link.budget, self._granted)
        self._share = Share(link.held)
        self._messages = Messages(link.limits.body_bytes)
        self._task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self.deadline_ns: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        timeout_s = head.timeout_s
        if timeout_s is not None and timeout_s < LONGEST_S:
            self.deadline_ns = clock_ns() + int(timeout_s * 1e9)
            self._timer = link.loop.call_later(timeout_s, self._expire)
        if served.many[0]:
            self._start()

    # What the connection calls.

    def receive(self, size: int, data: bytes, last: bool) -> None:
        """Takes the data of a frame.

        Args:
            size: of the frame, with its padding.
            data: without.
            last: nothing follows.

        Raises:
            StreamFault: it is more than its window.
        """
        self.heard = self._link.loop.time()
        if not self._in.came(size, len(data)):
            raise StreamFault(Code.FLOW_CONTROL_ERROR, self.number)
        self.half_closed = last
        if self._ended:
            return
        try:
            if data:
                self._share.take(len(data))
                self._messages.feed(data)
            if last:
                self._complete()
            else:
                self._grant()
        except ServeError as e:
            self.refuse(e)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _complete(self) -> None:
        """The client has sent all.

        Raises:
            ServeError: it ended within a message, or has sent none or several instead of one.
        """
        messages = self._messages
        if messages.have and not messages.ready:
            raise UnimplementedError("the call ended within a message")
        if not self._served.many[0]:
            if messages.have != messages.size or not messages.ready:
                raise UnimplementedError("the method takes one message, neither none nor more")
            self._start()

    def abandon(self) -> None:
        """The client or its connection is gone, or broke the rules: nothing more is sent."""
        self._end()
        self._close()

    def refuse(self, error: ServeError) -> None:
        """Ends the call with an error's status."""
        more: tuple[tuple[str, str], ...] = ()
        if isinstance(error, BusyError):  # as gRPC's retry policies read it: gRFC A6
            more = (("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))),)
        self.finish(trailers(STATUS[error.code], text_of(error), more))

    def stalls(self, now: float, read_s: float, write_s: float) -> bool:
        """Whether its client does not take its answer, or does not complete its message.

        Args:
            now: on the loop's clock.
            read_s: how long a message may take without a byte.
            write_s: how long an answer may.
        """
        if self.out.parts:
            return now - self.out.since > write_s
        if self._in.waits:  # for the server, not for its client
            return False
        unary = not self._served.many[0]
        messages = self._messages
        waits = not self.half_closed and (unary or (messages.have > 0 and not messages.ready))
        return waits and now - self.heard > read_s

    # What a handler calls.

    def about(self) -> Call:
        """What the service is told of a request whose last byte is here now."""
        return Call(self.headers, clock_ns(), self.deadline_ns, "grpc")

    async def read(self) -> bytes | None:
        """The next message; None: there is no more.

        Raises:
            ServeError: it cannot be inflated.
        """
        if not await self.comes():
            return None
        body = await self.take()
        self.free(body)
        return body

    async def comes(self) -> bool:
        """Waits for the next message; False: there is no more.

        Raises:
            ServeError: the call ended within it.
        """
        while not self._messages.ready:
            if self.half_closed:
                self._complete()
                return False
            self._waiter = self._link.loop.create_future()
            await self._waiter
        return True

    def free(self, body: bytes) -> None:
        """A message that was taken is not kept any more."""
        self._share.give(len(body))

    async def write(self, body: bytes) -> None:
        """Sends a message, and waits until it is on its way."""
        if self._ended:
            return
        message = await self._packed(body)
        if not self._link.outbox.send(self.out, self._before(), message, b""):
            self._room = self._link.loop.create_future()
            await self._room

    # The handler's task.

    def _start(self) -> None:
        self._task = self._link.loop.create_task(self._run())
        self._link.tasks.add(self._task)
        self._task.add_done_callback(self._link.tasks.discard)

    async def _run(self) -> None:
        served = self._served
        try:
            if served.many[0]:
                await served.handler(self)
                self.finish(_OK)
            elif served.many[1]:
                await served.handler(await self.take(), self)
                self.finish(_OK)
            else:
                self._answer(await self._packed(await served.handler(await self.take(), self)))
        except ServeError as e:
            self.refuse(e)
        except asyncio.CancelledError:
            self.refuse(BusyError("the server stops"))  # of others nothing is sent any more
            raise
        except Exception:  # whatever it is, no client reads it
            error = failed()
            LOG.exception("%s: %s", served.name, error.what)
            self.refuse(error)
        finally:
            self._share.close()

    async def take(self) -> bytes:
        """The first of the messages that are there; it counts as held until it is freed.

        Raises:
            ServeError: it cannot be inflated.
        """
        message = self._messages.take()
        size = len(message.body)
        self.heard = self._link.loop.time()  # until now the next one could not go on
        self._in.took(size + PREFIX.size)
        self._grant()
        self._share.give(PREFIX.size)
        if not message.compressed:
            return message.body
        how = (self._head.encoding, self._link.limits.body_bytes, self._share.take)
        if size < LARGE_BYTES // 16:
            plain = message.plain(*how)
        else:
            plain = await asyncio.to_thread(message.plain, *how)
        self._share.give(size)
        return plain

    async def _packed(self, body: bytes) -> tuple[bytes, bytes]:
        """A message with its prefix, compressed if the server does so and the client takes it."""
        encoding = self._encoding()
        if encoding == "identity":
            return prefixed(body), body
        if len(body) < LARGE_BYTES:
            packed = deflate((body,), encoding)
        else:
            packed = await asyncio.to_thread(deflate, (body,), encoding)
        return prefixed(packed, True), packed

    def _encoding(self) -> str:
        compression = self._link.compression
        return compression if compression in self._head.accepts else "identity"

    def _before(self) -> bytes:
        """The frame before the first message."""
        if self._answering:
            return b""
        self._answering = True
        return frame(HEADERS, END_HEADERS, self.number, _ANSWERS[self._encoding()])

    def _answer(self, message: tuple[bytes, bytes]) -> None:
        """Sends the only message, and ends the call."""
        if self._ended:
            return
        self._end()
        before, after = self._before(), self._last(_OK)
        if self._link.outbox.send(self.out, before, message, after):
            self._close()

    # The end.

    def finish(self, block: bytes) -> None:
        """Ends the call with trailers; the first end counts."""
        if self._ended:
            return
        self._end()
        if not self._answering:
            block = _ANSWERS["identity"] + block
        last = self._last(block)
        if self.out.parts:
            self.out.after = last
        else:
            self._link.outbox.write(last)
            self._close()

    def _last(self, block: bytes) -> bytes:
        """The frames that end the stream: a client that still sends may stop."""
        frames = frame(HEADERS, END_HEADERS | END_STREAM, self.number, block)
        return frames if self.half_closed else frames + reset(self.number, Code.NO_ERROR)

    def _end(self) -> None:
        """No status follows and no handler is needed; who reads that finds its room free."""
        self._ended = True
        self._share.close()
        if self._timer is not None:
            self._timer.cancel()
        task = self._task
        if task is not None and task is not asyncio.current_task(self._link.loop):
            task.cancel()

    def _close(self) -> None:
        """Nothing is sent any more; it happens once."""
        if self._link.calls.get(self.number) is not self:
            return
        self._link.outbox.forget(self.out)
        self._in.close()
        self._share.close()
        self._link.left(self)

    def _drained(self) -> None:
        if self._ended:
            self._close()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _expire(self) -> None:
        text = "the deadline has passed"
        self.finish(trailers(STATUS["DEADLINE_EXCEEDED"], text))

    def _granted(self) -> None:
        """There is room for a large message."""
        self.heard = self._link.loop.time()
        self._grant()

    def _grant(self) -> None:
        """Lets the client send what there is room for."""
        if self.half_closed or self._ended:
            return
        messages = self._messages
        if messages.size and not messages.ready:
            self._in.need(messages.size)
        more = self._in.grant((messages.size or PREFIX.size) - messages.have)
        if more:
            self._link.outbox.write(window_update(self.number, more))

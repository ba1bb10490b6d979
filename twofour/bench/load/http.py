"""HTTP/1.1 connections that cost little: prebuilt bytes out, parsed by httptools, no task each.

A request is one write, an answer one callback; connections are kept open and taken in turn. A
server that closes one after an answer gets a new one; one that hangs up in the middle of an answer,
or sends what is no HTTP, has failed that request.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from typing import cast

import httptools

from twofour.bench.load.client import (
    NO_ANSWER,
    NO_CONNECTION,
    UNREADABLE,
    Answer,
    Done,
    Target,
)

_JSON_BYTES = b"inference-header-content-length"
_NO_LENGTH = 1 << 62  # of what is no number: no body is as long, so its reader refuses it


class _Connection(asyncio.Protocol):
    """One connection, with at most one request open."""

    def __init__(self, pool: Connections) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._json_bytes = -1
        self._complete = False
        self._status, self._keep = 0, False
        self._transport: asyncio.Transport | None = None
        self._done: Done | None = None
        self._deadline_ns = 0

    def send(self, message: bytes, done: Done, deadline_ns: int) -> None:
        self._done, self._deadline_ns = done, deadline_ns
        if self._transport is None:
            self.fail(NO_CONNECTION, "the server hung up")
        else:
            self._transport.write(message)

    def late(self, now_ns: int) -> bool:
        """Whether its request should have been answered."""
        return self._done is not None and self._deadline_ns < now_ns

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's derive from none of these

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            self.fail(UNREADABLE, f"no HTTP: {e}")
            return
        if self._complete:
            self._finish(time.monotonic_ns())
        elif self._done is None:
            self.fail(UNREADABLE, "")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of httptools."""
        if len(name) == len(_JSON_BYTES) and name.lower() == _JSON_BYTES:
            self._json_bytes = int(value) if value.isdigit() else _NO_LENGTH

    def on_body(self, body: bytes) -> None:
        """Of httptools."""
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        """Of httptools, which knows these only now; the rest is done outside of its callbacks."""
        self._complete = True
        self._status, self._keep = self._parser.get_status_code(), self._parser.should_keep_alive()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.fail(NO_CONNECTION, "the server hung up")

    def fail(self, error: str, words: str) -> None:
        """Ends the connection, and the request that it has."""
        done, self._done = self._done, None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._pool.dropped(self)
        if done is not None:
            done(Answer(error, time.monotonic_ns(), words.encode()))

    def _finish(self, ended_ns: int) -> None:
        """Hands on the answer; before that, the connection to whoever waits for it."""
        status, done = self._status, self._done
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        answer = Answer("" if status == 200 else str(status), ended_ns, body, self._json_bytes)
        self._chunks, self._json_bytes, self._complete, self._done = [], -1, False, None
        if self._keep and done is not None:
            self._pool.idle(self)
        else:
            self.fail(NO_CONNECTION, "")
        if done is not None:
            done(answer)


class Connections:
    """At most so many connections to one server."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        """Opens none yet."""
        self.held = 0
        self._target = target
        self._timeout_ns = int(timeout_s * 1e9)
        self._tls = ssl.create_default_context() if target.secure else None
        self._most = 1
        self._opening = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._all: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._waiting: deque[tuple[bytes, Done, int]] = deque()
        self._sweep: asyncio.TimerHandle | None = None

    async def open(self, most: int) -> None:
        """Connects once; the others follow when they are needed.

        Raises:
            OSError: that is not possible.
        """
        self._most = most
        if not self._all:
            self.idle(await self._connect())
        if self._sweep is None:
            self._swept()

    async def close(self) -> None:
        """Ends all; requests that are open get an error."""
        if self._sweep is not None:
            self._sweep.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self._all):
            connection.fail(NO_CONNECTION, "closed")
        await asyncio.sleep(0)

    def send(self, message: bytes, done: Done) -> None:
        """Sends now, or as soon as there is a connection."""
        deadline_ns = time.monotonic_ns() + self._timeout_ns
        if self._idle:
            self._idle.pop().send(message, done, deadline_ns)
            return
        self._waiting.append((message, done, deadline_ns))
        if len(self._all) + self._opening < self._most:
            self._more()
        elif len(self._waiting) > self._opening:
            self.held += 1

    def idle(self, connection: _Connection) -> None:
        """Takes a connection back, or gives it to who waits."""
        self._all.add(connection)
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)

    def dropped(self, connection: _Connection) -> None:
        """Forgets a connection that has ended."""
        if connection not in self._all:
            return
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if len(self._waiting) > self._opening:
            self._more()

    def _more(self) -> None:
        self._opening += 1
        task = asyncio.get_running_loop().create_task(self._connect_for_waiting())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect_for_waiting(self) -> None:
        try:
            connection = await self._connect()
        except OSError as e:  # TimeoutError is one
            self._opening -= 1
            if self._waiting:
                _, done, _ = self._waiting.popleft()
                done(Answer(NO_CONNECTION, time.monotonic_ns(), str(e).encode()))
            if len(self._waiting) > self._opening:
                self._more()
        else:
            self._opening -= 1
            self.idle(connection)

    async def _connect(self) -> _Connection:
        loop, target = asyncio.get_running_loop(), self._target
        opening = loop.create_connection(
            lambda: _Connection(self), target.host, target.port, ssl=self._tls
        )
        async with asyncio.timeout(self._timeout_ns / 1e9):
            _, connection = await opening
        return connection

    def _swept(self) -> None:
        """Ends what has waited too long; looks again after a tenth of that time."""
        now = time.monotonic_ns()
        for connection in [each for each in self._all if each.late(now)]:
            connection.fail(NO_ANSWER, "")
        while self._waiting and self._waiting[0][2] < now:
            _, done, _ = self._waiting.popleft()
            done(Answer(NO_ANSWER, now, b""))
        again_s = min(max(self._timeout_ns / 1e10, 0.01), 0.2)
        self._sweep = asyncio.get_running_loop().call_later(again_s, self._swept)

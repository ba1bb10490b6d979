"""Listens, watches over slow clients, and stops without dropping a request.

On one connection over loopback with 12 KB requests and nothing to compute, the server's CPU time a
request was 16 us with this transport, 60 us with uvicorn (uvloop, httptools, a bare ASGI function)
and 188 us with granian (RSGI, in the server's own loop); with 32 connections 12, 43 and 44 us. So
the connections are our own, and a library parses (`httptools`).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence

from twofour.core.errors import InputError
from twofour.serve.held import Held
from twofour.serve.http.api import Api
from twofour.serve.http.connection import Connection, Shared
from twofour.serve.http.timeouts import Timeouts

SWEEP_S = 0.5
BACKLOG = 1024


class HttpServer:
    """The connections of one server; all methods are called in its event loop."""

    def __init__(
        self,
        api: Api,
        timeouts: Timeouts | None = None,
        connections: int = 4096,
        held: Held | None = None,
    ) -> None:
        """Does not listen yet.

        Args:
            api: answers requests.
            timeouts: of clients.
            connections: at once; further ones are closed as they come.
            held: what bodies take, which other servers may share; None: of this one alone.
        """
        held = held or Held(api.limits.held_bytes)
        self.shared = Shared(api, api.limits, timeouts or Timeouts(), connections, held)
        self.server: asyncio.Server | None = None
        self.sweeper: asyncio.Task[None] | None = None

    async def start(
        self, host: str | Sequence[str], port: int, tls: ssl.SSLContext | None = None
    ) -> int:
        """Listens.

        Args:
            host: addresses or names.
            port: 0 for a free one.
            tls: with the certificate; None: in the clear.

        Returns:
            The port.

        Raises:
            InputError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        try:
            self.server = await loop.create_server(
                lambda: Connection(self.shared, loop),
                host,
                port,
                ssl=tls,
                backlog=BACKLOG,
                ssl_handshake_timeout=self.shared.timeouts.tls_s if tls else None,
            )
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}, port {port}",
                ["expected an address of this machine and a free port", f"got {error}"],
                "choose another port, or stop who listens on it",
            ) from error
        self.sweeper = loop.create_task(self.sweep())
        return int(self.server.sockets[0].getsockname()[1])

    async def sweep(self) -> None:
        """Closes the connections of clients that are too slow, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            for connection in tuple(self.shared.connections):
                connection.check(now)

    async def stop(self, grace_s: float) -> int:
        """Takes no new connections, answers what was asked, and closes.

        Args:
            grace_s: for requests that have begun; those that take longer are cancelled.

        Returns:
            How many connections were cut.
        """
        loop = asyncio.get_running_loop()
        if self.server is not None:
            self.server.close()
        self.shared.drain_began = loop.time()
        end = loop.time() + grace_s
        while self.shared.connections and loop.time() < end:
            now = loop.time()
            for connection in tuple(self.shared.connections):
                connection.finish(now)
            await asyncio.sleep(0.02)
        cut = len(self.shared.connections)
        for connection in tuple(self.shared.connections):
            connection.transport.abort()
        if self.sweeper is not None:
            self.sweeper.cancel()
        await asyncio.sleep(0)
        return cut

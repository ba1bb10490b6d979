"""A gRPC server in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvloop

from twofour.serve.auth import Auth
from twofour.serve.grpc.server import GrpcOptions, GrpcServer

OPEN = Auth(None, None, loopback_only=True)


class Running:
    """A server that runs.

    Attributes:
        url: where it listens.
        service: behind it.
    """

    def __init__(self) -> None:
        self.url, self.service = "", None
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._server: GrpcServer
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server._shared.connections)

    def do(self, work: Awaitable[Any]) -> Any:
        """Awaits something in the server's loop."""

        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(60)

    def begin(self, make: Callable[[], Awaitable[Any]], auth: Auth, options: GrpcOptions) -> None:
        async def start() -> int:
            self.service = await make()
            self._server = GrpcServer(self.service, auth, options)
            return await self._server.start()

        self.url = f"127.0.0.1:{self.do(start())}"

    def stop(self, grace_s: float) -> None:
        self.do(self._server.stop(grace_s))

    def end(self) -> None:
        try:
            if self.service is not None:
                self.stop(0)
                fleet = getattr(self.service, "fleet", None)
                if fleet is not None:
                    self.do(fleet.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()


@contextmanager
def grpc_server(
    make: Callable[[], Awaitable[Any]], auth: Auth = OPEN, options: GrpcOptions | None = None
) -> Iterator[Running]:
    """A server on a free port.

    Args:
        make: makes the service, in the server's loop.
        auth: who may call.
        options: of the server; None: all defaults.
    """
    running = Running()
    try:
        running.begin(make, auth, options or GrpcOptions(port=0))
        yield running
    finally:
        running.end()

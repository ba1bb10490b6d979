"""The gRPC server: a port, its limits, and the methods behind it.

Handlers take and give bytes; `protocol/` reads and writes them. The transport is our own: for 12 KB
requests with nothing to compute the server's CPU time a request was 44 us with it, 181 us with
grpc.aio, and 209 us with the library h2 (32 calls at a time; docs/serve_grpc.md has the rest).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from twofour.core.errors import InputError
from twofour.serve.auth import Auth
from twofour.serve.grpc.call import Served
from twofour.serve.grpc.connection import Connection, Shared
from twofour.serve.grpc.health import Health
from twofour.serve.grpc.streams import Streams
from twofour.serve.grpc.timeouts import Timeouts
from twofour.serve.grpc.unary import CONTROL, PUBLIC, Unary
from twofour.serve.held import Held
from twofour.serve.limits import Limits
from twofour.serve.protocol.schema import HEALTH, INFERENCE
from twofour.serve.service import Service
from twofour.serve.tls import Tls

SWEEP_S = 0.5
BACKLOG = 1024
FLUSH_S = 1.0
"""After the grace time, for statuses to reach their clients."""


@dataclass(frozen=True)
class GrpcOptions:
    """How the server listens.

    Attributes:
        host: address or name; "::" is all addresses, "0.0.0.0" all of IPv4.
        port: 0 for a free one.
        tls: what it speaks TLS with; None: it speaks without.
        limits: of requests.
        compression: of answers; requests may be compressed in any of these ways.
        in_flight: requests of one stream that are computed at a time.
        timeouts: of clients.
        connections: at once; further ones are closed as they come.
    """

    host: str = "127.0.0.1"
    port: int = 8001
    tls: Tls | None = None
    limits: Limits = field(default_factory=Limits)
    compression: Literal["none", "deflate", "gzip"] = "none"
    in_flight: int = 256
    timeouts: Timeouts = field(default_factory=Timeouts)
    connections: int = 4096


class GrpcServer:
    """Serves a `Service` in the running event loop."""

    def __init__(
        self, service: Service, auth: Auth, options: GrpcOptions, held: Held | None = None
    ) -> None:
        """Makes the server; `start` opens its port.

        Args:
            service: answers.
            auth: who may ask.
            options: how it listens.
            held: what messages take, which other servers may share; None: of this one alone.
        """
        self._options = options
        self._health = Health(service, options.limits)
        self._streams = Streams(service, options.limits, options.in_flight)
        methods: dict[str, Callable[..., Awaitable[Any]]] = {
            **Unary(service, options.limits).handlers(),
            "ModelStreamInfer": self._streams.infer,
        }
        health = {"Check": self._health.check, "Watch": self._health.watch}
        self._shared = Shared(
            _served(methods, health, auth),
            options.limits,
            options.compression,
            options.timeouts,
            options.connections,
            held or Held(options.limits.held_bytes),
        )
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Opens the port.

        Returns:
            The port.

        Raises:
            InputError: it is taken, or the host is none of this machine's.
        """
        host, port, tls = self._options.host, self._options.port, self._options.tls
        loop = asyncio.get_running_loop()
        where: dict[str, Any] = {"host": host, "port": port}
        try:
            if host == "::" and socket.has_dualstack_ipv6():
                family = socket.AF_INET6
                both = socket.create_server((host, port), family=family, dualstack_ipv6=True)
                where = {"sock": both}
            self._server = await loop.create_server(
                lambda: Connection(self._shared, loop),
                **where,
                ssl=tls.grpc_context if tls else None,
                backlog=BACKLOG,
                ssl_handshake_timeout=self._options.timeouts.tls_s if tls else None,
            )
        except OSError as e:
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            reason = "the port is taken, or the address is none of this machine's"
            fix = "choose another port or address"
            raise InputError(f"cannot listen for gRPC at {address}", [reason], fix) from e
        self._sweeper = loop.create_task(self._sweep())
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Takes no further request, and answers what it has.

        Args:
            grace_s: after so many seconds what is left is cancelled.
        """
        self._health.stop()
        self._streams.stop()
        self._shared.draining = True
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._shared.connections):
            connection.drain()
        await self._emptied(grace_s)
        for connection in tuple(self._shared.connections):
            connection.cut()
        await self._emptied(FLUSH_S)
        for connection in tuple(self._shared.connections):
            connection.transport.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.sleep(0)

    async def _emptied(self, most_s: float) -> None:
        """Waits until no connection is open, but not for long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + most_s
        while self._shared.connections and loop.time() < end:
            await asyncio.sleep(0.01)

    async def _sweep(self) -> None:
        """Ends what is too slow, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            for connection in tuple(self._shared.connections):
                connection.check(now)


def _served(
    inference: Mapping[str, Callable[..., Awaitable[Any]]],
    health: Mapping[str, Callable[..., Awaitable[Any]]],
    auth: Auth,
) -> dict[str, Served]:
    """The methods that are served, by their paths; tokens are checked before messages are kept."""
    served = {
        method.path: Served(name, health[name], method.streams) for name, method in HEALTH.items()
    }
    for name, method in INFERENCE.items():
        admit = partial(auth.check, control=name in CONTROL)
        more = {} if name in PUBLIC else {"admit": admit}
        served[method.path] = Served(name, inference[name], method.streams, **more)
    return served

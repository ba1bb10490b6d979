"""One server: the repository, the models, both protocols, metrics, logs, and its orderly end.

It listens before models are loaded, so that a probe finds it live and not ready. At SIGTERM it
says that it is not ready, goes on answering for `drain_delay_s` until load balancers know, takes no
more connections, answers what has come, and ends. At SIGHUP it reads tokens, the certificate and
the repository again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import uvloop

from twofour.core.errors import Error
from twofour.serve.auth import Auth, TokenFile, is_loopback
from twofour.serve.gpus import GpuWatch
from twofour.serve.grpc.server import GrpcOptions, GrpcServer
from twofour.serve.held import Held
from twofour.serve.http.api import Api, Page, Parts
from twofour.serve.http.server import HttpServer
from twofour.serve.library import Library
from twofour.serve.limits import Limits
from twofour.serve.logs import LogOptions, Logs
from twofour.serve.metrics import Metrics
from twofour.serve.models.fleet import Fleet, FleetOptions
from twofour.serve.page import HEADERS, assets
from twofour.serve.readings import Finished, ServerReading
from twofour.serve.repository.manifest import Trust
from twofour.serve.repository.rebuild import Builds
from twofour.serve.repository.store import Store
from twofour.serve.service import Service
from twofour.serve.status import Status
from twofour.serve.tls import Tls, TlsFiles, load_tls, renewed
from twofour.serve.totals import Totals

log = logging.getLogger(__name__)
SWITCH_S = 0.00002
"""A thread that has computed a batch waits at most so long for the one that reads requests: with 32
callers one instance of ResNet-20 answered 5,700 of them a second at 0.5 ms, 6,600 at 0.1 ms, 6,900
at 0.02 ms."""
REREAD_S = 5.0
COLLECT = (20_000, 20, 100)
"""Allocations, and collections of younger objects, before Python looks for cycles."""
LAST_S = 5.0
"""When nobody waits for answers any more, a batch that runs has so long."""
MOST_FILES = 1 << 16
"""File descriptors, if the machine allows them: each connection takes one."""


@dataclass(frozen=True)
class Listen:
    """Where a server listens.

    Attributes:
        host: address or name.
        http_port: 0: a free one; None: no HTTP.
        grpc_port: likewise.
        tls: certificate and key; None: in the clear.
    """

    host: str = "127.0.0.1"
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    tls: TlsFiles | None = None


@dataclass(frozen=True)
class ServeOptions:
    """All about a server but its models.

    Attributes:
        repository: a folder or a URL.
        cache: folder for files of URLs and for built engines.
        name: of the server.
        listen: where.
        fleet: who decides what is loaded, and how much memory that may take.
        limits: of requests.
        tokens: file with tokens for requests; None: none needed.
        control_tokens: file with tokens for loading and unloading.
        logs: what is logged.
        listeners: are told of every request that got its answer or its error.
        drain_delay_s: after SIGTERM requests are taken for so long.
        drain_s: then those that came have so long.
        trust: versions are loaded only if their signature is believed; None: any.
    """

    repository: str
    cache: Path
    name: str = "twofour"
    listen: Listen = field(default_factory=Listen)
    fleet: FleetOptions = field(default_factory=FleetOptions)
    limits: Limits = field(default_factory=Limits)
    tokens: Path | None = None
    control_tokens: Path | None = None
    logs: LogOptions = field(default_factory=LogOptions)
    listeners: tuple[Callable[[Finished], None], ...] = ()
    drain_delay_s: float = 0.0
    drain_s: float = 30.0
    trust: Trust | None = None


@dataclass(frozen=True)
class Running:
    """A server that listens.

    Attributes:
        service: its models.
        http_port, grpc_port: where it listens; None: not at all.
        loaded: ends when what is to be loaded at start is, or was refused.
    """

    service: Service
    http_port: int | None
    grpc_port: int | None
    loaded: asyncio.Task[None]


def serve(options: ServeOptions) -> None:
    """Runs a server until SIGTERM or SIGINT, and until what came before is answered.

    Raises:
        Error: the repository, an address, a token file or a certificate cannot be used.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    uvloop.run(_until_stopped(options))


async def _until_stopped(options: ServeOptions) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with running(options) as server:
        waiting = loop.create_task(stopped.wait())
        await asyncio.wait([server.loaded, waiting], return_when=asyncio.FIRST_COMPLETED)
        if server.loaded.done():
            server.loaded.result()
            log.info("started: all models that can be loaded are")
        await waiting
        log.info("stopping: requests are answered for %.1f s more", options.drain_delay_s)
        server.service.fleet.leaving = True
        await asyncio.sleep(options.drain_delay_s)


@asynccontextmanager
async def running(options: ServeOptions) -> AsyncIterator[Running]:
    """A server in this event loop; it drains when the context ends.

    Raises:
        Error: as `serve`.
    """
    sys.setswitchinterval(SWITCH_S)
    async with AsyncExitStack() as stack:
        logs = Logs(options.logs, sys.stderr)
        stack.callback(logs.close)
        store = Store(options.repository, options.cache, trust=options.trust)
        library = Library(store, Builds(options.cache))
        fleet = Fleet(library, options.fleet)
        stack.callback(library.close)
        stack.push_async_callback(_close, fleet)
        service = Service(fleet, options.name)
        service.listeners += [logs.request, *options.listeners]
        auth = _auth(options)
        read = partial(_read, service, auth, logs)
        certificate = _Certificate(options.listen.tls)
        server = _Server(service, auth, certificate.tls, read)
        http_port, grpc_port = await _listen(options, server, stack)
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, asked.set)
        stack.callback(loop.remove_signal_handler, signal.SIGHUP)
        loaded = loop.create_task(_load(fleet))
        reread = loop.create_task(_reread(auth, certificate, fleet, asked))
        for task in (reread, loaded):
            stack.callback(task.cancel)
        yield Running(service, http_port, grpc_port, loaded)


@dataclass(frozen=True)
class _Server:
    """What both protocols have in common."""

    service: Service
    auth: Auth
    tls: Tls | None
    read: Callable[[], ServerReading]


class _Certificate:
    """The files of TLS, and what they held when they could be used last."""

    def __init__(self, files: TlsFiles | None) -> None:
        """Reads them. Raises InputError: they cannot be used."""
        self._files = files
        self.tls = None if files is None else load_tls(files)
        self._tell()

    def reread(self) -> None:
        """For handshakes to come; where the files cannot be used, what was before stays."""
        if self._files is None or self.tls is None:
            return
        before = self.tls
        try:
            self.tls = renewed(before, self._files)
        except Error as e:
            log.error("the TLS certificate cannot be used, the one before stays: %s", e)
            return
        if self.tls is not before:
            log.info("the TLS certificate %s is new", self._files.cert)
            self._tell()

    def _tell(self) -> None:
        for warning in self.tls.warnings if self.tls is not None else ():
            log.warning("%s", warning)


async def _listen(
    options: ServeOptions, server: _Server, stack: AsyncExitStack
) -> tuple[int | None, int | None]:
    """Opens both protocols; the stack drains them at the same time."""
    listen, tls, held = options.listen, server.tls, Held(options.limits.held_bytes)
    service, auth = server.service, server.auth
    servers: list[HttpServer | GrpcServer] = []

    async def drain() -> None:
        await asyncio.gather(*(each.stop(options.drain_s) for each in servers))

    stack.push_async_callback(drain)
    http_port = grpc_port = None
    if listen.http_port is not None:
        status, metrics = _told(server.read, stack)
        parts = Parts(service, auth, metrics.page, status.document, options.limits, _pages())
        http = HttpServer(Api(parts), held=held)
        http_port = await http.start(listen.host, listen.http_port, tls.context if tls else None)
        servers.append(http)
        log.info("HTTP at %s:%d", listen.host, http_port)
    if listen.grpc_port is not None:
        grpc = GrpcServer(
            service, auth, GrpcOptions(listen.host, listen.grpc_port, tls, options.limits), held
        )
        grpc_port = await grpc.start()
        servers.append(grpc)
        log.info("gRPC at %s:%d", listen.host, grpc_port)
    return http_port, grpc_port


def _read(service: Service, auth: Auth, logs: Logs) -> ServerReading:
    """All that the server tells of itself, now."""
    reading = service.reading()
    refused = Counter(reading.refused) + auth.refused
    return replace(reading, refused=refused, dropped_log_lines=logs.dropped)


def _told(read: Callable[[], ServerReading], stack: AsyncExitStack) -> tuple[Status, Metrics]:
    """The status document and the metrics; the stack ends their watch."""
    totals = Totals()
    status = Status(read, totals)
    watching = asyncio.get_running_loop().create_task(status.watch())
    stack.callback(watching.cancel)
    return status, Metrics(read, totals, GpuWatch())


def _pages() -> dict[str, Page]:
    """The files of the status page."""
    headers = [f"{name}: {text}".encode() for name, text in HEADERS.items()]
    return {
        f"/page/{name}": Page(each.content_type.encode(), each.body, headers)
        for name, each in assets().items()
    }


def _auth(options: ServeOptions) -> Auth:
    tokens = TokenFile(options.tokens) if options.tokens is not None else None
    control = TokenFile(options.control_tokens) if options.control_tokens is not None else None
    return Auth(tokens, control, is_loopback([options.listen.host]))


async def _load(fleet: Fleet) -> None:
    """Loads what is to be loaded at start; then what lives is not looked through for garbage.

    A full collection stops everything for as long as there are objects: tens of milliseconds with
    all that was imported. Requests make no cycles, so it can be rare, and pass over the old ones.
    """
    await fleet.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)


async def _close(fleet: Fleet) -> None:
    """Ends all versions; one that computes without end does not hold up the server's end."""
    try:
        await asyncio.wait_for(fleet.close(), LAST_S)
    except TimeoutError:
        log.error("a batch still runs after %.0f s more: it is given up", LAST_S)


async def _reread(
    auth: Auth, certificate: _Certificate, fleet: Fleet, asked: asyncio.Event
) -> None:
    """Reads tokens every few seconds, and everything at SIGHUP; until cancelled."""
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), REREAD_S)
        auth.reread()
        if not asked.is_set():
            continue
        asked.clear()
        log.info("tokens and repository are read again")
        certificate.reread()
        try:
            await fleet.look()
        except Error as e:
            log.error("the repository cannot be read, what is loaded stays: %s", e)

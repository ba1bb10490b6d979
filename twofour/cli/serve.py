"""twofour serve: a repository of engines, over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.cli.options import parse_size, require_packages

_CACHE = Path("~/.cache/twofour/serve")
if TYPE_CHECKING:
    from twofour.serve.app import ServeOptions
    from twofour.serve.repository.manifest import Trust

Listener = Callable[[Any], None]
Port = Annotated[int, typer.Option(min=-1, max=65535, help="0: a free one; -1: none.")]


class Control(StrEnum):
    """Who decides which models are loaded."""

    none = "none"
    poll = "poll"
    explicit = "explicit"


class LogFormat(StrEnum):
    """Of log lines."""

    text = "text"
    json = "json"


class LogLevel(StrEnum):
    """The lowest that is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def serve(
    repository: Annotated[
        str, typer.Argument(help="A folder or URL with MODEL/config.yaml and MODEL/VERSION/.")
    ],
    http: Port = 8000,
    grpc: Port = 8001,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    control: Annotated[
        Control, typer.Option(help="What is loaded: all at start, what polls find, on request.")
    ] = Control.none,
    load: Annotated[
        list[str] | None, typer.Option(help="With --control explicit: loaded at start.")
    ] = None,
    poll: Annotated[float, typer.Option(min=0.1, help="Seconds between polls.")] = 5.0,
    memory: Annotated[
        str | None, typer.Option(help="Of all models, as 2G; the least used make room.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="For fetched files and built engines.")] = _CACHE,
    trusted_keys: Annotated[
        Path | None,
        typer.Option(help="PEM file of public keys: only versions signed by one are loaded."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file: speak TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file: clients need a certificate.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="File of bearer tokens for requests, one a line.")
    ] = None,
    control_tokens: Annotated[
        Path | None, typer.Option(help="File of bearer tokens for loading and unloading.")
    ] = None,
    max_body: Annotated[str, typer.Option(help="Of a request.")] = "64M",
    max_body_time: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a body may take, over HTTP.")
    ] = 60.0,
    log: Annotated[LogFormat, typer.Option(help="Lines for people or for programs.")] = (
        LogFormat.text
    ),
    log_level: Annotated[LogLevel, typer.Option(help="The lowest that is logged.")] = LogLevel.info,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line each.")] = False,
    trace: Annotated[
        str | None, typer.Option(help="OTLP collector: http://localhost:4318/v1/traces.")
    ] = None,
    trace_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the requests that belong to no trace.")
    ] = 0.01,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to finish after SIGTERM.")] = 30.0,
    drain_delay: Annotated[
        float, typer.Option(min=0, help="Seconds of not being ready before that.")
    ] = 0.0,
    name: Annotated[str, typer.Option(help="Of the server, for clients and traces.")] = "twofour",
    ray: Annotated[
        bool, typer.Option("--ray", help="Deploy on Ray Serve instead: many machines.")
    ] = False,
    ray_address: Annotated[
        str, typer.Option(help="With --ray: auto, or HOST:PORT of its head; none: started here.")
    ] = "",
) -> None:
    """Serve engines over HTTP and gRPC.

    The protocol is KServe v2, that of Triton's clients.
    SIGTERM drains, SIGHUP reads tokens and repository again. The status page is at
    http://HOST:PORT/.

    Example: twofour serve models
    Example: twofour serve s3://bucket/models --host 0.0.0.0 --control poll --log json
    Example: twofour serve models --control explicit --load resnet20
    Example: twofour serve models --trusted-keys publish.pub --control poll
    Example: twofour serve s3://bucket/models --ray --ray-address auto --control poll
    """
    from twofour.core.errors import InputError

    require_packages("serving", ("uvloop", "httptools", "hpack", "pydantic", "yaml"), "serve")
    from twofour.serve import app
    from twofour.serve.limits import Limits
    from twofour.serve.logs import LogOptions
    from twofour.serve.models.fleet import FleetOptions
    from twofour.serve.tls import TlsFiles

    if (tls_cert is None) != (tls_key is None) or (tls_client_ca and not tls_cert):
        raise InputError("TLS needs --tls-cert and --tls-key", [], "name both files, or neither")
    files = TlsFiles(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None
    body = parse_size(max_body) or 0
    with _traces(trace, trace_share, name) as listeners:
        options = app.ServeOptions(
            repository,
            cache.expanduser(),
            name,
            app.Listen(host, None if http < 0 else http, None if grpc < 0 else grpc, files),
            FleetOptions(control.value, tuple(load or ()), parse_size(memory), poll),
            Limits(
                body_bytes=body,
                body_s=max_body_time,
                tensor_bytes=body,
                json_bytes=min(body, Limits.json_bytes),
            ),
            tokens,
            control_tokens,
            LogOptions(log.value, log_level.value, log_requests),
            listeners,
            drain_delay,
            drain,
            _trusted(trusted_keys),
        )
        if ray:
            _on_ray(options, ray_address)
        else:
            app.serve(options)


def _trusted(path: Path | None) -> Trust | None:
    """Whose signatures are believed; None: no key is required."""
    if path is None:
        return None
    require_packages("--trusted-keys", ("cryptography",), "registry")
    from twofour.serve.repository.signatures import read_trusted_keys

    return read_trusted_keys(path)


def _on_ray(options: ServeOptions, address: str) -> None:
    """Deploys on a cluster, which has no gRPC."""
    require_packages("--ray", ("ray", "starlette"), "ray")
    from twofour.serve.ray.deploy import deploy

    deploy(options, address)


@contextmanager
def _traces(endpoint: str | None, share: float, name: str) -> Iterator[tuple[Listener, ...]]:
    """Who hands finished requests to a collector, if there is one."""
    if endpoint is None:
        yield ()
        return
    require_packages("--trace", ("opentelemetry.sdk", "opentelemetry.exporter"), "trace")
    from twofour.core.version import __version__
    from twofour.serve.traces import Traces, otlp

    traces = Traces(otlp(endpoint), name, __version__, share)
    try:
        yield (traces.request,)
    finally:
        traces.close()

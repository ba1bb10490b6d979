"""What each route answers: the protocol's JSON around `Service`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from twofour.serve.auth import Auth
from twofour.serve.errors import (
    BusyError,
    MalformedError,
    NotFoundError,
    ServeError,
)
from twofour.serve.http.messages import JSON, Reply, Request, error_reply, failed_reply, json_reply
from twofour.serve.http.openapi import document
from twofour.serve.http.routes import Match, match, route_of
from twofour.serve.limits import Limits
from twofour.serve.protocol import content_encoding, json_text, rest
from twofour.serve.service import Call, Service

LOG = logging.getLogger(__name__)
NO_GUESSES = b"x-content-type-options: nosniff"
BINARY = b"application/octet-stream"


@dataclass(frozen=True)
class Page:
    """A file that is served as it is.

    Attributes:
        kind: its Content-Type.
        body: its bytes.
        headers: of the reply, as b"name: value".
    """

    kind: bytes
    body: bytes
    headers: Sequence[bytes] = (b"cache-control: no-cache", NO_GUESSES)


@dataclass(frozen=True)
class Parts:
    """What an `Api` is made of.

    Attributes:
        service: the models.
        auth: who may do what.
        metrics: the page of Prometheus and its content type, for a header Accept.
        status: the JSON document of the status page, from a point of its history on.
        limits: of a request.
        pages: path -> file, as "/page/" -> the status page, to which "/" leads if it is there.
    """

    service: Service
    auth: Auth
    metrics: Callable[[str], Awaitable[tuple[bytes, str]]]
    status: Callable[[int], bytes]
    limits: Limits = field(default_factory=Limits)
    pages: Mapping[str, Page] = field(default_factory=dict)


class Api:
    """Answers requests."""

    def __init__(self, parts: Parts) -> None:
        """Keeps the parts, and makes the page that describes the routes."""
        self.parts = parts
        self.service, self.limits = parts.service, parts.limits
        self.openapi = json_reply(document(parts.service.version, parts.limits))
        self.operations: dict[str, Callable[[Request, Match], Awaitable[Reply]]] = {
            "infer": self.infer,
            "server_metadata": self.server_metadata,
            "live": self.live,
            "ready": self.ready,
            "metadata": self.metadata,
            "model_ready": self.model_ready,
            "config": self.config,
            "statistics": self.statistics,
            "index": self.index,
            "load": self.load,
            "unload": self.unload,
            "metrics": self.metrics,
            "status": self.status,
            "openapi": self.describe,
        }

    def admit(self, request: Request) -> None:
        """Refuses what is known to be refused before its body is read.

        Raises:
            ServeError: there is no such page or method, or the request needs another token.
        """
        found = match(request.target)
        if request.method in ("GET", "HEAD") and self._is_page(found.path):
            return
        route = route_of(request.method, found)
        if route is None:
            fix = "see /openapi.json for what there is"
            raise NotFoundError("there is no such page", [f"got {found.path[:100]!r}"], fix)
        if not route.public:
            self.parts.auth.check(request.headers, route.control)

    async def answer(self, request: Request) -> Reply:
        """The reply to a request that was admitted.

        Raises:
            ServeError: it was refused.
        """
        found = match(request.target)
        route = route_of(request.method, found)
        if route is None:
            if found.path == "/":
                return Reply(307, (), b"text/plain", [b"location: page/"])
            page = self.parts.pages[found.path]
            return Reply(200, (page.body,), page.kind, list(page.headers))
        return await self.operations[route.operation](request, found)

    def failed(self, request: Request, error: BaseException) -> Reply:
        """The reply to a request whose answer raised; what nobody raised on purpose is logged."""
        if isinstance(error, ServeError):
            return error_reply(error)
        if isinstance(error, asyncio.CancelledError):
            return error_reply(BusyError("the server stops", [], "send the request again"))
        LOG.error("request %s failed", request.id, exc_info=error)
        return failed_reply(request.id)

    def _is_page(self, path: str) -> bool:
        pages = self.parts.pages
        return path in pages or (path == "/" and "/page/" in pages)

    async def infer(self, request: Request, found: Match) -> Reply:
        """Inference."""
        headers, body = request.headers, request.body
        if "content-encoding" in headers:
            body = await self.inflated(request)
        length = header_length(headers.get("inference-header-content-length"))
        asked = rest.decode(body, length, found.model, found.version, self.limits)
        call = Call(headers, request.arrived_ns, None, "http")
        response = await self.service.infer(asked, call)
        head, buffers = rest.encode(response, asked)
        reply = Reply(200, (head, *buffers))
        if buffers:
            reply.kind = BINARY
            reply.headers = [b"inference-header-content-length: %d" % len(head)]
        if "accept-encoding" in headers:
            encoding = content_encoding.asked(headers["accept-encoding"])
            if encoding:
                packed = await asyncio.to_thread(content_encoding.deflate, reply.body, encoding)
                reply.body = (packed,)
                reply.headers = [*reply.headers, b"content-encoding: " + encoding.encode()]
        return reply

    async def server_metadata(self, request: Request, found: Match) -> Reply:
        """Name, version, extensions."""
        service = self.service
        extensions = list(service.extensions)
        return json_reply(
            {"name": service.name, "version": service.version, "extensions": extensions}
        )

    async def live(self, request: Request, found: Match) -> Reply:
        """Whether the process answers."""
        return json_reply({"live": self.service.live}, 200 if self.service.live else 503)

    async def ready(self, request: Request, found: Match) -> Reply:
        """Whether requests should be sent here."""
        return json_reply({"ready": self.service.ready}, 200 if self.service.ready else 503)

    async def model_ready(self, request: Request, found: Match) -> Reply:
        """Whether a model takes requests."""
        ready = self.service.model_ready(found.model, found.version)
        return json_reply({"name": found.model, "ready": ready}, 200 if ready else 503)

    async def metadata(self, request: Request, found: Match) -> Reply:
        """Inputs and outputs of a model."""
        model = self.service.metadata(found.model, found.version)
        tensors = {
            key: [
                {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
                for tensor in group
            ]
            for key, group in (("inputs", model.inputs), ("outputs", model.outputs))
        }
        versions = list(model.versions)
        return json_reply(
            {"name": model.name, "versions": versions, "platform": model.platform, **tensors}
        )

    async def config(self, request: Request, found: Match) -> Reply:
        """The configuration of a model."""
        return json_reply(self.service.config(found.model, found.version))

    async def statistics(self, request: Request, found: Match) -> Reply:
        """Counts and times of one model, or of all."""
        return json_reply({"model_stats": self.service.statistics(found.model, found.version)})

    async def index(self, request: Request, found: Match) -> Reply:
        """What the repository holds."""
        ready_only = (await self.document_of(request)).get("ready", False)
        if type(ready_only) is not bool:
            expected = "expected true or false"
            raise MalformedError("'ready' is unusable", [expected, "got something else"])
        return json_reply(
            [
                {
                    "name": entry.name,
                    "version": entry.version,
                    "state": entry.state,
                    "reason": entry.reason,
                }
                for entry in self.service.index(ready_only)
            ]
        )

    async def load(self, request: Request, found: Match) -> Reply:
        """Loads a model."""
        parameters = await self.parameters_of(request)
        files = [name for name in parameters if name.startswith("file:")]
        if files:
            got = f"got {files[0][:100]!r}"
            fix = "put the files into the repository"
            raise MalformedError("models are not taken from requests", [got], fix)
        config = parameters.get("config", "")
        if type(config) is not str:
            expected = "expected a text that holds JSON"
            raise MalformedError("the parameter 'config' is unusable", [expected])
        await self.service.load(found.model, config)
        return json_reply({})

    async def unload(self, request: Request, found: Match) -> Reply:
        """Unloads a model."""
        await self.parameters_of(request)
        await self.service.unload(found.model)
        return json_reply({})

    async def metrics(self, request: Request, found: Match) -> Reply:
        """The page of Prometheus."""
        body, kind = await self.parts.metrics(request.headers.get("accept", ""))
        return Reply(200, (body,), kind.encode())

    async def status(self, request: Request, found: Match) -> Reply:
        """The document of the status page: ?since=POINT leaves out what its reader has.

        Raises:
            MalformedError: the point is no number.
        """
        query = parse_qs(request.target.partition(b"?")[2].decode("latin-1"))
        since = query.get("since", ["0"])[-1]
        if not (since.isascii() and since.isdigit() and len(since) <= 15):
            raise MalformedError("since is no point", ["expected a whole number"])
        headers = [b"cache-control: no-store", NO_GUESSES]
        return Reply(200, (self.parts.status(int(since)),), JSON, headers)

    async def describe(self, request: Request, found: Match) -> Reply:
        """The page that describes the routes."""
        return self.openapi

    async def inflated(self, request: Request) -> bytes:
        """The body of a request that is compressed.

        Raises:
            MalformedError, TooLargeError: it is damaged, or beyond the limits.
            BusyError: the server has no room for it.
        """
        encoding, most = request.headers["content-encoding"], self.limits.body_bytes
        took = request.share.take if request.share is not None else content_encoding.uncounted
        return await asyncio.to_thread(content_encoding.inflate, request.body, encoding, most, took)

    async def document_of(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request that may have no body.

        Raises:
            MalformedError, TooLargeError: it is none, or beyond the limits.
        """
        if not request.body:
            return {}
        compressed = "content-encoding" in request.headers
        body = await self.inflated(request) if compressed else bytes(request.body)
        found = json_text.parse(body, self.limits)
        if type(found) is not dict:
            raise MalformedError("the body is no object", ["expected a JSON object"])
        return found

    async def parameters_of(self, request: Request) -> dict[str, Any]:
        """The parameters of a request for control."""
        parameters = (await self.document_of(request)).get("parameters") or {}
        if type(parameters) is not dict:
            raise MalformedError("the parameters are unusable", ["expected a JSON object"])
        return parameters


def header_length(text: str | None) -> int | None:
    """The value of Inference-Header-Content-Length.

    Raises:
        MalformedError: it is no length.
    """
    if text is None:
        return None
    if len(text) > 12 or not (text.isascii() and text.isdigit()):
        raise MalformedError(
            "the header Inference-Header-Content-Length is unusable",
            ["expected a number of bytes", f"got {text[:40]!r}"],
            "send the number of bytes of the JSON that the body begins with",
        )
    return int(text)

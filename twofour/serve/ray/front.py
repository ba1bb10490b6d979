"""The front on every node: requests of HTTP that Ray's proxy hands over, sent to their model.

What concerns one model is answered by a replica of it, wherever in the cluster that is; the rest is
put together here. A request whose replica dies is sent to another one: inference changes nothing,
so computing it twice does no harm. When `TRIES` have died it is given up, so that a request that
kills processes does not kill them all; that one which is dead already takes it once more, because
Ray has not heard of it yet, does not count.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Awaitable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast
from urllib.parse import quote

import orjson
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from twofour.core.version import __version__
from twofour.serve.app import ServeOptions
from twofour.serve.auth import Auth
from twofour.serve.errors import BusyError, ForbiddenError, NotFoundError, ServeError
from twofour.serve.http.head import body_too_large, request_id
from twofour.serve.http.messages import Reply, Request, error_reply, json_reply
from twofour.serve.http.openapi import document
from twofour.serve.http.routes import Match, NotSupportedError, Route, match, route_of
from twofour.serve.protocol import json_text
from twofour.serve.service import EXTENSIONS

TRIES = 3
MOST_PAUSES = 40
LONGEST_PAUSE_S = 1.0
LOST = (RayActorError, NodeDiedError, ObjectLostError, ReplicaUnavailableError)
"""A replica or its node died, or its answer was lost with them."""
LOOK_S = 1.0
WAIT_S = 1.0
"""A request that takes longer looks, again and again, whether there is a replica to wait for."""
DEPLOYMENT = "Model"
"""Name of the one deployment of a model's application."""


@dataclass(frozen=True)
class Directory:
    """What a front knows of the repository.

    Attributes:
        models: name -> whether it may have no replica while nobody asks.
        refused: name -> why it is not served.
        needed: the models without which the server is not ready.
        leaving: the server is being stopped.
    """

    models: dict[str, bool] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    needed: list[str] = field(default_factory=list)
    leaving: bool = False

    def plain(self) -> dict[str, Any]:
        """As Ray keeps it."""
        return asdict(self)


@dataclass(frozen=True)
class State:
    """What Ray says of a model.

    Attributes:
        running: replicas that answer.
        failed: Ray has given up what it was asked to change.
    """

    running: int = 0
    failed: bool = False

    @property
    def hopeless(self) -> bool:
        """There is no replica, and there will be none."""
        return self.failed and not self.running


def application_of(server: str, model: str) -> str:
    """The name of a model's application; no name of a model has a colon."""
    return f"{server}:{model}"


class Front:
    """The class of the deployment that Ray's proxies call."""

    def __init__(self, options: ServeOptions, auth: bytes) -> None:
        """Knows no model yet.

        Args:
            options: of the server.
            auth: who may ask: a pickled `Auth`, with the hashes of tokens and not their files.
        """
        self.options, self.auth = options, cast(Auth, pickle.loads(auth))
        self.directory = Directory()
        self.handles: dict[str, DeploymentHandle[Any]] = {}
        self.openapi = json_reply(document(__version__, options.limits))
        self.states: dict[str, State] = {}
        self.looked_s = 0.0
        self.looking = asyncio.Lock()

    def reconfigure(self, plain: dict[str, Any]) -> None:
        """Learns which models there are, without an interruption."""
        self.directory = Directory(**plain)
        self.handles = {name: self.handles.get(name) or self.handle(name) for name in self.models}

    @property
    def models(self) -> Mapping[str, bool]:
        """Those that are served."""
        return self.directory.models

    async def __call__(self, http: HttpRequest) -> Response:
        """The answer to one request of HTTP."""
        request = request_of(http)
        try:
            found = match(request.target)
            route = self.admit(request, found)
            request.body = await self.body(http)
            request.arrived_ns = time.perf_counter_ns()
            reply = await self.answer(request, route, found)
        except ServeError as e:
            reply = error_reply(e)
        return response_of(reply)

    def admit(self, request: Request, found: Match) -> Route:
        """The route of a request that may be answered.

        Raises:
            ServeError: there is none, it needs another token, or it is for control.
        """
        route = route_of(request.method, found)
        if route is None:
            fix = "see /openapi.json for what there is"
            raise NotFoundError("there is no such page", [f"got {found.path[:100]!r}"], fix)
        if not route.public:
            self.auth.check(request.headers, control=False)
        if route.control:
            fix = "change the repository: the cluster follows it"
            raise ForbiddenError("models of a cluster are not loaded on request", [], fix)
        return route

    async def body(self, http: HttpRequest) -> bytes:
        """All of a request's body.

        Raises:
            TooLargeError: it is beyond the limits.
        """
        parts, size = [], 0
        async for part in http.stream():
            size += len(part)
            if size > self.options.limits.body_bytes:
                raise body_too_large(self.options.limits)
            parts.append(part)
        return b"".join(parts)

    async def answer(self, request: Request, route: Route, found: Match) -> Reply:
        """The reply to an admitted request.

        Raises:
            ServeError: it was refused.
        """
        if route.operation == "model_ready" and not await self.runs(found.model):
            return json_reply({"name": found.model, "ready": False}, 503)
        if found.model:
            return await self.forward(found.model, request)
        if route.operation == "server_metadata":
            plain = {"name": self.options.name, "version": __version__, "extensions": EXTENSIONS}
            return json_reply(plain)
        if route.operation == "live":
            return json_reply({"live": True})
        if route.operation == "ready":
            ready = await self.ready()
            return json_reply({"ready": ready}, 200 if ready else 503)
        if route.operation == "openapi":
            return self.openapi
        if route.operation == "index":
            return await self.index(request)
        if route.operation == "statistics":
            return await self.statistics(request)
        fix = "read Ray's own, which every node exports: docs/serve_ray.md"
        raise NotSupportedError(f"a cluster has no page {found.path[:100]!r}", [], fix)

    async def forward(self, model: str, request: Request) -> Reply:
        """The reply of a replica, of another one where that dies.

        Raises:
            NotFoundError: there is no such model.
            BusyError: too many requests wait, no replica can be had, or all that were tried died.
        """
        handle = self.handles.get(model)
        if handle is None:
            raise NotFoundError(f"there is no model {model[:100]!r}")
        dead: set[str] = set()
        for tried in range(MOST_PAUSES):
            try:
                return await self.computed(model, handle.answer.remote(request))
            except BackPressureError as e:
                full = f"as many requests wait for model {model!r} as may"
                raise BusyError(full, [], "send fewer at once, or allow more replicas") from e
            except DeploymentUnavailableError as e:
                raise not_loaded(model) from e
            except LOST as e:
                dead.add(str(getattr(e, "actor_id", None) or f"unknown {tried}"))
                if len(dead) == TRIES:
                    break
                await asyncio.sleep(min(0.05 * 2**tried, LONGEST_PAUSE_S))
        raise BusyError(f"{len(dead)} replicas of model {model!r} ended while they computed this")

    async def computed(self, model: str, response: Awaitable[Reply]) -> Reply:
        """A replica's reply, while there is or may come one that gives it.

        Raises:
            BusyError: Ray has given up to start a replica.
        """

        async def result() -> Reply:
            return await response

        task = asyncio.ensure_future(result())
        try:
            while not (await asyncio.wait([task], timeout=WAIT_S))[0]:
                if (await self.state(model)).hopeless:
                    raise not_loaded(model)
            return task.result()
        finally:
            task.cancel()

    async def index(self, request: Request) -> Reply:
        """What the repository holds: each model as a replica of it sees it, and what is refused."""
        found: list[dict[str, str]] = []
        for reply in await self.each(request, request.target):
            if reply.status != 200:
                return reply
            found += orjson.loads(reply.body[0])
        known = {entry["name"] for entry in found}
        asked = json_text.parse(bytes(request.body), self.options.limits) if request.body else {}
        if type(asked) is not dict or asked.get("ready") is not True:
            absent = dict.fromkeys(set(self.models) - known, "no replica runs")
            for name, reason in sorted({**absent, **self.directory.refused}.items()):
                entry = {"name": name, "version": "", "state": "UNAVAILABLE", "reason": reason}
                found.append(entry)
        return json_reply(sorted(found, key=lambda entry: entry["name"]))

    async def statistics(self, request: Request) -> Reply:
        """Of each model, as one replica of it counts."""
        found: list[dict[str, Any]] = []
        for reply in await self.each(request, b""):
            found += orjson.loads(reply.body[0])["model_stats"] if reply.status == 200 else []
        return json_reply({"model_stats": found})

    async def each(self, request: Request, target: bytes) -> list[Reply]:
        """A reply of every model that has a replica which takes requests.

        Args:
            request: with its body and headers.
            target: b"": that of the model's statistics.
        """

        async def ask(name: str) -> list[Reply]:
            own = target or f"/v2/models/{quote(name, safe='')}/stats".encode()
            asked = Request(request.method, own, request.headers, request.id, request.body)
            try:
                return [await self.forward(name, asked)] if await self.runs(name) else []
            except (BusyError, NotFoundError):  # it has no room, or was just taken away
                return []

        replies = await asyncio.gather(*(ask(name) for name in self.models))
        return [reply for found in replies for reply in found]

    async def ready(self) -> bool:
        """Every needed model has a replica that answers, or may have none."""
        if self.directory.leaving:
            return False
        known = {*self.models, *self.directory.refused}
        needed = [name for name in self.directory.needed if name in known]
        return all([self.models.get(name) or await self.runs(name) for name in needed])

    async def runs(self, model: str) -> bool:
        """Whether a replica of a model runs.

        Raises:
            NotFoundError: there is no such model.
        """
        if model not in self.models and model not in self.directory.refused:
            raise NotFoundError(f"there is no model {model[:100]!r}")
        return (await self.state(model)).running > 0

    async def state(self, model: str) -> State:
        """Of a model, as Ray's controller saw it a second ago at most."""
        async with self.looking:
            if time.monotonic() - self.looked_s > LOOK_S:
                self.states = await asyncio.to_thread(states, self.options.name)
                self.looked_s = time.monotonic()
        return self.states.get(model, State())

    def handle(self, model: str) -> DeploymentHandle[Any]:
        """The way to the replicas of a model."""
        return serve.get_deployment_handle(DEPLOYMENT, application_of(self.options.name, model))


def states(server: str) -> dict[str, State]:
    """Of every model that was deployed. Blocks."""
    found = {}
    for name, application in serve.status().applications.items():
        deployment = application.deployments.get(DEPLOYMENT)
        if deployment is not None and name.startswith(prefix := application_of(server, "")):
            replicas = deployment.replica_states.items()
            running = sum(count for state, count in replicas if state == "RUNNING")
            found[name.removeprefix(prefix)] = State(running, application.status == "DEPLOY_FAILED")
    return found


def not_loaded(model: str) -> BusyError:
    """What a client reads where Ray has given up to start a replica."""
    return BusyError(f"model {model!r} could not be loaded on the cluster")


def request_of(http: HttpRequest) -> Request:
    """What Ray's proxy read, without the body."""
    headers: dict[str, str] = {}
    for name, value in http.headers.items():
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    target = http.scope.get("raw_path") or quote(http.scope["path"]).encode()
    return Request(http.method, target, headers, request_id(headers))


def response_of(reply: Reply) -> Response:
    """A reply as Ray's proxy sends it, which adds the request's id."""
    body = b"".join(reply.body)
    response = Response(body, reply.status, media_type=reply.kind.decode())
    for line in reply.headers:
        name, _, value = line.decode("latin-1").partition(": ")
        response.headers[name] = value
    return response

"""Which request asks for what: one list, which the server dispatches by and its page describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

from twofour.serve.errors import NotFoundError, ServeError

MODEL = "/v2/models/{model}"
VERSION = MODEL + "/versions/{version}"
REPOSITORY = "/v2/repository/models/{model}"


class MethodError(ServeError):
    """The path is known, with another method.

    Attributes:
        allowed: the methods that it has.
    """

    status = 405
    code = "UNIMPLEMENTED"

    def __init__(self, allowed: Sequence[str]) -> None:
        """As `Error`."""
        self.allowed = ", ".join(allowed)
        super().__init__("there is no such method here", [f"expected one of {self.allowed}"])


class NotSupportedError(ServeError):
    """An extension of the protocol that this server does not have."""

    status = 501
    code = "UNIMPLEMENTED"


@dataclass(frozen=True)
class Route:
    """One operation.

    Attributes:
        method: of HTTP; GET stands for HEAD too.
        path: with names in braces for the parts that vary.
        operation: what is done.
        control: it changes what the server serves.
        public: it needs no token.
    """

    method: str
    path: str
    operation: str
    control: bool = False
    public: bool = False


ROUTES = (
    Route("GET", "/v2", "server_metadata"),
    Route("GET", "/v2/health/live", "live", public=True),
    Route("GET", "/v2/health/ready", "ready", public=True),
    Route("GET", "/v2/models/stats", "statistics"),
    *(
        route
        for base in (MODEL, VERSION)
        for route in (
            Route("GET", base, "metadata"),
            Route("GET", base + "/ready", "model_ready"),
            Route("GET", base + "/config", "config"),
            Route("GET", base + "/stats", "statistics"),
            Route("POST", base + "/infer", "infer"),
        )
    ),
    Route("POST", "/v2/repository/index", "index"),
    Route("POST", REPOSITORY + "/load", "load", control=True),
    Route("POST", REPOSITORY + "/unload", "unload", control=True),
    Route("GET", "/v2/status", "status"),
    Route("GET", "/metrics", "metrics"),
    Route("GET", "/openapi.json", "openapi", public=True),
)

UNSUPPORTED = {
    **{
        f"/v2/{kind}sharedmemory{rest}": f"shared memory ({kind})"
        for kind in ("system", "cuda")
        for rest in (
            "/status",
            "/unregister",
            "/region/{name}/status",
            "/region/{name}/register",
            "/region/{name}/unregister",
        )
    },
    "/v2/trace/setting": "trace settings",
    MODEL + "/trace/setting": "trace settings",
    "/v2/logging": "log settings",
}
"""Paths of extensions that there are not -> their names, for a better answer than "no page"."""


@dataclass(frozen=True)
class Match:
    """What a target asks for.

    Attributes:
        routes: of its path, by method.
        model: that it names, or "".
        version: that it names, or "".
        path: without its query, not decoded.
        unsupported: the extension that it belongs to, or "".
    """

    routes: dict[str, Route]
    model: str
    version: str
    path: str
    unsupported: str = ""


@lru_cache(maxsize=1024)
def match(target: bytes) -> Match:
    """Finds the routes of a request's target.

    Args:
        target: path and query, or an absolute URL.

    Raises:
        NotFoundError: it is no path.
    """
    text = target.decode("latin-1").partition("?")[0].partition("#")[0]
    if not text.startswith("/"):
        scheme, _, rest = text.partition("://")
        if scheme.lower() not in ("http", "https"):
            raise NotFoundError("there is no such page", ["expected a path that begins with /"])
        text = "/" + rest.partition("/")[2]
    segments = [unquote(segment) for segment in text.split("/")]
    for path, extension in UNSUPPORTED.items():
        if bound(path, segments) is not None:
            return Match({}, "", "", text, extension)
    for path in dict.fromkeys(route.path for route in ROUTES):
        names = bound(path, segments)
        if names is not None:
            routes = {route.method: route for route in ROUTES if route.path == path}
            return Match(routes, names.get("model", ""), names.get("version", ""), text)
    return Match({}, "", "", text)


def bound(path: str, segments: Sequence[str]) -> dict[str, str] | None:
    """The parts of a route's path that vary; None: the segments do not follow it."""
    parts = path.split("/")
    if len(parts) != len(segments):
        return None
    names = {}
    for part, segment in zip(parts, segments, strict=True):
        if part.startswith("{"):
            if not segment:
                return None
            names[part[1:-1]] = segment
        elif part != segment:
            return None
    return names


def route_of(method: str, found: Match) -> Route | None:
    """The route of a match; None: the path is no route's.

    Raises:
        NotSupportedError: it belongs to an extension that there is not.
        MethodError: it is one of another method.
    """
    route = found.routes.get("GET" if method == "HEAD" else method)
    if route is not None:
        return route
    if found.unsupported:
        what = f"this server has no extension for {found.unsupported}"
        fix = "see the extensions that GET /v2 names"
        raise NotSupportedError(what, [f"got {method} of its path"], fix)
    if found.routes:
        heads = ["HEAD"] if "GET" in found.routes else []
        raise MethodError([*found.routes, *heads])
    return None

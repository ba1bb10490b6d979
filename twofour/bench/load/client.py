"""What the load generator needs of a connection to a server, whatever its protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from numpy.typing import NDArray

from twofour.bench.load.statistics import Counters
from twofour.core.errors import Error, InputError

Feeds = Mapping[str, NDArray[Any]]

NO_ANSWER, NO_CONNECTION, UNREADABLE = "timeout", "connection", "wrong"
"""Errors of our own: none within the time; refused or hung up; an answer that is none."""
BUSY = frozenset({"503", "UNAVAILABLE"})
"""Errors by which a server says that it has too much to do."""
_PORTS = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 8001}


class AnswerError(Error):
    """An answer that does not follow the protocol."""


@dataclass(frozen=True)
class Target:
    """Where a model is served.

    Attributes:
        url: as it was given.
        scheme: http, https, grpc or grpcs.
        host: name or address.
        port: of TCP.
        path: that comes before /v2; without a slash at its end.
        model: its name.
        version: "" to let the server choose.
        headers: sent with every request; names in lower case.
    """

    url: str
    scheme: str
    host: str
    port: int
    path: str
    model: str
    version: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken."""
        return self.scheme in ("https", "grpcs")

    @property
    def authority(self) -> str:
        """host:port, as the header Host and gRPC have it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_target(url: str, model: str, headers: Mapping[str, str]) -> Target:
    """Reads a URL, and MODEL or MODEL:VERSION.

    Raises:
        InputError: another scheme, no host, or a bad port.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    usable = parts.scheme in _PORTS and parts.hostname and port != 0
    if not usable or parts.query or parts.fragment or parts.username:
        raise InputError(
            f"bad --url {url!r}",
            [f"expected {', '.join(_PORTS)}, then ://HOST:PORT"],
            "write it like --url http://127.0.0.1:8000 or --url grpc://127.0.0.1:8001",
        )
    name, _, version = model.partition(":")
    if not name or not re.fullmatch(r"\d*", version):
        raise InputError(
            f"bad --model {model!r}",
            ["expected the name of a model on the server, or NAME:VERSION"],
            "write it like --model resnet20",
        )
    place = (parts.hostname or "", port or _PORTS[parts.scheme], parts.path.rstrip("/"))
    return Target(url, parts.scheme, *place, name, version, headers)


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output as the server's metadata, or an answer, has it.

    Attributes:
        name: of the tensor.
        datatype: the protocol's name of its type, for example FP32.
        shape: its sizes; -1 where open.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What a server tells of a model."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request.

    Attributes:
        error: "" for an answer; else the HTTP status, the name of the gRPC status, or one of ours.
        ended_ns: when its last byte was there, on the clock of time.monotonic_ns.
        body: the message; of an error the server's words.
        json_bytes: HTTP: so many of the body come before binary tensors; -1 if it has none.
    """

    error: str
    ended_ns: int
    body: bytes
    json_bytes: int = -1


@dataclass(frozen=True, slots=True)
class Content:
    """How much an answer holds: what the answers to one request have in common.

    Attributes:
        tensor_bytes: of outputs sent as bytes.
        values: of outputs sent as numbers.
    """

    tensor_bytes: int
    values: int


Done = Callable[[Answer], None]


class Client(Protocol):
    """Connections to one server.

    Attributes:
        target: where to.
    """

    target: Target

    @property
    def held(self) -> int:
        """Requests that had to wait here, because as many as may be were open."""

    async def open(self, most: int) -> None:
        """Connects; at most so many requests will be open at once.

        Raises:
            InputError: nobody answers there.
        """

    async def close(self) -> None:
        """Ends all connections."""

    async def server(self) -> str:
        """Name and version of the server, as it tells them.

        Raises:
            InputError: it does not speak the protocol.
        """

    async def model(self) -> ModelInfo:
        """What the server tells of the model.

        Raises:
            InputError: it has no such model, or does not serve it now.
        """

    async def statistics(self) -> Counters | None:
        """The server's own counts for the model; None if it keeps none."""

    def encode(self, feeds: Feeds) -> bytes:
        """One request as the bytes that `send` takes."""

    def outputs(self, answer: Answer) -> tuple[Sequence[Tensor], Content]:
        """Reads an answer in full.

        Raises:
            AnswerError: it does not follow the protocol.
        """

    def holds(self, answer: Answer, content: Content) -> bool:
        """Whether an answer holds as much as one to the same request did; quick."""

    def send(self, message: bytes, done: Done) -> None:
        """Sends a request; `done` is called once, with its answer or its error."""


def require_answer(answer: Answer, target: Target, what: str) -> bytes:
    """The body of an answer to a question that was asked before the load begins.

    Raises:
        InputError: there is none.
    """
    if not answer.error:
        return answer.body
    words = said(answer.body)
    got = [f"expected an answer, got {answer.error}{f': {words}' if words else ''}"]
    if answer.error in ("404", "NOT_FOUND", "400", "INVALID_ARGUMENT"):
        fix = "give --model a name that the server has, or check the path of --url"
    elif answer.error in ("401", "403", "UNAUTHENTICATED", "PERMISSION_DENIED"):
        fix = "give a token that may do this, as --header 'authorization: Bearer TOKEN'"
    elif answer.error in (NO_CONNECTION, NO_ANSWER, *BUSY):
        fix = "start the server, wait until it is ready, and check --url"
    else:
        fix = (
            "look into the server's log; one without the extension for binary tensors needs "
            "--tensors json"
        )
    raise InputError(f"{target.url}: {what}", got, fix)


def said(body: bytes) -> str:
    """The begin of a server's words, on one line; of a JSON object its error."""
    text = body.decode("utf-8", "replace")
    try:
        told = json.loads(text)
    except ValueError:
        told = None  # plain words
    if isinstance(told, dict):
        text = next((str(told[key]) for key in ("error", "detail", "message") if key in told), text)
    text = " ".join(text[:1000].split())
    return text if len(text) <= 200 else f"{text[:197]}..."

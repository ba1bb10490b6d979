"""Requests and replies of HTTP as plain data, and how a reply is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson

from twofour.serve.errors import BusyError, ServeError, UnauthenticatedError
from twofour.serve.held import Share
from twofour.serve.http.routes import MethodError

Buffer = bytes | bytearray | memoryview
JSON = b"application/json"

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus} | {
    499: b"Client Closed Request"
}
STATUS_LINES = {
    status: b"HTTP/1.1 %d %s\r\n" % (status, reason) for status, reason in REASONS.items()
}
# One write is one system call: below this many bytes copying them together costs less than a list.
JOINED_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class Request:
    """One request as it came.

    Attributes:
        method: in capitals.
        target: its path and query.
        headers: lower-case name -> value.
        id: of X-Request-ID, or made.
        body: all of it, as it was sent; may start at any address.
        arrived_ns: when its last byte was there, `time.perf_counter_ns`.
        refused: why it gets no other answer: known before its body was read.
        last: the connection ends with its reply.
        expects: the client waits for "100 Continue" before it sends the body.
        share: of the server's memory for bodies; None: nobody counts it.
    """

    method: str
    target: bytes
    headers: Mapping[str, str]
    id: str
    body: Buffer = b""
    arrived_ns: int = 0
    refused: ServeError | None = None
    last: bool = False
    expects: bool = False
    share: Share | None = None


@dataclass(slots=True)
class Reply:
    """One answer.

    Attributes:
        status: code of it.
        body: buffers that are sent one after another; they have to stay as they are until then.
        kind: its Content-Type.
        headers: lines "name: value" without their ends.
    """

    status: int = 200
    body: Sequence[Buffer] = ()
    kind: bytes = JSON
    headers: Sequence[bytes] = field(default_factory=list)


def json_reply(document: Any, status: int = 200) -> Reply:
    """A JSON document as a reply.

    Args:
        document: dicts, lists, texts, numbers.
        status: of the reply.
    """
    return Reply(status, (orjson.dumps(document),))


def error_reply(error: ServeError) -> Reply:
    """What a client reads of an error that was raised on purpose: what, expected, got, fix."""
    reply = json_reply({"error": str(error)}, error.status)
    if isinstance(error, BusyError):
        reply.headers = [b"retry-after: %d" % max(1, math.ceil(error.retry_after_s))]
    elif isinstance(error, UnauthenticatedError):
        reply.headers = [b"www-authenticate: Bearer"]
    elif isinstance(error, MethodError):
        reply.headers = [b"allow: " + error.allowed.encode()]
    return reply


def failed_reply(request_id: str) -> Reply:
    """What a client reads of any other error: nothing but where the log has it."""
    text = f"the server failed\n  its log has the reason under request id {request_id}"
    return json_reply({"error": text}, 500)


def written(reply: Reply, request: Request) -> list[Buffer]:
    """The bytes of a reply, as few buffers.

    Args:
        reply: to be sent.
        request: whose it is; with HEAD it gets no body, and if it is the last one, the connection
            is said to close.
    """
    size = sum(len(buffer) for buffer in reply.body)
    lines = [
        STATUS_LINES[reply.status],
        b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
        % (reply.kind, size, request.id.encode()),
        *(line + b"\r\n" for line in reply.headers),
        b"connection: close\r\n\r\n" if request.last else b"\r\n",
    ]
    if request.method == "HEAD":
        return [b"".join(lines)]
    if size <= JOINED_BYTES:
        return [b"".join([*lines, *reply.body])]
    return [b"".join(lines), *reply.body]

"""What is checked of a request's head, and the refusals that end a connection.

Whatever could be read in two ways (a length twice, a length and chunks, two hosts) is refused, so
that no proxy in front sees other requests than this server does. Source: RFC 9112, 6.3 and 11.2.
"""

from __future__ import annotations

import itertools
import secrets

from twofour.serve.errors import MalformedError, ServeError, TooLargeError
from twofour.serve.http.messages import Request
from twofour.serve.limits import Limits

ONCE = frozenset(
    {"authorization", "content-encoding", "content-length", "expect", "host"}
    | {"inference-header-content-length", "transfer-encoding", "x-request-id"}
)
"""Headers that a request has once at most."""
IDS = itertools.count(1)
PREFIX = secrets.token_hex(4)
LONGEST_ID = 128


class ExpectationError(MalformedError):
    """The client expects what this server does not do."""

    status = 417


class HeadTooLargeError(TooLargeError):
    """The request line and the headers are too large."""

    status = 431


def request_id(headers: dict[str, str]) -> str:
    """The client's X-Request-ID where it can be sent back as it is, otherwise a new one."""
    given = headers.get("x-request-id", "")
    if given and len(given) <= LONGEST_ID and given.isascii() and given.isprintable():
        return given
    return f"{PREFIX}-{next(IDS)}"


def refusal(request: Request, version: str, limits: Limits) -> ServeError | None:
    """Why the connection cannot go on behind this head; None: it can.

    Args:
        request: its head.
        version: of HTTP, as "1.1".
        limits: of the head, and of the body that it announces.
    """
    headers = request.headers
    if version not in ("1.1", "1.0"):
        return not_http(f"version {version}")
    if version == "1.1" and "host" not in headers:
        return not_http("no header Host")
    if "transfer-encoding" in headers:
        if "content-length" in headers or version == "1.0":
            return ambiguous("the body has a length and chunks")
        if headers["transfer-encoding"].strip().lower() != "chunked":
            return ambiguous("the body has a Transfer-Encoding other than chunked")
    size = len(request.target) + sum(map(len, headers)) + sum(map(len, headers.values()))
    if size > limits.head_bytes:
        return head_too_large(limits)
    if int(headers.get("content-length", 0)) > limits.body_bytes:
        return body_too_large(limits)
    if "expect" in headers and headers["expect"].strip().lower() != "100-continue":
        expected = "expected 100-continue"
        return ExpectationError("the header Expect is unknown", [expected, "got something else"])
    return None


def not_http(got: object) -> MalformedError:
    """The refusal of bytes that are no request."""
    fix = "send a request of HTTP/1.1"
    return MalformedError("the request cannot be read", ["expected HTTP/1.1", f"got {got}"], fix)


def ambiguous(what: str) -> MalformedError:
    """The refusal of a request that could be read in two ways."""
    expected = "expected a request that can be read in one way only"
    return MalformedError("the request is ambiguous", [expected, f"got one where {what}"])


def head_too_large(limits: Limits) -> HeadTooLargeError:
    """The refusal of a head."""
    expected = f"expected at most {limits.head_bytes} bytes"
    fix = "send fewer or shorter headers"
    return HeadTooLargeError("the headers are too large", [expected, "got more"], fix)


def body_too_large(limits: Limits) -> TooLargeError:
    """The refusal of a body that is not kept."""
    expected = f"expected at most {limits.body_bytes} bytes"
    fix = "send fewer rows in one request"
    return TooLargeError("the body is too large", [expected, "got more"], fix)

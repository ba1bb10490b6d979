"""The statuses of gRPC, and what of an error its client reads."""

from __future__ import annotations

import secrets

from twofour.serve.errors import FailedError, ServeError

NAMES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
STATUS = {name: number for number, name in enumerate(NAMES)}
MOST_TEXT_BYTES = 2000
"""Of a refusal: a client reads 8 KB of trailers, in which a byte may take three."""


def text_of(error: ServeError) -> str:
    """A refusal in words that fit into a call's trailers."""
    text = str(error)
    encoded = text.encode("utf-8", "replace")
    if len(encoded) > MOST_TEXT_BYTES:
        text = encoded[: MOST_TEXT_BYTES - 3].decode("utf-8", "ignore") + "..."
    return text


def failed() -> FailedError:
    """What a client reads of an error that nobody raised on purpose: a name to find in the log."""
    name = secrets.token_hex(8)
    return FailedError(f"the server failed on request {name}", [], "see the server's log")

"""What a server answers instead of a result: each error carries its status in HTTP and in gRPC.

What a client reads is `what`, `reasons` and `fix` of errors raised on purpose. Of any other
exception it reads that the server failed, and the request's id under which the log has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from twofour.core.errors import Error


class ServeError(Error):
    """A request that gets no result.

    Attributes:
        status: of the HTTP reply.
        code: name of the gRPC status, as `grpc.StatusCode` has it.
    """

    status = 400
    code = "INVALID_ARGUMENT"


class MalformedError(ServeError):
    """The bytes of a request do not follow the protocol, or do not fit the model's inputs."""


class UnauthenticatedError(ServeError):
    """No token, or an unknown one."""

    status = 401
    code = "UNAUTHENTICATED"


class ForbiddenError(ServeError):
    """The token is known and does not allow this."""

    status = 403
    code = "PERMISSION_DENIED"


class NotFoundError(ServeError):
    """There is no such model, version or page."""

    status = 404
    code = "NOT_FOUND"


class TooLargeError(ServeError):
    """A body, a tensor, or the nesting of a document is beyond the server's limits."""

    status = 413
    code = "RESOURCE_EXHAUSTED"


class CancelledError(ServeError):
    """The client has gone, or cancelled its request, before it was computed."""

    status = 499
    code = "CANCELLED"


class FailedError(ServeError):
    """The server itself failed; the log has the trace under the request's id."""

    status = 500
    code = "INTERNAL"


class UnimplementedError(ServeError):
    """A part of the protocol that this server does not have."""

    status = 501
    code = "UNIMPLEMENTED"


class BusyError(ServeError):
    """The queue is full, the server drains, or the model is not ready: try again later.

    Attributes:
        retry_after_s: when that may make sense, for the header Retry-After.
    """

    status = 503
    code = "UNAVAILABLE"

    def __init__(
        self, what: str, reasons: Sequence[str] = (), fix: str = "", retry_after_s: float = 1.0
    ) -> None:
        """As `Error`, with the time to wait in seconds."""
        super().__init__(what, reasons, fix)
        self.retry_after_s = retry_after_s


class TimedOutError(ServeError):
    """The request waited longer than it or its model's queue allows."""

    status = 504
    code = "DEADLINE_EXCEEDED"

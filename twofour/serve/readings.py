"""What a server tells of itself to metrics, the status page and logs: plain data, read in its loop.

Whoever serves makes a `ServerReading` on request and a `Finished` for each request that it
answered; `metrics`, `status`, `logs` and `traces` know nothing else of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from twofour.serve.errors import (
    BusyError,
    CancelledError,
    FailedError,
    ForbiddenError,
    MalformedError,
    NotFoundError,
    ServeError,
    TimedOutError,
    TooLargeError,
    UnauthenticatedError,
    UnimplementedError,
)
from twofour.serve.models.tally import Tally

REASONS: dict[str, str] = {
    BusyError.__name__: "busy",
    CancelledError.__name__: "cancelled",
    FailedError.__name__: "failed",
    ForbiddenError.__name__: "forbidden",
    MalformedError.__name__: "malformed",
    NotFoundError.__name__: "not_found",
    TimedOutError.__name__: "timed_out",
    TooLargeError.__name__: "too_large",
    UnauthenticatedError.__name__: "unauthenticated",
    UnimplementedError.__name__: "unimplemented",
}
"""Name of an error -> why a request got no result; there are no more values than these and "other".
"""
REFUSED = ("busy", "cancelled", "timed_out")
"""Reasons of requests that a version would have computed, and did not."""


def reason_of(error: str) -> str:
    """The reason that an error's name stands for."""
    return REASONS.get(error, "other")


@dataclass(frozen=True, slots=True)
class VersionReading:
    """One version of a model at one moment.

    Attributes:
        model: name; of the repository, never of a request.
        version: number.
        tally: of its requests; it goes on counting; None: it never ran.
        state: "READY", "LOADING", "UNLOADING" or "UNAVAILABLE".
        reason: of the state; "" for none.
        share: of the model's traffic that names no version, 0 to 1.
        queue_length: requests that wait.
        instances: sessions that compute its batches.
        busy: those of them that compute now.
        memory_bytes: weights and activations.
        idle: it lies in the repository, and nothing asks for it to be loaded.
    """

    model: str
    version: str
    tally: Tally | None = None
    state: str = "READY"
    reason: str = ""
    share: float = 0.0
    queue_length: int = 0
    instances: int = 0
    busy: int = 0
    memory_bytes: int = 0
    idle: bool = False


@dataclass(frozen=True, slots=True)
class ServerReading:
    """A server at one moment.

    Attributes:
        name: of the server.
        version: of the server.
        ready: all that should be loaded is.
        draining: it takes no new requests.
        versions: all known ones, those of a model together.
        swaps: model -> how often its traffic has moved to other versions.
        refused: name of an error -> requests that no version got: unknown models, wrong tokens.
        dropped_log_lines: lines that the log had no room for.
    """

    name: str
    version: str
    ready: bool
    draining: bool = False
    versions: Sequence[VersionReading] = ()
    swaps: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    dropped_log_lines: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """One request that got its answer or its error.

    Attributes:
        id: of the request, the client's or the server's own.
        model: as the request names it.
        version: that computed it; "" where none did.
        protocol: "http" or "grpc".
        error: instead of a result; None: it has one.
        rows: of it.
        batch_rows: of the batch it was part of; 0: it was never computed.
        arrived_ns, started_ns, computing_ns, computed_ns, ended_ns: on the clock
            `time.perf_counter_ns`: its last byte was there, its batch was taken, began to be
            computed, was computed, and its answer was handed over; 0: it never came so far.
        headers: of the request, names in lower case; for the trace that it belongs to.
    """

    id: str
    model: str
    version: str
    protocol: str
    error: ServeError | None
    rows: int
    batch_rows: int
    arrived_ns: int
    started_ns: int
    computing_ns: int
    computed_ns: int
    ended_ns: int
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """Of HTTP."""
        return 200 if self.error is None else self.error.status

    def phases(self) -> tuple[tuple[str, int, int], ...]:
        """(name, begin, end) in ns of each phase that it went through to its end."""
        marks = (
            self.arrived_ns,
            self.started_ns,
            self.computing_ns,
            self.computed_ns,
            self.ended_ns,
        )
        names = ("queue", "assembly", "compute", "output")
        spans = zip(names, marks[:-1], marks[1:], strict=True)
        return tuple((name, begin, end) for name, begin, end in spans if begin and end)

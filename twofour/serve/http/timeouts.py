"""How long a client may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """Bounds on a client's slowness, in seconds; a connection beyond one is closed.

    How long a body may take is one of the `Limits`.

    Attributes:
        head_s: from a request's first byte, or from the connection's begin, to the end of its
            headers.
        idle_s: between two requests.
        write_s: without a byte of a reply being taken.
        linger_s: of reading what a client still sends after its request was refused, so that it
            reads the refusal; then the connection is closed.
        tls_s: of the TLS handshake.
    """

    head_s: float = 10.0
    idle_s: float = 75.0
    write_s: float = 30.0
    linger_s: float = 2.0
    tls_s: float = 10.0

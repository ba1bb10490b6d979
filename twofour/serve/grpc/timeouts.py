"""How long a client may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """Bounds on a client's slowness, in seconds.

    Attributes:
        begin_s: of a connection, to its first settings; of a header block, to its end.
        message_s: without a byte of a message that has begun; its call ends.
        write_s: without a byte of an answer being taken; its call ends, and the connection where
            it is the socket that takes nothing.
        quiet_s: without a word; then the client is asked whether it is there.
        alive_s: for its answer.
        linger_s: of reading what a client still sends after its connection has ended, so that it
            reads why.
        tls_s: of the TLS handshake.
    """

    begin_s: float = 10.0
    message_s: float = 60.0
    write_s: float = 30.0
    quiet_s: float = 60.0
    alive_s: float = 20.0
    linger_s: float = 1.0
    tls_s: float = 10.0

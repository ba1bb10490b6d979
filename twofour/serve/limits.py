"""What one request may take: bounds that are checked before memory or time is spent on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a request; one beyond them is refused with `TooLargeError`.

    Attributes:
        body_bytes: of a body, as it is sent and after it is inflated.
        held_bytes: of all bodies, over HTTP and gRPC, that are read, wait or are computed, as they
            were sent and inflated; one more is refused with `BusyError`.
        body_s: seconds from the end of a request's headers to that of its body, over HTTP.
        json_bytes: of a body's JSON, which takes up to 20 times that while it is read.
        json_depth: lists and objects within each other.
        head_bytes: of a request's line and headers.
        tensors: inputs, and outputs asked for.
        rank: dimensions of a tensor.
        tensor_bytes: of one tensor.
        name_length: characters of a name, an id, or a parameter's name or text.
        parameters: of a request.
    """

    body_bytes: int = 64 << 20
    held_bytes: int = 1 << 30
    body_s: float = 60.0
    json_bytes: int = 16 << 20
    json_depth: int = 40
    head_bytes: int = 32 << 10
    tensors: int = 256
    rank: int = 16
    tensor_bytes: int = 64 << 20
    name_length: int = 1024
    parameters: int = 64

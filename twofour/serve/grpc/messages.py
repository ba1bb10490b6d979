"""Messages of gRPC within the bytes of a stream.

    message = compressed (1 byte: 0, 1), length (4 bytes, the highest first), so many bytes

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from twofour.serve.errors import MalformedError, TooLargeError
from twofour.serve.protocol.content_encoding import inflate, uncounted

PREFIX = struct.Struct(">BI")


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it was sent."""

    compressed: bool
    body: bytes

    def plain(
        self, encoding: str, most_bytes: int, took: Callable[[int], None] = uncounted
    ) -> bytes:
        """Its bytes.

        Args:
            encoding: of the stream's messages that are compressed.
            most_bytes: that it may have.
            took: is called with bytes as they come out; what it raises ends this.

        Raises:
            MalformedError: it is damaged, or compressed though the stream has no encoding.
            TooLargeError: it has more bytes.
        """
        if not self.compressed:
            return self.body
        if encoding == "identity":
            what = "a message is compressed, and the call does not say how"
            raise MalformedError(what, ["expected grpc-encoding: gzip or deflate", "got none"])
        return inflate(self.body, encoding, most_bytes, took)


class Messages:
    """Cuts messages from the bytes that frames bring, one when it is asked for.

    So what waits takes the memory that it took on its way, however small its messages are.

    Attributes:
        size: bytes of the first message, with its prefix; 0: that is not known yet.
    """

    def __init__(self, most_bytes: int) -> None:
        """Of at most so many bytes each."""
        self.size = 0
        self._most = most_bytes
        self._data: bytes | bytearray = b""

    @property
    def have(self) -> int:
        """Bytes that are there."""
        return len(self._data)

    @property
    def ready(self) -> bool:
        """Whether the first message is whole."""
        return 0 < self.size <= len(self._data)

    def feed(self, data: bytes) -> None:
        """Takes the next bytes.

        Raises:
            TooLargeError: the first message says that it is larger than messages may be.
            MalformedError: its prefix is none.
        """
        if not self._data:
            self._data = data
        else:
            if type(self._data) is bytes:
                self._data = bytearray(self._data)
            self._data += data
        if not self.size:
            self._look()

    def take(self) -> Message:
        """The first message, which has to be ready.

        Raises:
            ServeError: as `feed`, of the one behind it.
        """
        data, size = self._data, self.size
        message = Message(data[0] == 1, bytes(data[PREFIX.size : size]))
        if len(data) == size:
            self._data = b""
        elif type(data) is bytearray:
            del data[:size]
        else:
            self._data = bytearray(data[size:])
        self.size = 0
        self._look()
        return message

    def _look(self) -> None:
        """Reads the first message's prefix."""
        if len(self._data) < PREFIX.size:
            return
        flag, length = PREFIX.unpack_from(self._data)
        if flag > 1:
            raise MalformedError(
                "a message has an unknown prefix", ["expected 0 or 1", f"got {flag}"]
            )
        if length > self._most:
            reasons = [f"expected at most {self._most} bytes", f"got {length}"]
            raise TooLargeError("the message is too large", reasons, "send fewer rows at a time")
        self.size = PREFIX.size + length


def prefixed(body: bytes, compressed: bool = False) -> bytes:
    """What stands before a message's bytes."""
    return PREFIX.pack(compressed, len(body))

"""A client of HTTP/2 that says exactly what it is told to: its bytes, and the frames it gets."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import hpack

from twofour.serve.grpc import frames
from twofour.serve.grpc.frames import Code

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
LIVE = "/inference.GRPCInferenceService/ServerLive"
EMPTY = bytes(5)
"""A message of no bytes."""


@dataclass(frozen=True)
class Frame:
    """A frame that came."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> Code:
        """Of RST_STREAM or GOAWAY."""
        at = 4 if self.kind == frames.GOAWAY else 0
        return Code(int.from_bytes(self.payload[at : at + 4], "big"))


def fields(path: str = LIVE, **more: str) -> list[tuple[str, str]]:
    """Those of a call; `more` replaces and adds, "_" stands for "-", "" leaves one out."""
    known = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "a",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    for name, value in more.items():
        key = f":{name}" if f":{name}" in known else name.replace("_", "-")
        known[key] = value
    return [(name, value) for name, value in known.items() if value]


class Raw:
    """One connection."""

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self._data = b""

    def greet(self, *pairs: tuple[int, int]) -> None:
        """The preface, and what the server says to it."""
        self.send(frames.PREFACE + frames.settings(pairs))
        assert self.next().kind == frames.SETTINGS
        self.until(frames.SETTINGS)
        self.send(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def send(self, *data: bytes) -> None:
        self.socket.sendall(b"".join(data))

    def head(self, stream: int, path: str = LIVE, end: bool = False, **more: str) -> bytes:
        """HEADERS of a call."""
        flags = frames.END_HEADERS | (frames.END_STREAM if end else 0)
        block = self.encoder.encode(fields(path, **more))
        return frames.frame(frames.HEADERS, flags, stream, block)

    def call(self, stream: int, path: str = LIVE, body: bytes = EMPTY, **more: str) -> bytes:
        """A whole call."""
        return self.head(stream, path, **more) + data(stream, body, end=True)

    def next(self) -> Frame:
        """The next frame.

        Raises:
            EOFError: the server has closed.
        """
        while len(self._data) < frames.HEAD_BYTES:
            self._more()
        length, kind, flags, stream = frames.read_head(self._data, 0)
        end = frames.HEAD_BYTES + length
        while len(self._data) < end:
            self._more()
        payload, self._data = self._data[frames.HEAD_BYTES : end], self._data[end:]
        return Frame(kind, flags, stream, payload)

    def until(self, kind: int, stream: int | None = None) -> Frame:
        """The next frame of a kind; others are dropped, their headers decoded."""
        while True:
            found = self.next()
            if found.kind == kind and stream in (None, found.stream):
                return found
            if found.kind == frames.HEADERS:
                self.decoder.decode(found.payload)

    def status(self, stream: int) -> tuple[int, str]:
        """How a call ends: grpc-status and grpc-message."""
        while True:
            found = self.until(frames.HEADERS, stream)
            known = dict(self.decoder.decode(found.payload))
            if found.flags & frames.END_STREAM:
                return int(known["grpc-status"]), known.get("grpc-message", "")

    def closed(self, code: Code) -> str:
        """Reads to the end: GOAWAY with a code, and its text."""
        found = self.until(frames.GOAWAY)
        assert found.code is code
        try:
            while True:
                self.next()
        except EOFError:
            return found.payload[8:].decode()

    def _more(self) -> None:
        try:
            got = self.socket.recv(1 << 16)
        except ConnectionResetError:
            got = b""
        if not got:
            raise EOFError
        self._data += got


def data(stream: int, body: bytes, end: bool = False) -> bytes:
    """A DATA frame."""
    return frames.frame(frames.DATA, frames.END_STREAM if end else 0, stream, body)


def message(body: bytes, compressed: int = 0) -> bytes:
    """A message with its prefix."""
    return struct.pack(">BI", compressed, len(body)) + body


@contextmanager
def connected(url: str, *pairs: tuple[int, int]) -> Iterator[Raw]:
    """A connection that has greeted."""
    raw = Raw(url)
    try:
        raw.greet(*pairs)
        yield raw
    finally:
        raw.socket.close()


def flood(raw: Raw, parts: Iterable[bytes]) -> None:
    """Sends parts until the server has enough of them."""
    end = time.monotonic() + 10
    try:
        for part in parts:
            raw.send(part)
            assert time.monotonic() < end, "the server takes everything"
    except OSError:
        return

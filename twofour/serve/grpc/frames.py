"""Frames of HTTP/2: their bytes, and the mistakes that they can show by themselves.

    frame = length (24 bits), kind (8), flags (8), stream (31, below one unused bit), payload

Source: RFC 9113, 4 (frames), 6 (their kinds), 7 (error codes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
FIRST_WINDOW = (1 << 16) - 1
"""Of a connection, and of a stream until its peer's settings are known, in bytes."""
MOST_WINDOW = (1 << 31) - 1
LEAST_FRAME_BYTES, MOST_FRAME_BYTES = 1 << 14, (1 << 24) - 1

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20

TABLE_SIZE, ENABLE_PUSH, MOST_STREAMS = 1, 2, 3
INITIAL_WINDOW, MOST_FRAME, MOST_HEADERS = 4, 5, 6

_HEAD = struct.Struct(">HBBBI")
_SETTING = struct.Struct(">HI")
_PRIORITY_BYTES = 5


class Code(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11


class ConnectionFault(Exception):
    """The peer did what ends its connection."""

    def __init__(self, code: Code, text: str) -> None:
        """With a code and words for the peer's log."""
        super().__init__(text)
        self.code, self.text = code, text


class StreamFault(Exception):
    """The peer did what ends one of its streams."""

    def __init__(self, code: Code, stream: int) -> None:
        """Of a stream by its number."""
        super().__init__(f"stream {stream}: {code.name}")
        self.code, self.stream = code, stream


def head(length: int, kind: int, flags: int, stream: int) -> bytes:
    """What stands before a payload of so many bytes."""
    return _HEAD.pack(length >> 8, length & 255, kind, flags, stream)


def read_head(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Length, kind, flags and stream of the frame that begins at a place.

    Args:
        data: with `HEAD_BYTES` from there on.
        at: the place.
    """
    high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
    return high << 8 | low, kind, flags, stream & MOST_WINDOW


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame."""
    return head(len(payload), kind, flags, stream) + payload


def content(flags: int, payload: bytes) -> bytes:
    """The payload of a DATA or HEADERS frame without padding and priority.

    Args:
        flags: of the frame; `PRIORITIZED` means nothing in DATA and must not be given there.
        payload: of the frame.

    Raises:
        ConnectionFault: there is more padding than payload, or no room for what the flags say.
    """
    begin, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a padded frame without its padding")
        begin, end = 1, end - payload[0]
    if flags & PRIORITIZED:
        begin += _PRIORITY_BYTES
    if begin > end:
        raise ConnectionFault(Code.PROTOCOL_ERROR, "more padding than payload")
    return payload[begin:end]


def settings(pairs: Iterable[tuple[int, int]]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join([_SETTING.pack(key, value) for key, value in pairs]))


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """The settings in a payload, in their order; unknown ones too.

    Raises:
        ConnectionFault: its size or one of its values is none that there can be.
    """
    if len(payload) % _SETTING.size:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "SETTINGS of another size")
    pairs = list(_SETTING.iter_unpack(payload))
    for key, value in pairs:
        if key == ENABLE_PUSH and value > 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
        if key == INITIAL_WINDOW and value > MOST_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
        if key == MOST_FRAME and not LEAST_FRAME_BYTES <= value <= MOST_FRAME_BYTES:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of bounds")
    return pairs


def read_number(payload: bytes) -> int:
    """The one number of a RST_STREAM or WINDOW_UPDATE, without its highest bit.

    Raises:
        ConnectionFault: the payload has another size.
    """
    if len(payload) != 4:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a frame of another size than its kind has")
    return int.from_bytes(payload, "big") & MOST_WINDOW


def window_update(stream: int, more: int) -> bytes:
    """A WINDOW_UPDATE.

    Args:
        stream: 0: of the connection.
        more: bytes, at least 1.
    """
    return frame(WINDOW_UPDATE, 0, stream, more.to_bytes(4, "big"))


def reset(stream: int, code: Code) -> bytes:
    """A RST_STREAM."""
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last: int, code: Code, text: str = "") -> bytes:
    """A GOAWAY: no stream behind `last` is answered."""
    payload = last.to_bytes(4, "big") + code.to_bytes(4, "big") + text.encode()
    return frame(GOAWAY, 0, 0, payload)

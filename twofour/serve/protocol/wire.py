"""The wire format of protobuf, as far as tensors are moved without it: varints, outermost fields.

    message = field ...     field = tag, value      tag = varint of number << 3 | wire type
    value   = varint | 8 bytes | varint length, so many bytes | 4 bytes      for types 0, 1, 2, 5

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from twofour.serve.errors import MalformedError, TooLargeError
from twofour.serve.limits import Limits

FIX = "send a ModelInferRequest of the Open Inference Protocol, version 2"
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # 3 and 4 are groups, of proto2 alone
_SKIPPED = {_FIXED64: 8, _FIXED32: 4}
_ID, _RAW_INPUT = 3 << 3 | _LENGTH, 7 << 3 | _LENGTH
_WHAT = "the message is damaged"


@dataclass(frozen=True, slots=True)
class Parts:
    """A ModelInferRequest in parts.

    Attributes:
        head: the message without what follows.
        id: bytes of its id, b"" for none.
        raws: where each of its raw inputs begins and ends.
    """

    head: bytes
    id: bytes
    raws: list[tuple[int, int]]


def split(body: bytes, limits: Limits) -> Parts:
    """Parts a ModelInferRequest, without reading what is in other fields.

    Raises:
        MalformedError: no fields follow each other there.
        TooLargeError: there are more than a request within the limits has, or they are too large.
    """
    raws: list[tuple[int, int]] = []
    kept: list[bytes] = []
    name = b""
    begin = count = last = 0
    size = len(body)
    most = 3 * limits.tensors + limits.parameters + 16
    while begin < size:
        tag, at, end = _field(body, begin, size)
        if tag == _RAW_INPUT or tag == _ID:
            kept.append(body[last:begin])
            last = end
            if tag == _ID:
                name = body[at:end]
            else:
                raws.append((at, end))
        begin = end
        count += 1
        if count > most:
            raise too_large("the message has too many fields", most, "more", "name fewer tensors")
    kept.append(body[last:])
    head = b"".join(kept)
    if len(head) > limits.json_bytes:
        what, fix = "the message is too large without raw bytes", "send raw_input_contents"
        raise too_large(what, f"{limits.json_bytes} bytes", len(head), fix)
    return Parts(head, name, raws)


def _field(body: bytes, at: int, size: int) -> tuple[int, int, int]:
    """The tag of the field at a place, and where its value begins and ends."""
    try:
        tag = body[at]
        at += 1
        if tag > 127:
            tag, at = _varint(body, at - 1)
        kind = tag & 7
        if kind == _LENGTH:
            length = body[at]
            at += 1
            if length > 127:
                length, at = _varint(body, at - 1)
            end = at + length
        elif kind == _VARINT:
            _, end = _varint(body, at)
        elif kind in _SKIPPED:
            end = at + _SKIPPED[kind]
        else:
            raise malformed(_WHAT, f"a field of wire type {kind}")
    except IndexError as e:
        raise malformed(_WHAT, "its end within a field") from e
    if end > size:
        raise malformed(_WHAT, "its end within a field")
    return tag, at, end


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """A number in 7 bits a byte, the lowest first; and where it ends.

    Raises:
        IndexError: the message ends within it.
    """
    value = 0
    for index in range(10):
        byte = body[at + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise malformed(_WHAT, "a number of more than ten bytes")


@lru_cache(1024)
def field_head(number: int, length: int) -> bytes:
    """What stands before the bytes of a field: its tag, and their number as a varint.

    Args:
        number: of the field, below 16.
        length: of what follows.
    """
    head = bytearray([number << 3 | _LENGTH])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head)


def malformed(what: str, got: str, expected: str = "", fix: str = FIX) -> MalformedError:
    """A refusal with its reasons; what is expected is the wire format unless it is said."""
    expected = expected or "fields of the protobuf wire format"
    return MalformedError(what, [f"expected {expected}", f"got {got}"], fix)


def too_large(what: str, most: int | str, got: int | str, fix: str) -> TooLargeError:
    """A refusal of what is beyond a limit."""
    return TooLargeError(what, [f"expected at most {most}", f"got {got}"], fix)

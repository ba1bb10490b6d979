"""Header blocks: what a call's head says, and the few blocks that a server answers with.

A client repeats itself: after its first call a block is a row of references into the table that
HPACK keeps. Such a block leaves the table as it is, and means the same until another one changes
the table; until then it is looked up instead of read.

Answers use the static table and literals, so that they need no table of the client's.

Source: RFC 7541 (HPACK); RFC 9113, 8.2 and 8.3 (fields); gRPC over HTTP/2,
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_from_bytes

import hpack
from hpack.exceptions import HPACKError, OversizedHeaderListError

from twofour.serve.grpc.frames import Code, ConnectionFault
from twofour.serve.limits import Limits

TABLE_BYTES = 4096
"""Of the table that a client may fill, which is what it may take before it knows any settings."""
ENCODINGS = ("identity", "deflate", "gzip")
ACCEPTED = ",".join(ENCODINGS)
_TRANSPORTS = frozenset({"te", "content-type", "content-length"})
_KNOWN, _LONGEST_KNOWN = 64, 4096  # blocks that are remembered, and bytes of their fields
_FIELD_BYTES = 32  # what a field counts beyond its name and value
_NAME = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"[^\x00\r\n]*")
_PSEUDO = frozenset({b":method", b":scheme", b":path", b":authority"})
_OF_CONNECTIONS = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_KIND = re.compile(r"application/grpc($|[+;])")
_UNQUOTED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_Table = tuple[int, int, tuple[bytes, bytes] | None]  # size, number of entries, the first of them
_STATUS_CODES = {200: b"\x88", 400: b"\x8c"}  # of the static table


@dataclass(frozen=True, slots=True)
class Head:
    """What a call says before its messages.

    Attributes:
        path: /package.Service/Method.
        headers: the metadata that is text, by lower-case name; what comes twice is joined.
        timeout_s: None: it may take for ever.
        encoding: of messages that are compressed.
        accepts: encodings of answers.
        status: of HTTP, 200 for a call of gRPC.
        fault: it breaks the rules of HTTP/2.
        refusal: status of gRPC and text, where it is known to be refused.
    """

    path: str
    headers: dict[str, str]
    timeout_s: float | None = None
    encoding: str = "identity"
    accepts: frozenset[str] = frozenset()
    status: int = 200
    fault: bool = False
    refusal: tuple[str, str] | None = None


class HeadReader:
    """Reads the header blocks of one connection, each of which has to be read."""

    def __init__(self, limits: Limits) -> None:
        """With a table that is empty.

        Args:
            limits: `head_bytes` is that of one block, in and out of its compression.
        """
        self._most = limits.head_bytes
        self._decoder = hpack.Decoder(4 * limits.head_bytes)
        self._decoder.max_allowed_table_size = TABLE_BYTES
        self._known: dict[bytes, Head] = {}

    def read(self, block: bytes) -> Head:
        """The head in a block.

        Raises:
            ConnectionFault: it is no block of HPACK, or far beyond the limits.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        before = self._table()
        try:
            fields: Any = list(self._decoder.decode(block, raw=True))
        except OversizedHeaderListError as e:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "the headers are too large") from e
        except HPACKError as e:
            raise ConnectionFault(Code.COMPRESSION_ERROR, "the headers are damaged") from e
        size = sum([len(name) + len(value) + _FIELD_BYTES for name, value in fields])
        if size > self._most:
            text = f"the metadata is too large: expected at most {self._most} bytes, got {size}"
            head = Head("", {}, refusal=("RESOURCE_EXHAUSTED", text))
        else:
            head = head_of(fields)
        if not _same(before, self._table()):
            self._known.clear()
        elif size <= _LONGEST_KNOWN:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[block] = head
        return head

    def _table(self) -> _Table:
        """What differs after every change of the table: an entry that comes is its first."""
        table = self._decoder.header_table
        entries = table.dynamic_entries
        return table.maxsize, len(entries), entries[0] if entries else None


def _same(before: _Table, after: _Table) -> bool:
    """Whether nothing came or went between: an equal entry is not the same one."""
    return before[:2] == after[:2] and before[2] is after[2]


def head_of(fields: Iterable[tuple[bytes, bytes]]) -> Head:
    """The head that fields make."""
    pseudo: dict[bytes, bytes] = {}
    headers: dict[str, str] = {}
    fault = False
    for name, value in fields:
        if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)) or name in _OF_CONNECTIONS:
            fault = True
        elif name.startswith(b":"):
            fault = fault or bool(headers) or name in pseudo or name not in _PSEUDO
            pseudo[name] = value
        else:
            key, text = name.decode(), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
    needed = (b":method", b":scheme", b":path")
    if fault or headers.get("te", "trailers") != "trailers" or not all(map(pseudo.get, needed)):
        return Head("", headers, fault=True)
    path = pseudo[b":path"].decode("latin-1")
    if pseudo[b":method"] != b"POST":
        return Head(path, headers, status=405)
    if not _KIND.match(headers.get("content-type", "")):
        return Head(path, headers, status=415)
    return _call(path, headers)


def _call(path: str, headers: dict[str, str]) -> Head:
    """The head of a call of gRPC."""
    refusal = timeout_s = None
    if "grpc-timeout" in headers:
        found = _TIMEOUT.fullmatch(headers["grpc-timeout"])
        if found is None:
            got = headers["grpc-timeout"][:40]
            text = f"grpc-timeout is unusable: expected up to 8 digits and a unit, got {got!r}"
            refusal = ("INVALID_ARGUMENT", text)
        else:
            timeout_s = int(found[1]) * _UNITS_S[found[2]]
    encoding = headers.get("grpc-encoding", "identity")
    if encoding not in ENCODINGS:
        text = f"grpc-encoding is unknown: expected {ACCEPTED}, got {encoding[:40]!r}"
        refusal = ("UNIMPLEMENTED", text)
    accepts = frozenset(map(str.strip, headers.get("grpc-accept-encoding", "").split(",")))
    metadata = {name: text for name, text in headers.items() if _is_metadata(name)}
    return Head(path, metadata, timeout_s, encoding, accepts, refusal=refusal)


def _is_metadata(name: str) -> bool:
    """Whether a field is the caller's own, and text."""
    return not name.startswith("grpc-") and not name.endswith("-bin") and name not in _TRANSPORTS


def literal(name: str, value: str) -> bytes:
    """A field as a literal that no table keeps."""
    return b"\0" + _text(name.encode()) + _text(value.encode())


def _text(text: bytes) -> bytes:
    """A length as HPACK's integer of 7 bits and more (RFC 7541, 5.1), and the text as it is."""
    length = len(text)
    if length < 127:
        return bytes([length]) + text
    encoded = bytearray([127])
    length -= 127
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    encoded.append(length)
    return bytes(encoded) + text


def http_status(status: int) -> bytes:
    """The block of an answer that is none of gRPC."""
    return _STATUS_CODES.get(status) or b"\x08" + _text(str(status).encode())


def quoted(text: str) -> str:
    """A text as grpc-message has it: bytes of UTF-8, those that do not print as %XX."""
    return quote_from_bytes(text.encode("utf-8", "replace"), safe=_UNQUOTED)


def trailers(status: int, text: str = "", more: Iterable[tuple[str, str]] = ()) -> bytes:
    """The block behind the last message: a status of gRPC by its number, words, and metadata."""
    fields = [literal("grpc-status", str(status))]
    if text:
        fields.append(literal("grpc-message", quoted(text)))
    return b"".join([*fields, *(literal(name, value) for name, value in more)])


def answer(encoding: str) -> bytes:
    """The block before the first message, whose messages may be compressed in one way."""
    block = _STATUS_CODES[200] + literal("content-type", "application/grpc")
    if encoding != "identity":
        block += literal("grpc-encoding", encoding)
    return block + literal("grpc-accept-encoding", ACCEPTED)

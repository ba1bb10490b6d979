"""Bodies that are compressed, gzip or deflate: what they inflate to is bounded while it grows.

Source: RFC 9110, 8.4.1 (deflate is the zlib format), RFC 1950, RFC 1952 (one member).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator

from twofour.serve.errors import MalformedError, TooLargeError

WINDOW = {"gzip": 31, "deflate": 15}
FAST = 1
STEP_BYTES = 1 << 20
"""What is inflated is counted in such steps."""


def uncounted(size: int) -> None:
    """What `inflate` calls where nobody counts."""


def inflate(
    body: bytes | bytearray | memoryview,
    encoding: str,
    most_bytes: int,
    took: Callable[[int], None] = uncounted,
) -> bytes:
    """The body that was compressed.

    Args:
        body: as it was sent.
        encoding: gzip, deflate or identity, in any case.
        most_bytes: that it may have.
        took: is called with bytes as they come out; what it raises ends this.

    Raises:
        MalformedError: another encoding, damaged data, or data that ends early.
        TooLargeError: it has more bytes.
    """
    encoding = encoding.strip().lower()
    if encoding == "identity":
        took(len(body))
        return bytes(body)
    if encoding not in WINDOW:
        expected = f"expected one of {', '.join(WINDOW)}"
        raise MalformedError(
            "the body has an unknown Content-Encoding",
            [expected, f"got {encoding[:40]!r}"],
            "compress with gzip or deflate, or not at all",
        )
    parts, size = [], 0
    try:
        for part in _steps(body, encoding):
            size += len(part)
            if size > most_bytes:
                raise TooLargeError(
                    "the body is too large once it is inflated",
                    [f"expected at most {most_bytes} bytes", "got more"],
                    "send fewer rows in one request",
                )
            took(len(part))
            parts.append(part)
    except zlib.error as error:
        raise damaged(encoding, "other data") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _steps(body: bytes | bytearray | memoryview, encoding: str) -> Iterator[bytes]:
    """What comes out, at most `STEP_BYTES` at a time.

    Raises:
        zlib.error: the data is damaged.
        MalformedError: it ends early, or goes on behind its end.
    """
    stream, whole, fed = zlib.decompressobj(WINDOW[encoding]), memoryview(body), 0
    while fed < len(whole) and not stream.eof:
        part = stream.decompress(whole[fed : fed + STEP_BYTES], STEP_BYTES)
        fed += STEP_BYTES
        yield part
        while len(part) == STEP_BYTES and not stream.eof:  # more may be there, without input too
            part = stream.decompress(stream.unconsumed_tail, STEP_BYTES)
            yield part
    if not stream.eof:
        raise damaged(encoding, "data that ends early")
    if behind := len(stream.unused_data) + max(0, len(whole) - fed):
        raise damaged(encoding, f"{behind} bytes behind its end")


def damaged(encoding: str, got: str) -> MalformedError:
    """The refusal of a body that cannot be inflated."""
    fix = "compress the whole body once" + (", in the zlib format" if encoding == "deflate" else "")
    what = f"the body is not what Content-Encoding: {encoding} says"
    return MalformedError(what, [f"expected {encoding} data", f"got {got}"], fix)


def deflate(buffers: Iterable[bytes | bytearray | memoryview], encoding: str) -> bytes:
    """The buffers, one after another, compressed.

    Args:
        buffers: C-contiguous.
        encoding: gzip or deflate.
    """
    stream = zlib.compressobj(FAST, zlib.DEFLATED, WINDOW[encoding])
    return b"".join([*(stream.compress(buffer) for buffer in buffers), stream.flush()])


def asked(accept: str) -> str:
    """The encoding that a reply is to have, "" for none.

    A client that names one encoding alone wants it, as those of Triton do. A list of all that a
    library can read, which many send without being told to, is no wish: tensors hardly shrink, and
    compressing them takes longer than most networks do.

    Args:
        accept: the header Accept-Encoding.
    """
    name = accept.strip().lower()
    return name if name in WINDOW else ""

"""An ONNX file as it lies on disk: the large weights apart from everything else.

Parsing, checking and shape inference copy a model several times. What they need is the graph, not
the bytes of its weights, and those are nearly all of a file. So the file's outermost levels are
read here as what they are, a sequence of fields, and the bytes of large initializers are left out:

    field: varint key = number << 3 | kind
      kind 0: varint    kind 1: 8 bytes    kind 2: varint length, that many bytes    kind 5: 4 bytes

    ModelProto 7 graph -> GraphProto 5 initializer -> TensorProto 9 raw_data

Source: https://protobuf.dev/programming-guides/encoding, and `onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LARGE_BYTES = 4096
"""From this size on the bytes of an initializer are left out."""

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9


@dataclass(frozen=True)
class Skeleton:
    """A model without the bytes of its large initializers.

    Attributes:
        data: an encoded ModelProto.
        left_out: index in `graph.initializer` -> the bytes that its `raw_data` had.
    """

    data: bytes
    left_out: dict[int, memoryview]


def skeleton(data: bytes) -> Skeleton:
    """Leaves out the bytes of large initializers; nothing where the outermost levels are no fields.

    Args:
        data: of a file. What is left out keeps pointing into it.
    """
    view, left_out = memoryview(data), dict[int, memoryview]()
    try:
        pieces = _model(view, left_out)
    except (IndexError, ValueError):
        return Skeleton(data, {})
    return Skeleton(b"".join(pieces), left_out) if left_out else Skeleton(data, {})


def _model(view: memoryview, left_out: dict[int, memoryview]) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = []
    count = 0
    for number, kind, begin, content, end in _fields(view):
        if number != _GRAPH or kind != _BYTES:
            pieces.append(view[begin:end])
            continue
        graph, count = _graph(view[content:end], left_out, count)
        pieces += _message(_GRAPH, graph)
    return pieces


def _graph(
    view: memoryview, left_out: dict[int, memoryview], count: int
) -> tuple[list[bytes | memoryview], int]:
    """Its pieces, and the number of initializers up to its end."""
    pieces: list[bytes | memoryview] = []
    kept = 0  # up to here all fields stand in the pieces
    for number, kind, begin, content, end in _fields(view):
        if number != _INITIALIZER or kind != _BYTES:
            continue
        if end - content >= LARGE_BYTES and (found := _raw_data(view[content:end])) is not None:
            tensor, left_out[count] = found
            pieces += [view[kept:begin], *_message(_INITIALIZER, tensor)]
            kept = end
        count += 1
    return [*pieces, view[kept:]], count


def _raw_data(view: memoryview) -> tuple[list[bytes | memoryview], memoryview] | None:
    """A tensor without its bytes, and those; None unless they are large and there once."""
    found = [f for f in _fields(view) if f[0] == _RAW_DATA]
    if len(found) != 1 or found[0][1] != _BYTES:
        return None
    _, _, begin, content, end = found[0]
    return ([view[:begin], view[end:]], view[content:end]) if end - content >= LARGE_BYTES else None


def _fields(view: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Number, kind, begin, begin of the content, and end of each field.

    Raises:
        IndexError: it ends within a field.
        ValueError: not a kind that ONNX uses.
    """
    at = 0
    while at < len(view):
        key, content = _varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            size, content = _varint(view, content)
            end = content + size
        elif kind == _VARINT:
            _, end = _varint(view, content)
        elif kind in (_EIGHT, _FOUR):
            end = content + (8 if kind == _EIGHT else 4)
        else:
            raise ValueError(f"a field of kind {kind}")
        if end > len(view) or not number:
            raise IndexError(f"a field that ends at {end} of {len(view)}")
        yield number, kind, at, content, end
        at = end


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; and where it ends."""
    value, shift = 0, 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _message(number: int, pieces: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """A field that holds a message."""
    size, head = sum(len(piece) for piece in pieces), bytearray([number << 3 | _BYTES])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return [bytes([*head, size]), *pieces]

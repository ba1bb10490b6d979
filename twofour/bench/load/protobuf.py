"""The few protobuf messages that a load generator needs, read and written field by field.

A message is a row of fields: a varint of (number << 3 | kind), then by kind 0 a varint, 2 a length
and so many bytes; 1 and 5 are eight and four bytes. Source: protobuf.dev, Encoding; KServe, Open
Inference Protocol v2, gRPC, whose field numbers these are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from twofour.bench.load.client import AnswerError, Content, Feeds, ModelInfo, Tensor
from twofour.bench.load.datatypes import DATATYPES, NAMES
from twofour.bench.load.statistics import Counters

_FIXED = {1: 8, 5: 4}


def varint(number: int) -> bytes:
    """A number >= 0, seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def block(field: int, data: bytes | str) -> bytes:
    """A field of bytes, a text or a message; nothing if it is empty, as the format has it."""
    raw = data.encode() if isinstance(data, str) else data
    return varint(field << 3 | 2) + varint(len(raw)) + raw if raw else b""


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field.

    Raises:
        AnswerError: it is no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint_at(data, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint_at(data, at)
            yield key >> 3, number
            continue
        if kind == 2:
            size, at = _varint_at(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise AnswerError(f"the answer is no protobuf message: a field of kind {kind}")
        if at + size > len(data):
            raise AnswerError("the answer is no protobuf message: it ends within a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint_at(data: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends."""
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise AnswerError("the answer is no protobuf message: a number has no end")


def infer_request(model: str, version: str, feeds: Feeds) -> bytes:
    """ModelInferRequest, its tensors as raw bytes."""
    inputs, raw = [], []
    for name, array in feeds.items():
        datatype = NAMES[array.dtype.name]
        shape = b"".join(varint(size) for size in array.shape)
        inputs.append(block(5, block(1, name) + block(2, datatype) + block(3, shape)))
        data = array.astype(DATATYPES[datatype]).tobytes()
        raw.append(varint(7 << 3 | 2) + varint(len(data)) + data)  # an empty one counts, too
    return block(1, model) + block(2, version) + b"".join(inputs) + b"".join(raw)


def named(model: str, version: str) -> bytes:
    """ModelMetadataRequest and ModelStatisticsRequest: which model is asked for."""
    return block(1, model) + block(2, version)


def infer_content(body: bytes) -> tuple[list[Tensor], list[int]]:
    """Of ModelInferResponse: the outputs, and the bytes of each.

    Raises:
        AnswerError: it is none, or has outputs without bytes.
    """
    tensors, sizes = [], []
    for number, value in fields(body):
        if number == 5:
            tensors.append(_tensor(_bytes(value)))
        elif number == 6:
            sizes.append(len(_bytes(value)))
    if not tensors or len(tensors) != len(sizes):
        reason = f"expected raw bytes for each of {len(tensors)} outputs, got {len(sizes)}"
        raise AnswerError("the outputs are not complete", [reason])
    return tensors, sizes


def infer_outputs(body: bytes) -> tuple[list[Tensor], Content]:
    """Of ModelInferResponse: outputs that have the sizes that they say.

    Raises:
        AnswerError: one has not.
    """
    tensors, sizes = infer_content(body)
    for tensor, size in zip(tensors, sizes, strict=True):
        if tensor.datatype in DATATYPES:
            expected = math.prod(tensor.shape) * DATATYPES[tensor.datatype].itemsize
            if size != expected:
                reasons = [f"expected {expected} bytes for {list(tensor.shape)}, got {size}"]
                raise AnswerError(f"output {tensor.name!r} does not have its shape", reasons)
    return tensors, Content(sum(sizes), 0)


def model_info(body: bytes) -> ModelInfo:
    """Of ModelMetadataResponse.

    Raises:
        AnswerError: it is none.
    """
    found = [*fields(body)]
    inputs, outputs = (
        tuple(_tensor(_bytes(value)) for number, value in found if number == field)
        for field in (4, 5)
    )
    versions = tuple(_bytes(value).decode() for number, value in found if number == 2)
    return ModelInfo(_text(found, 1), versions, _text(found, 3), inputs, outputs)


def server_name(body: bytes) -> str:
    """Of ServerMetadataResponse: name and version."""
    found = [*fields(body)]
    return f"{_text(found, 1)} {_text(found, 2)}".strip()


def counters(body: bytes) -> Counters | None:
    """Of ModelStatisticsResponse, all its versions together; None if it has none."""
    versions = [_bytes(value) for number, value in fields(body) if number == 1]
    return sum(map(_counters, versions), Counters()) if versions else None


def _counters(version: bytes) -> Counters:
    stats = dict(fields(version))
    times = dict(fields(_bytes(stats.get(6, b""))))
    requests = _number(times.get(1, b""), 1)
    parts = [_number(times.get(field, b""), 2) for field in (3, 4, 5, 6)]
    rows, executions = (int(stats.get(field, 0)) for field in (4, 5))
    return Counters(requests, rows, executions, *parts)


def _number(duration: int | bytes, field: int) -> int:
    """Of StatisticDuration: 1 the count, 2 the nanoseconds."""
    return int(dict(fields(_bytes(duration))).get(field, 0))


def _tensor(message: bytes) -> Tensor:
    """TensorMetadata, or the head of an output."""
    found = [*fields(message)]
    shape: list[int] = []
    for number, value in found:
        if number == 3:
            shape += [value] if isinstance(value, int) else _varints(value)
    signed = tuple(size - (1 << 64) if size >> 63 else size for size in shape)
    return Tensor(_text(found, 1), _text(found, 2), signed)


def _varints(data: bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        number, at = _varint_at(data, at)
        numbers.append(number)
    return numbers


def _text(found: list[tuple[int, int | bytes]], field: int) -> str:
    values = [_bytes(value) for number, value in found if number == field]
    return values[-1].decode("utf-8", "replace") if values else ""


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise AnswerError("the answer is no such protobuf message: a number where bytes belong")
    return value

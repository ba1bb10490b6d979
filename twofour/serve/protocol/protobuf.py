"""Inference over gRPC: a message's bytes as `InferRequest`, and `InferResponse` as bytes.

Tensors lie in the message as raw bytes, each one a field of its own behind the rest:

    ModelInferRequest  = head | raw_input_contents | raw_input_contents ...
    ModelInferResponse = head | raw_output_contents ...

So only the head goes through protobuf. The raw fields are found by walking over the outermost
fields, and an input is a view of the message where it is aligned there, otherwise a copy. An answer
is joined from its head and its arrays in one copy.

Source: https://protobuf.dev/programming-guides/encoding/; KServe, Open Inference Protocol (v2) over
gRPC, https://github.com/kserve/open-inference-protocol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from twofour.serve.errors import MalformedError, TooLargeError
from twofour.serve.limits import Limits
from twofour.serve.protocol.messages import (
    BYTES,
    InferRequest,
    InferResponse,
    Parameter,
    Parameters,
    Wanted,
    datatype,
    numpy_type,
)
from twofour.serve.protocol.raw import require_size, tensor_at, texts_of
from twofour.serve.protocol.schema import message
from twofour.serve.protocol.wire import FIX, Parts, field_head, malformed, split, too_large

Array = NDArray[Any]
Buffer = bytes | memoryview

FINAL = "triton_final_response"
"""Parameter of a streamed answer: no other one comes for its request."""
MOST_BYTES = (1 << 31) - (1 << 20)
"""Of an answer's tensors; a protobuf message has fewer than 2 GB."""
_SHARED_MEMORY = "shared_memory_region"
_Request: Any = message("inference.ModelInferRequest")
_Response: Any = message("inference.ModelInferResponse")
_StreamResponse: Any = message("inference.ModelStreamInferResponse")
_LONGEST_KNOWN, _MOST_KNOWN = 4096, 256  # bytes of heads that are remembered, and their number
_ID, _RAW_OUTPUT, _INFER_RESPONSE = 3, 6, 2  # numbers of fields; the last of the streamed one
# Datatype -> the field of InferTensorContents that holds it; FP16 has none.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What the head says of an input.

    Attributes:
        values: its typed contents; None: its raw bytes follow.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size_bytes: int
    values: Array | None


@dataclass(frozen=True, slots=True)
class _Head:
    """A request without its id and its raw bytes."""

    model: str
    version: str
    tensors: tuple[_Tensor, ...]
    outputs: tuple[Wanted, ...]
    parameters: Parameters


class Reader:
    """Reads requests.

    Heads are remembered: those of one client differ in their ids and tensors alone.
    """

    def __init__(self, limits: Limits) -> None:
        """Reads within limits."""
        self._limits = limits
        self._heads: dict[bytes, _Head] = {}

    def read(self, body: bytes) -> InferRequest:
        """The request that a ModelInferRequest's bytes hold.

        Args:
            body: the message; inputs may be views of it.

        Raises:
            MalformedError: it is none, or does not follow the protocol.
            TooLargeError: it does not keep the limits.
        """
        parts = split(body, self._limits)
        raws = parts.raws
        head = self._heads.get(parts.head) if raws else None
        if head is None:
            head = self._new_head(parts.head, bool(raws))
        inputs: dict[str, Array] = {}
        if raws and len(raws) != len(head.tensors):
            expected = f"as many raw_input_contents as inputs, {len(head.tensors)}"
            raise malformed("raw bytes do not fit the inputs", str(len(raws)), expected)
        for index, tensor in enumerate(head.tensors):
            name, values = tensor.name, tensor.values
            if values is None:
                begin, end = raws[index]
                if end - begin != tensor.size_bytes:
                    what = f"input {name!r} has raw bytes of another size"
                    of = f"shape {list(tensor.shape)} of {tensor.dtype.name}"
                    raise malformed(what, f"{end - begin}", f"{tensor.size_bytes} bytes for {of}")
                values = tensor_at(body, begin, tensor.shape, tensor.dtype, name)
            inputs[name] = values
        return InferRequest(
            head.model,
            head.version,
            self._id(parts),
            inputs,
            head.outputs,
            parameters=head.parameters,
        )

    def id(self, body: bytes) -> str:
        """The id in a message that may be damaged: "" where it cannot be found."""
        try:
            return self._id(split(body, self._limits))
        except (MalformedError, TooLargeError):
            return ""

    def _id(self, parts: Parts) -> str:
        try:
            return _text(parts.id.decode(), "the id", self._limits)
        except UnicodeDecodeError as e:
            raise malformed("the id is no text", "other bytes", "UTF-8") from e

    def _new_head(self, encoded: bytes, raw: bool) -> _Head:
        """Reads a head; one that raw bytes follow is remembered."""
        limits = self._limits
        try:
            request = _Request.FromString(encoded)
        except DecodeError as e:
            raise malformed("the message is damaged", "bytes that are none") from e
        head = _Head(
            _text(request.model_name, "the model's name", limits),
            _text(request.model_version, "the version", limits),
            _tensors(request, raw, limits),
            _outputs(request, limits),
            _parameters(request.parameters, "the request", limits),
        )
        if raw and len(encoded) <= _LONGEST_KNOWN:
            if len(self._heads) >= _MOST_KNOWN:
                self._heads.clear()
            self._heads[encoded] = head
        return head


def _tensors(request: Any, raw: bool, limits: Limits) -> tuple[_Tensor, ...]:
    """The inputs of a request.

    Args:
        request: ModelInferRequest.
        raw: their values follow as raw bytes; otherwise they are typed contents.
        limits: that they have to keep.
    """
    if len(request.inputs) > limits.tensors:
        raise too_large("there are too many inputs", limits.tensors, len(request.inputs), FIX)
    found: dict[str, _Tensor] = {}
    for tensor in request.inputs:
        name = _text(tensor.name, "an input's name", limits)
        if name in found:
            raise malformed(f"input {name!r} is there twice", "it again", "each input once")
        where = f"input {name!r}"
        if _SHARED_MEMORY in _parameters(tensor.parameters, where, limits):
            raise _no_shared_memory(where)
        dtype = numpy_type(tensor.datatype[:100], name)
        require_size(name, [max(size, 0) for size in tensor.shape], dtype, limits)
        shape = tuple(tensor.shape)
        if shape and min(shape) < 0:
            raise malformed(
                f"{where} has an unusable shape", str(list(shape)), "sizes of 0 or more"
            )
        if raw and tensor.HasField("contents"):
            raise malformed(f"{where} has two values", "both", "contents or raw bytes")
        values = None if raw else _typed(tensor, shape, dtype)
        found[name] = _Tensor(name, shape, dtype, math.prod(shape) * dtype.itemsize, values)
    return tuple(found.values())


def _typed(tensor: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """A tensor of the numbers in its `contents`."""
    name = tensor.name
    field = _CONTENTS.get(tensor.datatype)
    given = [each.name for each, _ in tensor.contents.ListFields()]
    if field is None and given:
        fix = "send it as raw_input_contents"
        raise malformed(f"input {name!r} has no such contents", given[0], "raw bytes", fix)
    if any(each != field for each in given):
        raise malformed(f"input {name!r} has unusable contents", ", ".join(given), str(field))
    values = getattr(tensor.contents, field) if field else ()
    count = math.prod(shape)
    if len(values) != count:
        expected = f"{count} values for shape {list(shape)}"
        raise malformed(f"input {name!r} has unusable contents", str(len(values)), expected)
    if dtype.kind not in "iu" or dtype.itemsize >= 4:
        array = np.fromiter(values, dtype, count)
    else:
        wide = np.fromiter(values, np.int64, count)
        bounds = np.iinfo(dtype)
        if count and (wide.min() < bounds.min or wide.max() > bounds.max):
            what = f"input {name!r} has values that its datatype cannot hold"
            raise malformed(what, f"{wide.min()} to {wide.max()}", f"{bounds.min} to {bounds.max}")
        array = wide.astype(dtype)
    array.flags.writeable = False
    return array.reshape(shape)


def _outputs(request: Any, limits: Limits) -> tuple[Wanted, ...]:
    """The outputs that a request names, () where it names none."""
    tensors = request.outputs
    if len(tensors) > limits.tensors:
        raise too_large("there are too many outputs", limits.tensors, len(tensors), FIX)
    wanted: dict[str, Wanted] = {}
    for tensor in tensors:
        name = _text(tensor.name, "an output's name", limits)
        if name in wanted:
            raise malformed(f"output {name!r} is asked for twice", "it again", "each output once")
        parameters = _parameters(tensor.parameters, f"output {name!r}", limits)
        if _SHARED_MEMORY in parameters:
            raise _no_shared_memory(f"output {name!r}")
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0:
            what = f"output {name!r} has an unusable number of classes"
            raise malformed(what, repr(classes), "an integer, 0 or more")
        wanted[name] = Wanted(name, binary=True, classes=classes)
    return tuple(wanted.values())


def _parameters(given: Mapping[str, Any], where: str, limits: Limits) -> Parameters:
    """Parameters as plain values by name."""
    if not given:
        return {}
    if len(given) > limits.parameters:
        fix = "send fewer of them"
        raise too_large(f"{where} has too many parameters", limits.parameters, len(given), fix)
    found: dict[str, Parameter] = {}
    for name, choice in given.items():
        _text(name, "a parameter's name", limits)
        field = choice.WhichOneof("parameter_choice")
        if field is None:
            raise malformed(f"parameter {name!r} of {where} is unusable", "nothing", "a value")
        value = found[name] = getattr(choice, field)
        if field == "string_param":
            _text(value, f"parameter {name!r}", limits)
    return found


def _text(text: str, what: str, limits: Limits) -> str:
    """A text within the limits."""
    if len(text) > limits.name_length:
        expected = f"{limits.name_length} characters"
        raise too_large(f"{what} is too long", expected, len(text), "shorten it")
    return text


def _no_shared_memory(where: str) -> MalformedError:
    what, got = f"{where} is in shared memory", "the name of a region of shared memory"
    return malformed(what, got, "its data in the message", "send it as raw_input_contents")


def encode(response: InferResponse) -> bytes:
    """The bytes of a ModelInferResponse.

    Raises:
        TooLargeError: the answer is larger than a protobuf message may be.
    """
    return b"".join(_parts(response))


def encode_streamed(response: InferResponse) -> bytes:
    """The bytes of a ModelStreamInferResponse: a request's one and last answer.

    Raises:
        TooLargeError: the answer is larger than a protobuf message may be.
    """
    parts = [*_parts(response), _LAST]
    size = sum([part.nbytes if isinstance(part, memoryview) else len(part) for part in parts])
    return b"".join([field_head(_INFER_RESPONSE, size), *parts])


def encode_refusal(text: str, request_id: str) -> bytes:
    """The bytes of a ModelStreamInferResponse that says why a request gets no result.

    Args:
        text: for the client.
        request_id: of the request.
    """
    answer = _StreamResponse(error_message=text)
    answer.infer_response.id = request_id
    answer.infer_response.parameters[FINAL].bool_param = True
    encoded: bytes = answer.SerializeToString()
    return encoded


def _parts(response: InferResponse) -> list[Buffer]:
    """What a ModelInferResponse is joined from; fields may stand in any order."""
    tensors = tuple([(name, y.dtype, y.shape) for name, y in response.outputs.items()])
    parts: list[Buffer] = [_response_head(response.model, response.version, tensors)]
    if response.id:
        name = response.id.encode()
        parts += (field_head(_ID, len(name)), name)
    if response.parameters:
        parts.append(_as_field(response.parameters))
    size = 0
    for array in response.outputs.values():
        raw = texts_of(array) if array.dtype.kind == "O" else array.reshape(-1).data
        length = len(raw) if isinstance(raw, bytes) else raw.nbytes
        parts += (field_head(_RAW_OUTPUT, length), raw)
        size += length
    if size > MOST_BYTES:
        fix = "ask for fewer outputs, or send fewer rows in one request"
        raise too_large("the answer is too large", f"{MOST_BYTES} bytes", size, fix)
    return parts


@lru_cache(_MOST_KNOWN)
def _response_head(
    model: str, version: str, tensors: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
) -> bytes:
    """A ModelInferResponse without its id, its parameters and its tensors' bytes."""
    head = _Response(model_name=model, model_version=version)
    for name, dtype, shape in tensors:
        kind = BYTES if dtype.kind == "O" else datatype(dtype)
        head.outputs.add(name=name, datatype=kind, shape=shape)
    encoded: bytes = head.SerializeToString()
    return encoded


def _as_field(parameters: Parameters) -> bytes:
    """A ModelInferResponse of parameters alone."""
    response = _Response()
    for name, value in parameters.items():
        choice = response.parameters[name]
        if isinstance(value, bool):
            choice.bool_param = value
        elif isinstance(value, int) and value < 1 << 63:
            choice.int64_param = value
        elif isinstance(value, int):
            choice.uint64_param = value
        elif isinstance(value, float):
            choice.double_param = value
        else:
            choice.string_param = value
    encoded: bytes = response.SerializeToString()
    return encoded


_LAST = _as_field({FINAL: True})

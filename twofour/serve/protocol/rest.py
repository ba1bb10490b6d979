"""Inference over HTTP: the body of a request as `InferRequest`, and `InferResponse` as a body.

    body:  JSON                                        without binary data
           JSON, raw bytes of tensor, of tensor, ...   with; Inference-Header-Content-Length is the
                                                       JSON's, each tensor says its binary_data_size

Raw bytes are little-endian, row-major, and may lie anywhere in the body: a tensor that is aligned
there is a view of it, any other one a copy. JSON has no NaN and no infinity (RFC 8259): an output
that holds one has to be asked for as binary data; sent as null or as a bare NaN, clients would read
another value or fail.

Source: KServe, Open Inference Protocol (v2) over REST,
https://github.com/kserve/open-inference-protocol; Triton's extensions binary_data, classification,
parameters and schedule_policy, https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from twofour.serve.errors import MalformedError, TooLargeError
from twofour.serve.limits import Limits
from twofour.serve.protocol import json_numbers, json_text
from twofour.serve.protocol.json_numbers import shown
from twofour.serve.protocol.messages import (
    BYTES,
    InferRequest,
    InferResponse,
    Parameters,
    Wanted,
    datatype,
    numpy_type,
)
from twofour.serve.protocol.raw import require_size, tensor_at, texts_of

Array = NDArray[Any]
BINARY_SIZE = "binary_data_size"
SHARED_MEMORY = "shared_memory_region"
REMEMBERED_BYTES = 4096
BODY_FIX = "send a JSON object of the Open Inference Protocol, version 2"


def decode(
    body: bytes | bytearray | memoryview,
    header_length: int | None,
    model: str,
    version: str,
    limits: Limits,
) -> InferRequest:
    """The request that a body holds.

    Args:
        body: not compressed; inputs may be views of it, so it has to stay as it is.
        header_length: bytes of its JSON, None where it is all JSON.
        model: of the request's path.
        version: of the path, "" for none.
        limits: that the request has to keep.

    Raises:
        MalformedError: the body does not follow the protocol.
        TooLargeError: it does not keep the limits.
    """
    size = len(body)
    if size > limits.body_bytes:
        expected = f"expected at most {limits.body_bytes} bytes"
        raise TooLargeError(
            "the body is too large", [expected, f"got {size}"], "send fewer rows in one request"
        )
    if header_length is None:
        header_length = size
    elif not 0 < header_length <= size:
        raise malformed(
            "Inference-Header-Content-Length does not fit the body",
            f"expected 1 to {size}, the body's bytes",
            f"got {header_length}",
            "send the number of bytes of the JSON that the body begins with",
        )
    text = bytes(body[:header_length])
    head = (remembered if header_length <= REMEMBERED_BYTES else head_of)(text, limits)
    return InferRequest(
        model,
        version,
        head.id,
        inputs_of(head, body, header_length),
        head.outputs,
        head.binary,
        head.parameters,
    )


@dataclass(frozen=True, slots=True)
class Input:
    """What a request's JSON says of an input.

    Attributes:
        name: of the input.
        dtype: of its elements.
        shape: within the limits.
        size: of its raw bytes; None where the JSON has its numbers.
        data: these, read-only.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int | None
    data: Array | None


@dataclass(frozen=True, slots=True)
class Head:
    """A request's JSON, checked; the same text is the same head, so it may be kept."""

    id: str
    inputs: tuple[Input, ...]
    outputs: tuple[Wanted, ...]
    binary: bool
    parameters: Parameters


def head_of(text: bytes, limits: Limits) -> Head:
    """Reads a request's JSON.

    Raises:
        MalformedError, TooLargeError: as `decode`.
    """
    document = json_text.parse(text, limits)
    if type(document) is not dict:
        raise malformed("the body is no object", "expected a JSON object", f"got {shown(document)}")
    parameters = parameters_of(document, "the request", limits)
    return Head(
        text_of(document, "id", "the request", limits, ""),
        tuple(input_of(entry, limits) for entry in objects_of(document, "inputs", limits)),
        outputs_of(document, parameters, limits),
        flag(parameters, "binary_data_output", False),
        parameters,
    )


remembered = lru_cache(maxsize=256)(head_of)
"""Clients send the same JSON again and again before raw bytes."""


def input_of(entry: dict[str, Any], limits: Limits) -> Input:
    """One input of the JSON."""
    name = text_of(entry, "name", "an input", limits)
    dtype = numpy_type(text_of(entry, "datatype", "an input", limits), name)
    shape = shape_of(entry, name, dtype, limits)
    parameters = parameters_of(entry, "an input", limits)
    if SHARED_MEMORY in parameters:
        raise no_shared_memory(f"input {name!r}")
    size = parameters.get(BINARY_SIZE)
    if size is None:
        if "data" not in entry:
            expected = f"expected 'data', or the parameter '{BINARY_SIZE}'"
            raise malformed(f"input {name!r} has no data", expected, "got neither")
        data = json_numbers.tensor(entry["data"], shape, dtype, name)
        data.flags.writeable = False
        return Input(name, dtype, shape, None, data)
    if "data" in entry:
        expected = f"expected 'data' or the parameter '{BINARY_SIZE}'"
        raise malformed(f"input {name!r} has two values", expected, "got both")
    wanted = math.prod(shape) * dtype.itemsize
    if type(size) is not int or size != wanted:
        raise malformed(
            f"input {name!r} has a {BINARY_SIZE} that is not its own",
            f"expected {wanted} for shape {list(shape)} of {dtype.name}",
            f"got {shown(size)}",
        )
    return Input(name, dtype, shape, size, None)


def inputs_of(head: Head, body: bytes | bytearray | memoryview, begin: int) -> dict[str, Array]:
    """The inputs; raw bytes are read from `begin` on, and all have to be used."""
    inputs: dict[str, Array] = {}
    for each in head.inputs:
        if each.name in inputs:
            expected = "expected each input once"
            raise malformed(f"input {each.name!r} is there twice", expected, "got it again")
        if each.size is None:
            assert each.data is not None
            inputs[each.name] = each.data
            continue
        if begin + each.size > len(body):
            expected = f"expected {each.size} bytes of input {each.name!r} from byte {begin} on"
            raise malformed("the body ends early", expected, f"got {len(body) - begin}")
        inputs[each.name] = tensor_at(body, begin, each.shape, each.dtype, each.name)
        begin += each.size
    if begin != len(body):
        raise malformed(
            "the body has bytes that belong to no input",
            f"expected {begin} bytes: the JSON, and {BINARY_SIZE} of each input",
            f"got {len(body)}",
        )
    return inputs


def shape_of(
    entry: dict[str, Any], name: str, dtype: np.dtype[Any], limits: Limits
) -> tuple[int, ...]:
    """The shape of an input, of a size within the limits."""
    shape = entry.get("shape")
    if type(shape) is not list or set(map(type, shape)) - {int} or min(shape, default=0) < 0:
        got = f"got {shown(shape)}" if type(shape) is not list else "got a list of something else"
        raise malformed(
            f"input {name!r} has an unusable shape", "expected a list of sizes, 0 or more", got
        )
    require_size(name, shape, dtype, limits)
    return tuple(shape)


def outputs_of(
    document: dict[str, Any], parameters: Parameters, limits: Limits
) -> tuple[Wanted, ...]:
    """The outputs that a request names, () where it names none."""
    if document.get("outputs") is None:
        return ()
    default = flag(parameters, "binary_data_output", False)
    wanted: dict[str, Wanted] = {}
    for entry in objects_of(document, "outputs", limits):
        name = text_of(entry, "name", "an output", limits)
        if name in wanted:
            expected = "expected each output once"
            raise malformed(f"output {name!r} is asked for twice", expected, "got it again")
        own = parameters_of(entry, "an output", limits)
        if SHARED_MEMORY in own:
            raise no_shared_memory(f"output {name!r}")
        classes = own.get("classification", 0)
        if type(classes) is not int or classes < 0:
            what = f"output {name!r} has an unusable number of classes"
            raise malformed(what, "expected an integer, 0 or more", f"got {shown(classes)}")
        wanted[name] = Wanted(name, flag(own, "binary_data", default), classes)
    return tuple(wanted.values())


def objects_of(document: dict[str, Any], key: str, limits: Limits) -> Sequence[dict[str, Any]]:
    """The list of objects under a key of the request."""
    entries = document.get(key)
    if type(entries) is not list or set(map(type, entries)) - {dict}:
        got = "nothing" if entries is None else "something else"
        raise malformed(f"{key!r} is unusable", "expected a list of objects", f"got {got}")
    if len(entries) > limits.tensors:
        expected = f"expected at most {limits.tensors}"
        raise TooLargeError(f"there are too many {key}", [expected, f"got {len(entries)}"])
    return entries


def parameters_of(entry: dict[str, Any], where: str, limits: Limits) -> Parameters:
    """The parameters of the request or a tensor: numbers, texts and booleans by name."""
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        expected, got = "expected an object", f"got {shown(parameters)}"
        raise malformed(f"the parameters of {where} are unusable", expected, got)
    if len(parameters) > limits.parameters:
        expected = f"expected at most {limits.parameters}"
        raise TooLargeError(f"{where} has too many parameters", [expected])
    for name, value in parameters.items():
        if type(value) not in (bool, int, float, str):
            expected = "expected a number, a text or a boolean"
            got = f"got {shown(value)}"
            raise malformed(f"parameter {shown(name)} of {where} is unusable", expected, got)
        longest = max(len(name), len(value) if type(value) is str else 0)
        if longest > limits.name_length:
            expected = f"expected at most {limits.name_length} characters"
            raise TooLargeError(f"parameter {shown(name)} of {where} is too long", [expected])
    return parameters


def text_of(
    entry: dict[str, Any], key: str, where: str, limits: Limits, default: str | None = None
) -> str:
    """The text under a key; without a default it has to be there and not be empty."""
    value = entry.get(key)
    if value is None:
        value = default
    if type(value) is not str or (default is None and not value):
        got = "nothing" if value is None else shown(value)
        raise malformed(f"{where} has an unusable {key!r}", "expected a text", f"got {got}")
    if len(value) > limits.name_length:
        expected = f"expected at most {limits.name_length} characters"
        raise TooLargeError(f"{key!r} of {where} is too long", [expected, f"got {len(value)}"])
    return value


def flag(parameters: Parameters, name: str, default: bool) -> bool:
    """A parameter that is true or false."""
    value = parameters.get(name, default)
    if type(value) is not bool:
        expected, got = "expected true or false", f"got {shown(value)}"
        raise malformed(f"parameter {name!r} is unusable", expected, got)
    return value


def malformed(what: str, expected: str, got: str, fix: str = BODY_FIX) -> MalformedError:
    """A refusal with its reasons."""
    return MalformedError(what, [expected, got], fix)


def no_shared_memory(where: str) -> MalformedError:
    """The refusal of a tensor in shared memory."""
    expected, got = "expected its data in the message", "got the name of a region of shared memory"
    return malformed(f"{where} is in shared memory", expected, got, "send it as binary data")


def encode(response: InferResponse, request: InferRequest) -> tuple[bytes, list[memoryview]]:
    """The reply to a request.

    Args:
        response: the answer; its arrays have to stay as they are until the reply is sent.
        request: which says what is sent as binary data.

    Returns:
        The JSON, and the raw bytes that follow it: views of the response's arrays. Where there are
        some, the header Inference-Header-Content-Length has to give the JSON's length.

    Raises:
        MalformedError: an output holds NaN or infinity and is not asked for as binary data.
    """
    binary = {wanted.name: wanted.binary for wanted in request.outputs}
    buffers: list[memoryview] = []
    outputs = []
    for name, array in response.outputs.items():
        texts = array.dtype.kind == "O"
        entry: dict[str, Any] = {
            "name": name,
            "datatype": BYTES if texts else datatype(array.dtype),
            "shape": array.shape,
        }
        if binary.get(name, request.binary):
            raw = np.frombuffer(texts_of(array), np.uint8) if texts else array
            entry["parameters"] = {BINARY_SIZE: raw.nbytes}
            if raw.nbytes:
                buffers.append(raw.reshape(-1).view(np.uint8).data)
        elif texts:
            entry["data"] = [text.decode() for text in array.reshape(-1).tolist()]
        else:
            entry["data"] = finite(array, name)
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = dict(response.parameters)
    document["outputs"] = outputs
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), buffers


def finite(array: Array, name: str) -> Array:
    """The elements of an output as orjson writes them, row-major, in one dimension."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise malformed(
            f"output {name!r} holds NaN or infinity",
            "expected numbers that JSON has",
            "got one that it has not",
            "ask for the output as binary data",
        )
    return array.reshape(-1)

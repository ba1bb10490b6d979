"""The protocol over HTTP: tensors as bytes behind a JSON head, or as numbers in JSON.

Source: KServe, Open Inference Protocol v2, HTTP/REST; Triton, its binary tensor data extension.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson

from twofour.bench.load.client import (
    Answer,
    AnswerError,
    Content,
    Done,
    Feeds,
    ModelInfo,
    Target,
    Tensor,
    require_answer,
)
from twofour.bench.load.datatypes import DATATYPES, NAMES
from twofour.bench.load.http import Connections
from twofour.bench.load.statistics import Counters
from twofour.core.errors import InputError


class HttpClient:
    """A `Client` over HTTP."""

    def __init__(self, target: Target, timeout_s: float, *, binary: bool) -> None:
        """Connects to nothing yet.

        Args:
            target: where to.
            timeout_s: after which a request has failed.
            binary: tensors as bytes, both ways; else as JSON.
        """
        self.target = target
        self._binary = binary
        self._connections = Connections(target, timeout_s)
        version = f"/versions/{target.version}" if target.version else ""
        self._model = f"/v2/models/{quote(target.model, safe='')}{version}"

    @property
    def held(self) -> int:
        """Requests that had to wait for a connection."""
        return self._connections.held

    async def open(self, most: int) -> None:
        """See `Client`."""
        try:
            await self._connections.open(most)
        except OSError as e:
            raise InputError(
                f"cannot connect to {self.target.url}",
                [str(e) or "no answer within the time of --timeout"],
                "start the server, and check --url",
            ) from e

    async def close(self) -> None:
        """See `Client`."""
        await self._connections.close()

    async def server(self) -> str:
        """See `Client`."""
        answer = await self._get("/v2")
        if answer.error == "404":
            return "unnamed"
        told = _document(require_answer(answer, self.target, "no server metadata"))
        return f"{told.get('name', 'unnamed')} {told.get('version', '')}".strip()

    async def model(self) -> ModelInfo:
        """See `Client`."""
        what = f"no metadata of model {self.target.model!r}"
        answer = await self._get(self._model)
        try:
            return model_info(_document(require_answer(answer, self.target, what)))
        except AnswerError as e:
            raise InputError(
                f"{self.target.url}: {what}", [str(e)], "give a server that speaks KServe v2"
            ) from e

    async def statistics(self) -> Counters | None:
        """See `Client`."""
        answer = await self._get(f"{self._model}/stats")
        if answer.error:
            return None
        return counters(_document(answer.body))

    def encode(self, feeds: Feeds) -> bytes:
        """See `Client`."""
        head, tensors = encode_infer(feeds, binary=self._binary)
        lines = ["content-type: application/json"]
        if self._binary:
            lines = [
                "content-type: application/octet-stream",
                f"inference-header-content-length: {len(head)}",
            ]
        lines.append(f"content-length: {len(head) + len(tensors)}")
        return self._message("POST", f"{self._model}/infer", lines) + head + tensors

    def outputs(self, answer: Answer) -> tuple[Sequence[Tensor], Content]:
        """See `Client`."""
        return decode_infer(answer.body, answer.json_bytes)

    def holds(self, answer: Answer, content: Content) -> bool:
        """See `Client`: of bytes the length says it, numbers are counted."""
        if answer.json_bytes >= 0 and not content.values:
            return len(answer.body) - answer.json_bytes == content.tensor_bytes
        try:
            return self.outputs(answer)[1] == content
        except AnswerError:
            return False

    def send(self, message: bytes, done: Done) -> None:
        """See `Client`."""
        self._connections.send(message, done)

    async def _get(self, path: str) -> Answer:
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.send(self._message("GET", path, []), answered.set_result)
        return await answered

    def _message(self, method: str, path: str, lines: list[str]) -> bytes:
        """The head of a request."""
        headers = [f"{name}: {value}" for name, value in self.target.headers.items()]
        first = f"{method} {self.target.path}{path} HTTP/1.1"
        whole = [first, f"host: {self.target.authority}", *headers, *lines, "", ""]
        return "\r\n".join(whole).encode("latin-1")


def encode_infer(feeds: Feeds, *, binary: bool) -> tuple[bytes, bytes]:
    """The JSON of a request, and the bytes behind it."""
    inputs: list[dict[str, Any]] = []
    for name, array in feeds.items():
        each = {"name": name, "shape": array.shape, "datatype": NAMES[array.dtype.name]}
        more: dict[str, Any] = {"data": array.ravel().tolist()}
        if binary:
            more = {"parameters": {"binary_data_size": array.nbytes}}
        inputs.append(each | more)
    if not binary:
        return orjson.dumps({"inputs": inputs}), b""
    document = {"parameters": {"binary_data_output": True}, "inputs": inputs}
    arrays = [array.astype(DATATYPES[NAMES[array.dtype.name]]) for array in feeds.values()]
    return orjson.dumps(document), b"".join(array.tobytes() for array in arrays)


def decode_infer(body: bytes, json_bytes: int) -> tuple[list[Tensor], Content]:
    """The outputs of an answer, without their values.

    Args:
        body: of the HTTP message.
        json_bytes: how much of it is JSON; -1 for all.

    Raises:
        AnswerError: it does not follow the protocol.
    """
    if json_bytes > len(body):
        raise AnswerError("the JSON of the answer is longer than the answer")
    found = _document(body if json_bytes < 0 else body[:json_bytes])
    binary = 0 if json_bytes < 0 else len(body) - json_bytes
    tensors, tensor_bytes, values = [], 0, 0
    for output in _list(found, "outputs"):
        tensor = _tensor(output)
        size = _size_of(output)
        if size is None:
            count = np.size(output.get("data", ()))
            values += count
        else:
            tensor_bytes += size
            itemsize = DATATYPES[tensor.datatype].itemsize if tensor.datatype in DATATYPES else 0
            count = size // itemsize if itemsize else math.prod(tensor.shape)
        expected = math.prod(tensor.shape)
        if count != expected:
            raise AnswerError(
                f"output {tensor.name!r} does not have its shape",
                [f"expected {expected} values for {list(tensor.shape)}, got {count}"],
            )
        tensors.append(tensor)
    if not tensors or tensor_bytes != binary:
        reason = f"expected outputs of {tensor_bytes} bytes in all, got {binary} bytes"
        raise AnswerError("the outputs are not complete", [reason])
    return tensors, Content(tensor_bytes, values)


def model_info(told: dict[str, Any]) -> ModelInfo:
    """Metadata of a model.

    Raises:
        AnswerError: it does not follow the protocol.
    """
    inputs, outputs = (
        tuple(_tensor(each) for each in _list(told, key)) for key in ("inputs", "outputs")
    )
    versions = tuple(str(version) for version in told.get("versions") or ())
    name, platform = (str(told.get(key, "")) for key in ("name", "platform"))
    return ModelInfo(name, versions, platform, inputs, outputs)


def counters(told: dict[str, Any]) -> Counters | None:
    """Triton's statistics of one model; None if there are none."""
    found = told.get("model_stats")
    if not isinstance(found, list) or not found:
        return None
    return sum((_counters(each) for each in found if isinstance(each, dict)), Counters())


def _counters(version: dict[str, Any]) -> Counters:
    stats = version.get("inference_stats") or {}
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    times = [int((stats.get(part) or {}).get("ns", 0)) for part in parts]
    requests = int((stats.get("success") or {}).get("count", 0))
    sizes = (int(version.get(key, 0)) for key in ("inference_count", "execution_count"))
    return Counters(requests, *sizes, *times)


def _size_of(output: dict[str, Any]) -> int | None:
    """Bytes of an output that is sent as such."""
    parameters = output.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and not (isinstance(size, int) and size >= 0):
        raise AnswerError(f"bad binary_data_size {size!r}")
    return size


def _tensor(told: dict[str, Any]) -> Tensor:
    shape, name, datatype = (told.get(key) for key in ("shape", "name", "datatype"))
    if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
        raise AnswerError(f"tensor {name!r} has no shape", [f"got {shape!r}"])
    return Tensor(str(name), str(datatype), tuple(shape))


def _list(told: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = told.get(key)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise AnswerError(f"the answer has no list of {key}")
    return found


def _document(body: bytes) -> dict[str, Any]:
    """One JSON object.

    Raises:
        AnswerError: it is none.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise AnswerError("the answer is no JSON", [str(e)]) from e
    if not isinstance(found, dict):
        raise AnswerError("the answer is no JSON object")
    return found

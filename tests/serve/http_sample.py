"""An HTTP server in a thread, over a service that computes nothing but y = 2 x, for tests."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import orjson
import uvloop

from twofour.serve.auth import Auth
from twofour.serve.errors import BusyError, ForbiddenError, MalformedError, NotFoundError
from twofour.serve.http.api import Api, Page, Parts
from twofour.serve.http.server import HttpServer
from twofour.serve.http.timeouts import Timeouts
from twofour.serve.limits import Limits
from twofour.serve.protocol.classes import classified
from twofour.serve.protocol.messages import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    TensorMetadata,
)
from twofour.serve.service import Call, IndexEntry

T = TypeVar("T")


class Doubling:
    """A service with one model "double" and versions 1 and 2.

    `parameters` of a request steer it: "sleep" seconds, "raise" a kind of error.
    """

    def __init__(self) -> None:
        self.live, self.ready = True, True
        self.name, self.version = "twofour", "0"
        self.extensions = ("binary_tensor_data",)
        self.calls: list[Call] = []
        self.cancelled = 0
        self.begun = 0
        self.loaded: list[tuple[str, str]] = []

    def model_ready(self, name: str, version: str = "") -> bool:
        self.known(name, version)
        return self.ready

    def known(self, name: str, version: str) -> None:
        if name != "double" or version not in ("", "1", "2"):
            raise NotFoundError(f"there is no model {name!r}", [], "see the index")

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        self.known(name, version)
        tensors = [(TensorMetadata(n, "FP32", (-1, 3)),) for n in ("x", "y")]
        return ModelMetadata(name, ("1", "2"), "twofour", *tensors)

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        self.known(name, version)
        return {"name": name, "max_batch_size": 8}

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        if name:
            self.known(name, version)
        return [{"name": "double", "version": version or "2", "inference_count": self.begun}]

    def index(self, ready_only: bool = False) -> list[IndexEntry]:
        found = [IndexEntry("double", "2", "READY"), IndexEntry("old", "", "UNAVAILABLE", "gone")]
        return found[:1] if ready_only else found

    async def load(self, name: str, config: str = "") -> None:
        self.loaded.append((name, config))

    async def unload(self, name: str) -> None:
        if name == "kept":
            raise ForbiddenError("this model stays")

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        self.known(request.model, request.version)
        self.begun += 1
        self.calls.append(call)
        wish = request.parameters.get("raise")
        if wish == "busy":
            raise BusyError("the queue is full", retry_after_s=2.5)
        if wish == "bug":
            raise RuntimeError("a secret of the server's")
        try:
            await asyncio.sleep(float(request.parameters.get("sleep", 0)))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if "x" not in request.inputs:
            raise MalformedError("input 'x' is missing")
        with np.errstate(all="ignore"):
            y = request.inputs["x"] * 2
        outputs = {w.name: classified(y, w.classes) if w.classes else y for w in request.outputs}
        return InferResponse(request.model, "2", request.id, outputs or {"y": y})


class Running:
    """A server, the loop that runs it, and raw sockets to it."""

    def __init__(self, api: Api, timeouts: Timeouts, tls: ssl.SSLContext | None, most: int) -> None:
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.errors.append(context))
        self.server = HttpServer(api, timeouts, most)
        self.port = self.wait(self.server.start("127.0.0.1", 0, tls))
        self.url = f"127.0.0.1:{self.port}"

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), 10)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def ask(self, *parts: bytes) -> bytes:
        """Sends parts, says that no more comes only by reading, and reads until the end."""
        with self.connect() as client:
            for part in parts:
                client.sendall(part)
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    got = b""
    try:
        while part := client.recv(1 << 16):
            got += part
    except ConnectionResetError:
        got += b"<reset>"
    return got


def read_reply(client: socket.socket, head: bool = False) -> tuple[int, dict[str, str], bytes]:
    """One reply: status, headers, body."""
    got = b""
    while b"\r\n\r\n" not in got:
        part = client.recv(1)
        if not part:
            raise EOFError(got)
        got += part
    lines = got.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    body = b""
    while not head and len(body) < int(headers.get("content-length", 0)):
        body += client.recv(int(headers["content-length"]) - len(body))
    return int(lines[0].split()[1]), headers, body


@contextmanager
def serving(
    service: Any,
    auth: Auth | None = None,
    timeouts: Timeouts | None = None,
    limits: Limits | None = None,
    tls: ssl.SSLContext | None = None,
    most: int = 100,
) -> Iterator[Running]:
    pages = {"/page/": Page(b"text/html; charset=utf-8", b"<p>status")}

    async def metrics(accept: str) -> tuple[bytes, str]:
        return b"# HELP a b\n", "text/plain; charset=utf-8"

    parts = Parts(
        service,
        auth or Auth(None, None, True),
        metrics,
        lambda since: b'{"since": %d}' % since,
        limits or Limits(),
        pages,
    )
    running = Running(Api(parts), timeouts or Timeouts(), tls, most)
    try:
        yield running
    finally:
        running.wait(running.server.stop(0.0))
        running.loop.call_soon_threadsafe(running.loop.stop)
        running.thread.join(10)
        running.loop.close()
    assert running.errors == []


def infer_bytes(
    x: np.ndarray, headers: bytes = b"", parameters: dict[str, Any] | None = None
) -> bytes:
    """One request for inference with raw bytes, as a client of Triton sends it."""
    entry = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
    entry["parameters"] = {"binary_data_size": x.nbytes}
    head = orjson.dumps(
        {"inputs": [entry], "parameters": {"binary_data_output": True, **(parameters or {})}}
    )
    return (
        b"POST /v2/models/double/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n"
        b"Inference-Header-Content-Length: %d\r\n%b\r\n%b%b"
        % (len(head) + x.nbytes, len(head), headers, head, x.tobytes())
    )

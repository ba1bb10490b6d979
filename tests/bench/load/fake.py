"""A small KServe v2 server over HTTP, in a thread: right and wrong answers, 503s, stalls, hang-ups.

The model `double` answers y = 2 x; other answers are those that a `Mood` asks for.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

JSON_BYTES = "inference-header-content-length"
Head = dict[str, str]


@dataclass
class Mood:
    """What the server does with the n-th request to infer, from 0.

    Attributes:
        status: of the answer.
        garbage: what it sends instead of an answer; b"" to send none and hang up.
        delay_s: before it answers; all others wait, too, as for a stalled process.
        closes: ends the connection after each answer.
        truncated: the tensor of the answer is one value short.
    """

    status: Callable[[int], int] = lambda n: 200
    garbage: Callable[[int], bytes | None] = lambda n: None
    delay_s: Callable[[int], float] = lambda n: 0.0
    closes: bool = False
    truncated: Callable[[int], bool] = lambda n: False
    shape: tuple[int, ...] = (-1, 4)
    statistics: bool = True


@dataclass
class Seen:
    """What came, to be looked at by a test."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    headers: list[Head] = field(default_factory=list)
    connections: int = 0
    most_open: int = 0


class FakeServer:
    def __init__(self, mood: Mood) -> None:
        self.mood, self.seen = mood, Seen()
        self.calls, self.open, self.executed = itertools.count(), 0, 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.connections += 1
        try:
            while await self.one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection stays."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        _, path, _ = first.split(" ")
        if not path.endswith("/infer"):
            status, document = self.told(path)
            return await self.reply(writer, status, json.dumps(document).encode(), {})
        number = next(self.calls)
        self.seen.headers.append(headers)
        garbage, status = self.mood.garbage(number), self.mood.status(number)
        self.open += 1
        self.seen.most_open = max(self.seen.most_open, self.open)
        await asyncio.sleep(0)
        time.sleep(self.mood.delay_s(number))  # on purpose: all others wait
        self.open -= 1
        if garbage is not None:
            writer.write(garbage)
            await writer.drain()
            return False
        if status != 200:
            error = {"error": f"status {status}, on purpose"}
            return await self.reply(writer, status, json.dumps(error).encode(), {})
        return await self.infer(writer, headers, body, short=self.mood.truncated(number))

    def told(self, path: str) -> tuple[int, object]:
        if path == "/v2":
            return 200, {"name": "fake", "version": "1", "extensions": []}
        if path == "/v2/models/double":
            x = {"name": "x", "datatype": "FP32", "shape": list(self.mood.shape)}
            told = {"name": "double", "versions": ["1"], "platform": "fake"}
            return 200, {**told, "inputs": [x], "outputs": [{**x, "name": "y"}]}
        if path == "/v2/models/double/stats" and self.mood.statistics:
            n = self.executed
            times = {key: {"count": n, "ns": ns * n} for key, ns in TIMES_NS.items()}
            stats = {"inference_count": 3 * n, "execution_count": n, "inference_stats": times}
            return 200, {"model_stats": [{"name": "double", "version": "1", **stats}]}
        return 404, {"error": f"nothing at {path}"}

    async def infer(
        self, writer: asyncio.StreamWriter, headers: Head, body: bytes, *, short: bool
    ) -> bool:
        size = int(headers.get(JSON_BYTES, len(body)))
        request = json.loads(body[:size])
        (x,) = request["inputs"]
        data = body[size:] if JSON_BYTES in headers else np.array(x["data"], "<f4").tobytes()
        values = np.frombuffer(data, "<f4").reshape(x["shape"])
        self.seen.shapes.append(values.shape)
        self.seen.values.append(values)
        self.executed += 1
        out = (2 * values).ravel()[: -1 if short else None]
        y = {"name": "y", "datatype": "FP32", "shape": x["shape"]}
        document = {"model_name": "double", "model_version": "1", "outputs": [y]}
        if JSON_BYTES not in headers:
            y["data"] = out.tolist()
            return await self.reply(writer, 200, json.dumps(document).encode(), {})
        y["parameters"] = {"binary_data_size": out.nbytes}
        first = json.dumps(document).encode()
        return await self.reply(writer, 200, first + out.tobytes(), {JSON_BYTES: str(len(first))})

    async def reply(
        self, writer: asyncio.StreamWriter, status: int, body: bytes, headers: Head
    ) -> bool:
        headers = {"content-length": str(len(body)), **headers}
        if self.mood.closes:
            headers["connection"] = "close"
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        return not self.mood.closes


TIMES_NS = {
    "success": 90_000,
    "queue": 50_000,
    "compute_input": 10_000,
    "compute_infer": 20_000,
    "compute_output": 5_000,
}


@contextmanager
def fake_server(mood: Mood | None = None) -> Iterator[tuple[str, FakeServer]]:
    """Its URL, and the server itself."""
    fake, ready, stop = FakeServer(mood or Mood()), threading.Event(), asyncio.Event()
    found: list[object] = []

    async def main() -> None:
        server = await asyncio.start_server(fake.connected, "127.0.0.1", 0)
        found.extend((server.sockets[0].getsockname()[1], asyncio.get_running_loop()))
        ready.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(10)
    port, loop = found
    try:
        yield f"http://127.0.0.1:{port}", fake
    finally:
        loop.call_soon_threadsafe(stop.set)  # type: ignore[attr-defined]
        thread.join(10)

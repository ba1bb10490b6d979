"""Servers with made-up load, ten minutes long, and the status page served for a browser."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

from twofour.serve.models.tally import Tally
from twofour.serve.page import HEADERS, assets
from twofour.serve.readings import ServerReading, VersionReading
from twofour.serve.status import Status
from twofour.serve.totals import Totals

HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"


@dataclass
class Load:
    """What one made-up version gets."""

    reading: VersionReading
    per_s: float
    compute_ms: float
    wave: float = 0.3
    failures: Mapping[str, float] = field(default_factory=dict)

    def second(self, at: int, chance: random.Random) -> None:
        """Counts a second's requests."""
        tally = self.reading.tally
        assert tally is not None
        burst = 2.5 if 380 < at < 420 else 1.0
        rate = self.per_s * burst * (1 + self.wave * math.sin(at / 40)) * chance.uniform(0.9, 1.1)
        for _ in range(round(rate)):
            queue = chance.expovariate(1 / (0.0004 * burst**3))
            compute = self.compute_ms / 1e3 * chance.lognormvariate(0, 0.25)
            assembly, output = chance.lognormvariate(-10.5, 0.3), chance.lognormvariate(-10, 0.4)
            tally.queue.add(queue)
            tally.assembly.add(assembly)
            tally.compute.add(compute)
            tally.output.add(output)
            tally.total.add(queue + assembly + compute + output)
        for _ in range(round(rate / 3)):
            tally.rows.add(min(int(chance.expovariate(1 / (3 * burst))) + 1, 32))
        for error, per_s in self.failures.items():
            tally.failures[error] += int(per_s * burst > chance.random())


class SampleServer:
    """A server of `loads` that ran for ten minutes."""

    def __init__(self, *loads: Load, seconds: int = 600, ready: bool = True) -> None:
        self.loads = loads
        self.reading = ServerReading(
            "resnets-eu-1",
            "0.8.0",
            ready,
            versions=[load.reading for load in loads],
            swaps={load.reading.model: 2 for load in loads},
            refused={"NotFoundError": 12},
        )
        self.status = Status(lambda: self.reading, Totals())
        chance = random.Random(1)
        begin = time.monotonic() - seconds
        for at in range(seconds):
            for load in loads:
                if load.reading.tally is not None:
                    load.second(at, chance)
            self.status.tick(begin + at)


def version(model: str, number: int, share: float = 1.0, **more: object) -> VersionReading:
    plain = VersionReading(
        model, str(number), Tally(), "READY", "", share, instances=2, memory_bytes=90 << 20
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def broken(model: str, number: int) -> VersionReading:
    reason = (
        "no engine fits this machine: it was built for cpu:znver4, this is cpu:skylake, "
        "and there is no ONNX file to build from"
    )
    return VersionReading(model, str(number), None, "UNAVAILABLE", reason)


def idle(model: str, number: int) -> Load:
    reading = VersionReading(model, str(number), None, "UNAVAILABLE", "not loaded", idle=True)
    return Load(reading, 0, 0)


def empty() -> SampleServer:
    return SampleServer(seconds=5)


def one() -> SampleServer:
    busy = version("resnet20", 3, queue_length=3, busy=1)
    return SampleServer(Load(busy, 60, 2.1, failures={"MalformedError": 0.02}))


def several() -> SampleServer:
    """Two versions of one model, a failing one, one that loads, and a hostile name."""
    errors = {"BusyError": 0.4, "TimedOutError": 0.1, "MalformedError": 0.05}
    return SampleServer(
        Load(version("resnet50", 3, 0.9, queue_length=7, busy=2), 80, 5.2, failures=errors),
        Load(version("resnet50", 4, 0.1), 9, 3.1),
        Load(broken("resnet50", 5), 0, 0),
        Load(version("minilm", 1, queue_length=1, busy=1), 25, 14.0),
        Load(VersionReading("mobilenet_v2", "1", None, "LOADING", "", 0.0), 0, 0),
        Load(version(HOSTILE, 1), 2, 0.4),
        ready=False,
    )


def forty() -> SampleServer:
    loads = [
        Load(version(f"team-{i % 5}/model_{i:02d}", 1 + i % 3, busy=i % 2), 2 + i, 0.5 + i / 4)
        for i in range(39)
    ]
    return SampleServer(*loads, Load(broken("team-3/segmenter", 1), 0, 0), seconds=150)


@contextmanager
def serving(status: Status, token: str = "") -> Iterator[str]:
    """The page and the document over HTTP, as the server has them; its address."""
    files = assets()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            name = url.path.removeprefix("/page/")
            if url.path == "/v2/status":
                given = self.headers.get("authorization", "")
                if token and given != f"Bearer {token}":
                    self.answer(401, "application/json", b"{}")
                    return
                since = int(parse_qs(url.query).get("since", ["0"])[0])
                self.answer(200, "application/json", status.document(since))
            elif url.path.startswith("/page/") and name in files:
                self.answer(200, files[name].content_type, files[name].body)
            else:
                self.answer(404, "text/plain", b"")

        def answer(self, code: int, content_type: str, body: bytes) -> None:
            self.send_response(code)
            for header, value in HEADERS.items():
                self.send_header(header, value)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/page/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

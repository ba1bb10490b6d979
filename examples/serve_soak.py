"""Runs a server under everything that production does to it, and counts what goes wrong.

Clients of both protocols (tritonclient, unmodified) send requests without a pause. Meanwhile new
versions take the place of old ones, broken ones among them; one request in a hundred is malformed;
clients hang up in the middle of a request, or cancel it. Every answer is compared with that of the
engine called directly, byte for byte.

    python examples/serve_soak.py --minutes 10
    python examples/serve_soak.py --minutes 0.5 --swaps 4

Exit code 1: an answer was wrong, a request got none, memory grew, or latency jumped at a swap.
Needs `pip install 'twofour[serve]' 'tritonclient[http,grpc]'`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tritonclient.grpc.aio as grpc_client
import tritonclient.http.aio as http_client
from numpy.typing import NDArray
from onnx import parser
from tritonclient.utils import InferenceServerException

import twofour

Array = NDArray[Any]
NAME = "images"
SHAPE = (3, 32, 32)
MALFORMED = 0.01
MOST_GROWTH = 0.02
MOST_SPIKE = 2.0


@dataclass
class Findings:
    """What was seen.

    Attributes:
        answers: right ones, by version.
        wrong: answers that are not the engine's.
        lost: requests that got no answer, by what the client said.
        refused: malformed ones that were refused.
        accepted: malformed ones that were not.
        hung_up: clients that went away on purpose.
        latencies: (when, seconds) of answers, on `time.monotonic`.
        swaps: when a new version was put in place.
        rss: (when, bytes) of the server.
    """

    answers: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    accepted: int = 0
    hung_up: int = 0
    latencies: list[tuple[float, float]] = field(default_factory=list)
    swaps: list[float] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)


class Truth:
    """What each version answers to a few inputs."""

    def __init__(self, engines: dict[str, twofour.Engine]) -> None:
        """Computes all answers directly."""
        random_ = np.random.default_rng(0)
        self.inputs = [
            random_.normal(size=(rows, *SHAPE)).astype(np.float32) for rows in (1, 1, 1, 2, 4)
        ]
        self.answers: dict[str, list[Array]] = {}
        for version, engine in engines.items():
            with twofour.Session(engine) as session:
                self.answers[version] = [session.run({"x": x})["y"] for x in self.inputs]

    def holds(self, version: str, index: int, y: Array) -> bool:
        """Whether that is what the version answers, byte for byte."""
        even = "2" if int(version) % 2 == 0 else "1"
        return bool(np.array_equal(self.answers[even][index], y))


def network(seed: int) -> twofour.Engine:
    """A small image network with weights of its own."""
    model = parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        images (float[batch, 3, 32, 32] x) => (float[batch, 10] y) {
            a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1)
            b = Relu (a)
            c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (b, w2)
            d = Relu (c)
            e = GlobalAveragePool (d)
            f = Flatten (e)
            y = MatMul (f, w3)
        }""")
    random_ = np.random.default_rng(seed)
    for name, shape in (("w1", (32, 3, 3, 3)), ("w2", (64, 32, 3, 3)), ("w3", (64, 10))):
        values = random_.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    ranges = ((1, *SHAPE), (8, *SHAPE), (16, *SHAPE))
    return twofour.build(model, shapes={"x": ranges}, threads=1, race=False)


class Repository:
    """The folder that the server polls."""

    def __init__(self, folder: Path, engines: dict[str, twofour.Engine]) -> None:
        """Writes the first version."""
        self.folder, self.model = folder, folder / NAME
        self.files = {
            v: engine.save(folder.parent / f"{v}.engine") for v, engine in engines.items()
        }
        self.last = 0
        self.model.mkdir(parents=True)
        config = {
            "batching": {"max_delay_us": 200},
            "queue": {"length": 4096},
            "execution": "thread",
            "warm_up": {"rounds": 3},
        }
        (self.model / "config.yaml").write_text(json.dumps(config))
        self.put_next()

    def put_next(self) -> None:
        """The next version: complete when its folder has its name."""
        self.last += 1
        half = self.folder.parent / f"half-{self.last}"
        half.mkdir()
        shutil.copy(self.files["2" if self.last % 2 == 0 else "1"], half / "net.engine")
        half.rename(self.model / str(self.last))

    def put_broken(self) -> None:
        """A version that is cut off, with the next number."""
        self.last += 2  # so that odd and even stay what they are
        broken = self.model / str(self.last)
        broken.mkdir()
        (broken / "net.engine").write_bytes(self.files["1"].read_bytes()[:5000])

    def tidy(self) -> None:
        """Keeps the last three versions."""
        for old in sorted(self.model.glob("[0-9]*"), key=lambda path: int(path.name))[:-3]:
            shutil.rmtree(old)


@contextmanager
def server(folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """`twofour serve` on free ports, until it is told to drain: it has to end by itself."""
    http, grpc = free_port(), free_port()
    command = [sys.executable, "-m", "twofour", "serve", str(folder), "--control", "poll"]
    command += ["--poll", "0.2", "--http", str(http), "--grpc", str(grpc), "--drain", "10"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
        try:
            yield process, http, grpc
        finally:
            process.terminate()
            code = process.wait(30)
    if code:
        raise SystemExit(f"the server ended with {code}:\n{log.read_text()[-3000:]}")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Soak:
    """Everything that happens to one server."""

    def __init__(self, truth: Truth, repository: Repository, http: int, grpc: int) -> None:
        """Nothing yet."""
        self.truth, self.repository, self.found = truth, repository, Findings()
        self.http, self.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        self.over = asyncio.Event()

    async def ask_http(self, client: Any, index: int, **options: Any) -> tuple[str, Array]:
        """One request over HTTP."""
        x = self.truth.inputs[index]
        given = http_client.InferInput("x", x.shape, "FP32")
        given.set_data_from_numpy(x, binary_data=index != 2)
        answer = await client.infer(NAME, [given], **options)
        return answer.get_response()["model_version"], answer.as_numpy("y")

    async def ask_grpc(self, client: Any, index: int, **options: Any) -> tuple[str, Array]:
        """One request over gRPC."""
        x = self.truth.inputs[index]
        given = grpc_client.InferInput("x", x.shape, "FP32")
        given.set_data_from_numpy(x)
        answer = await client.infer(NAME, [given], **options)
        return answer.get_response().model_version, answer.as_numpy("y")

    async def client(self, module: Any, url: str, ask: Callable[..., Awaitable[Any]]) -> None:
        """A client that sends one request after the other."""
        client = module.InferenceServerClient(url)
        choice = random.Random(url)
        while not self.over.is_set():
            if choice.random() < MALFORMED:
                await self.malformed(module, client)
                continue
            index = choice.randrange(len(self.truth.inputs))
            began = time.monotonic()
            try:
                version, y = await ask(client, index)
            except (TimeoutError, InferenceServerException, OSError) as e:
                self.found.lost[f"{type(e).__name__}: {e}"[:160]] += 1
                continue
            self.found.latencies.append((began, time.monotonic() - began))
            if self.truth.holds(version, index, y):
                self.found.answers[version] += 1
            else:
                self.found.wrong += 1
        await client.close()

    async def malformed(self, module: Any, client: Any) -> None:
        """A request that has to be refused."""
        x = np.zeros((1, 3, 32, 31), np.float32)
        given = module.InferInput("x", x.shape, "FP32")
        given.set_data_from_numpy(x)
        try:
            await client.infer(NAME, [given])
        except InferenceServerException:
            self.found.refused += 1
        else:
            self.found.accepted += 1

    async def hang_up(self) -> None:
        """Clients that go away: in the middle of a body, and with an answer on its way."""
        choice = random.Random(1)
        host, port = self.http.split(":")
        client = grpc_client.InferenceServerClient(self.grpc)
        while not self.over.is_set():
            _, writer = await asyncio.open_connection(host, int(port))
            body = json.dumps({"inputs": []}) + " " * 100_000
            head = (
                f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            )
            sent = body[: choice.randrange(len(body))]
            writer.write(f"{head}\r\n\r\n{sent}".encode())
            await asyncio.sleep(choice.random() * 0.01)
            writer.transport.abort()
            asking = asyncio.ensure_future(self.ask_grpc(client, 0))
            await asyncio.sleep(choice.random() * 0.003)
            asking.cancel()
            await asyncio.wait([asking])
            self.found.hung_up += 2
            await asyncio.sleep(0.05)
        await client.close()

    async def swap(self, swaps: int, seconds: float) -> None:
        """New versions, and a broken one before every fifth."""
        for turn in range(swaps):
            await asyncio.sleep(seconds / (swaps + 1))
            if turn % 5 == 4:
                await asyncio.to_thread(self.repository.put_broken)
                await asyncio.sleep(0.5)
            await asyncio.to_thread(self.repository.put_next)
            self.found.swaps.append(time.monotonic())
            await asyncio.to_thread(self.repository.tidy)

    async def watch_memory(self, pid: int) -> None:
        """Notes what the server holds."""
        while not self.over.is_set():
            status = Path(f"/proc/{pid}/status").read_text()
            kilobytes = int(status.split("VmRSS:")[1].split()[0])
            self.found.rss.append((time.monotonic(), kilobytes << 10))
            await asyncio.sleep(0.5)

    async def run(self, pid: int, seconds: float, swaps: int, clients: int) -> Findings:
        """All of it, for so long."""
        await self.until_ready()
        jobs = [self.client(http_client, self.http, self.ask_http) for _ in range(clients)]
        jobs += [self.client(grpc_client, self.grpc, self.ask_grpc) for _ in range(clients)]
        jobs += [self.hang_up(), self.watch_memory(pid), self.report(seconds)]
        working = [asyncio.ensure_future(job) for job in jobs]
        await self.swap(swaps, seconds)
        await asyncio.sleep(seconds / (swaps + 1))
        self.over.set()
        await asyncio.gather(*working)
        return self.found

    async def report(self, seconds: float) -> None:
        """A line every ten seconds."""
        began = time.monotonic()
        for _turn in itertools.count(1):
            try:
                await asyncio.wait_for(self.over.wait(), 10)
                return
            except TimeoutError:
                right = sum(self.found.answers.values())
                print(
                    f"{time.monotonic() - began:5.0f} of {seconds:.0f} s: {right} right, "
                    f"{self.found.wrong} wrong, {sum(self.found.lost.values())} lost, "
                    f"{len(self.found.swaps)} swaps, {self.found.rss[-1][1] / 2**20:.1f} MB",
                    file=sys.stderr,
                )

    async def until_ready(self) -> None:
        """Waits for the server."""
        async with http_client.InferenceServerClient(self.http) as client:
            for _ in range(600):
                try:
                    if await client.is_server_ready() and await client.is_model_ready(NAME):
                        return
                except OSError:
                    pass
                await asyncio.sleep(0.05)
        raise SystemExit("the server did not become ready")


def summary(found: Findings) -> dict[str, Any]:
    """What the run came to."""
    begin = found.rss[0][0]
    length = found.rss[-1][0] - begin
    early = [size for at, size in found.rss if 0.2 <= (at - begin) / length <= 0.4]
    late = [size for at, size in found.rss if (at - begin) / length >= 0.8]
    near, far = [], []
    for at, taken in found.latencies:
        swap = any(0 <= at - swap < 1 for swap in found.swaps)
        (near if swap else far).append(taken * 1e3)
    p99 = {
        name: float(np.percentile(group, 99)) for name, group in (("swaps", near), ("else", far))
    }
    return {
        "right": sum(found.answers.values()),
        "versions": len(found.answers),
        "wrong": found.wrong,
        "lost": dict(found.lost),
        "refused": found.refused,
        "malformed_accepted": found.accepted,
        "hung_up": found.hung_up,
        "swaps": len(found.swaps),
        "p99_ms_within_a_second_of_a_swap": p99["swaps"],
        "p99_ms_else": p99["else"],
        "memory_mb_early": statistics.median(early) / 2**20,
        "memory_mb_late": statistics.median(late) / 2**20,
        "memory_growth": statistics.median(late) / statistics.median(early) - 1,
    }


def problems(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    found = []
    if result["wrong"] or result["lost"] or result["malformed_accepted"]:
        found.append("an answer was wrong, a request was lost, or a malformed one was taken")
    if result["versions"] <= result["swaps"]:
        found.append(f"of {result['swaps'] + 1} versions {result['versions']} answered")
    if result["memory_growth"] > MOST_GROWTH:
        found.append(f"memory grew by {result['memory_growth']:.1%}")
    if result["p99_ms_within_a_second_of_a_swap"] > MOST_SPIKE * result["p99_ms_else"]:
        found.append("latency jumped at a swap")
    return found


def main() -> int:
    """Runs it and prints a JSON document."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--swaps", type=int, default=20)
    arguments.add_argument("--clients", type=int, default=4, help="of each protocol")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        engines = {"1": network(1), "2": network(2)}
        repository = Repository(Path(scratch) / "models", engines)
        with server(repository.folder, Path(scratch) / "log") as (process, http, grpc):
            soak = Soak(Truth(engines), repository, http, grpc)
            running = soak.run(process.pid, given.minutes * 60, given.swaps, given.clients)
            result = summary(asyncio.run(running))
    wrong = problems(result)
    print(json.dumps({**result, "problems": wrong}, indent=2))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

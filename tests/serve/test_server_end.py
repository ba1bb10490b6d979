"""The server as a process at SIGTERM and SIGHUP: nothing that it took is lost."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpc_library
import tritonclient.http as http_library
from onnx import parser

from tests.serve.engines import image, image_engine
from tests.serve.server_process import Served, put, serving, starting, wait_for
from tests.serve.test_server import direct, tensors
from tests.serve.test_tls import make

DELAY_S = 0.6
WAITING = {"execution": "thread", "batching": {"max_delay_us": int(DELAY_S * 1e6), "max_size": 8}}
BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 4, 6, 6], "datatype": "FP32", "data": [0.5] * 144}]}
)


def alone(client: Any, library: Any, seed: int, found: list[Any]) -> threading.Thread:
    """A thread that asks once and keeps the answer, or what came instead."""

    def ask() -> None:
        try:
            found.append(client.infer("m", tensors(library, image(1, seed))).as_numpy("y"))
        except Exception as e:  # noqa: BLE001  the test looks at it
            found.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_what_waits_at_sigterm_is_answered(tmp_path: Path) -> None:
    """Requests wait for others to share a batch with: at SIGTERM they are computed at once."""
    put(tmp_path / "models", "m", {1: image_engine()}, WAITING)
    found: list[Any] = []
    with starting(tmp_path / "models", tmp_path) as served:
        served.wait_for_log("all models that can be loaded are")
        with (
            http_library.InferenceServerClient(served.http, concurrency=4) as http,
            grpc_library.InferenceServerClient(served.grpc) as rpc,
        ):
            threads = [
                alone(c, m, 7, found) for c, m in ((http, http_library), (rpc, grpc_library))
            ]
            wait_for(lambda: queued(served) == 2)
            began = time.monotonic()
            assert served.stop() == 0
            took_s = time.monotonic() - began
            for thread in threads:
                thread.join(10)
    expected = direct(image_engine(), image(1, 7))["y"]
    assert len(found) == 2
    for y in found:
        np.testing.assert_array_equal(y, expected)
    assert took_s < 5
    assert "Traceback" not in served.log


def queued(served: Served) -> int:
    models = json.loads(served.get("/v2/status")[1])["models"]
    return int(models[0]["versions"][0]["queue_length"])


@dataclass
class Seen:
    """What clients saw."""

    answered: int = 0
    lost: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


def asking(served: Served, seen: Seen) -> None:
    """One client: asks again and again, and connects anew when its connection has ended."""
    host, _, port = served.http.rpartition(":")
    while not seen.stop.is_set():
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        try:
            connection.connect()
        except ConnectionRefusedError:
            return
        except OSError:
            continue  # reset before there was a request
        asking_on(connection, seen)
        connection.close()


def asking_on(connection: http.client.HTTPConnection, seen: Seen) -> None:
    """Until the server ends the connection. Whatever was sent has to be answered."""
    while not seen.stop.is_set():
        try:
            connection.request("POST", "/v2/models/m/infer", BODY)
            reply = connection.getresponse()
            body = reply.read()
        except OSError as e:
            seen.lost.append(repr(e))
            return
        if reply.status != 200:
            seen.lost.append(f"{reply.status} {body!r}")
        seen.answered += 1
        if reply.will_close:
            return


def test_under_load_every_request_that_came_is_answered(tmp_path: Path) -> None:
    """Clients see answers, connections that end behind one, and refused connections."""
    put(tmp_path / "models", "m", {1: image_engine()}, {"execution": "thread"})
    seen = Seen()
    with starting(tmp_path / "models", tmp_path) as served:
        served.wait_for_log("all models that can be loaded are")
        threads = [threading.Thread(target=asking, args=(served, seen)) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        began = time.monotonic()
        assert served.stop() == 0
        took_s = time.monotonic() - began
        seen.stop.set()
        for thread in threads:
            thread.join(20)
    assert seen.answered > 100
    assert seen.lost == []
    assert took_s < 5
    assert "Traceback" not in served.log


def test_new_connections_are_refused_while_old_ones_are_answered(tmp_path: Path) -> None:
    """Both protocols stop to listen at once, though one of them still has work."""
    put(tmp_path / "models", "m", {1: image_engine()}, {})
    with starting(tmp_path / "models", tmp_path, "--drain", "2") as served:
        served.wait_for_log("all models that can be loaded are")
        host, _, port = served.http.rpartition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(
                b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
            )
            time.sleep(0.2)
            began = time.monotonic()
            served.process.send_signal(signal.SIGTERM)
            served.wait_for_log("stopping")
            time.sleep(0.3)
            for each in (served.http, served.grpc):
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((host, int(each.rpartition(":")[2])))
            assert served.process.wait(20) == 0, "a client that does not finish holds it no longer"
            assert 1.5 < time.monotonic() - began < 5


def test_a_stream_ends_with_its_answers(tmp_path: Path) -> None:
    put(tmp_path / "models", "m", {1: image_engine()}, WAITING)
    found: list[Any] = []
    with starting(tmp_path / "models", tmp_path, "--drain", "10") as served:
        served.wait_for_log("all models that can be loaded are")
        with grpc_library.InferenceServerClient(served.grpc) as client:
            client.start_stream(lambda result, error: found.append((result, error)))
            for seed in range(3):
                client.async_stream_infer("m", tensors(grpc_library, image(1, seed)))
            wait_for(lambda: queued(served) == 3)
            began = time.monotonic()
            assert served.stop() == 0
            assert time.monotonic() - began < 5
            wait_for(lambda: len(found) >= 3)
            client.stop_stream()
    for seed, (result, error) in enumerate(found[:3]):
        assert error is None
        expected = direct(image_engine(), image(1, seed))["y"]
        np.testing.assert_array_equal(result.as_numpy("y"), expected)


def test_it_says_that_it_is_not_ready_before_it_refuses(tmp_path: Path) -> None:
    put(tmp_path / "models", "m", {1: image_engine()}, {})
    with starting(tmp_path / "models", tmp_path, "--drain-delay", "1.5") as served:
        served.wait_for_log("all models that can be loaded are")
        served.process.send_signal(signal.SIGTERM)
        served.wait_for_log("stopping")
        assert served.get("/v2/health/ready")[0] == 503
        assert served.get("/v2/health/live")[0] == 200
        channel = grpc.insecure_channel(served.grpc)
        with grpc_library.InferenceServerClient(served.grpc) as client:
            assert not client.is_server_ready()
            assert client.infer("m", tensors(grpc_library, image())).as_numpy("y").shape == (1, 3)
        channel.close()
        assert served.process.wait(20) == 0


@pytest.mark.parametrize("when", ["at once", "while a model is built"])
def test_it_stops_before_all_is_loaded(tmp_path: Path, when: str) -> None:
    folder = tmp_path / "models" / "m" / "1"
    folder.mkdir(parents=True)
    shutil.copy(onnx_file(tmp_path), folder / "model.onnx")
    with starting(tmp_path / "models", tmp_path) as served:
        if when != "at once":
            served.wait_for_log("an engine is built here")
            time.sleep(1)
        began = time.monotonic()
        assert served.stop() == 0, served.log
        assert time.monotonic() - began < 5
    assert "Traceback" not in served.log


def test_a_body_may_take_as_long_as_is_said(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    put(repository, "m", {1: image_engine(0)}, {})
    with serving(repository, tmp_path, "--max-body-time", "0.5") as served:
        host, _, port = served.http.rpartition(":")
        with socket.create_connection((host, int(port)), 20) as client:
            client.sendall(
                b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
            )
            assert client.recv(100) == b"", "closed long before the minute that is the default"


def presented(address: str, cafile: Path) -> ssl.SSLSocket:
    """A connection, with the certificate that the server showed."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=cafile)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context.wrap_socket(
        socket.create_connection((host, int(port)), 20), server_hostname="localhost"
    )


def alive(client: ssl.SSLSocket) -> bool:
    """Whether a request on this connection is answered."""
    client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    return client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_sighup_takes_a_new_certificate_and_drops_no_connection(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    put(repository, "m", {1: image_engine(0)}, {})
    files, other = make(tmp_path, "a"), make(tmp_path, "b")
    first, second = tmp_path / "first.crt", tmp_path / "second.crt"
    first.write_bytes(files.cert.read_bytes())
    second.write_bytes(other.cert.read_bytes())
    tls = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    with serving(repository, tmp_path, *tls) as served:
        with presented(served.http, first) as client, presented(served.grpc, first):
            assert alive(client)
            files.cert.write_bytes(second.read_bytes())  # half of a new pair
            served.process.send_signal(signal.SIGHUP)
            served.wait_for_log("cannot be used, the one before stays: .* is not the key of")
            with presented(served.http, first), presented(served.grpc, first):
                pass
            files.key.write_bytes(other.key.read_bytes())
            served.process.send_signal(signal.SIGHUP)
            served.wait_for_log("the TLS certificate .*a.crt is new")
            for address in (served.http, served.grpc):
                presented(address, second).close()
                with pytest.raises(ssl.SSLError):
                    presented(address, first)
            assert alive(client)


def onnx_file(folder: Path) -> Path:
    """A small network."""
    model = parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        g (float[1, 64] x) => (float[1, 64] y) { y = MatMul (x, w) }""")
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(model, folder / "small.onnx")
    return folder / "small.onnx"


def test_sighup_reads_repository_and_tokens_again(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    put(repository, "m", {1: image_engine(0)}, {})
    (tmp_path / "tokens").write_text("a" * 40)
    with serving(repository, tmp_path, "--tokens", str(tmp_path / "tokens")) as served:
        put(repository, "m", {2: image_engine(1)})
        put(repository, "other", {1: image_engine(2)}, {})
        (tmp_path / "tokens").write_text("b" * 40)
        served.process.send_signal(signal.SIGHUP)
        served.wait_for_log("model other, version 1 is ready")
        served.wait_for_log("model m, version 1 is unloaded")
        with http_library.InferenceServerClient(served.http) as client:
            found = client.infer(
                "m",
                tensors(http_library, image(2)),
                headers={"authorization": f"Bearer {'b' * 40}"},
            )
        assert found.get_response()["model_version"] == "2"
        shutil.rmtree(repository)
        for _ in range(3):
            served.process.send_signal(signal.SIGHUP)
        served.wait_for_log("cannot be read, what is loaded stays")

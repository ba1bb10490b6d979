"""deploy/nginx.conf before two servers: who answers when one is full, or gone.

The servers of the first tests do as they are told; those of the last are twofour's.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import pytest

from tests.deploy.balancer import balancer

SERVICE = "inference.GRPCInferenceService"


@dataclass
class Backend:
    """A server of HTTP and gRPC that answers what it is told.

    Attributes:
        name: what it answers.
        status: of its HTTP replies; 503 with Retry-After.
        asked: paths and methods, in order.
    """

    name: str
    status: int = 200
    asked: list[str] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    http_port: int = 0
    grpc_port: int = 0
    web: ThreadingHTTPServer | None = None
    rpc: grpc.Server | None = None

    def start(self) -> None:
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                sent = self.rfile.read(size).decode()
                backend.asked.append(self.path)
                backend.connections.add(self.client_address)
                body = json.dumps({"by": backend.name, "sent": sent}).encode()
                self.send_response(backend.status)
                if backend.status == 503:
                    self.send_header("Retry-After", "7")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.web.daemon_threads = True
        self.http_port = self.web.server_port
        Thread(target=self.web.serve_forever, daemon=True).start()
        self.rpc = grpc.server(ThreadPoolExecutor(4), handlers=(self.methods(),))
        self.grpc_port = self.rpc.add_insecure_port("127.0.0.1:0")
        self.rpc.start()

    def methods(self) -> grpc.GenericRpcHandler:
        def one(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.asked.append("ModelInfer")
            return self.name.encode() + request

        def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            for request in requests:
                yield self.name.encode() + request

        handlers = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(one),
            "RepositoryModelLoad": grpc.unary_unary_rpc_method_handler(one),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def stop(self) -> None:
        if self.web is not None:
            self.web.shutdown()
            self.web.server_close()
        if self.rpc is not None:
            self.rpc.stop(0).wait()
        self.web = self.rpc = None


@dataclass
class Site:
    """Two backends and the address of nginx before them."""

    one: Backend
    two: Backend
    http: str
    grpc: str

    def ask(self, path: str = "/v2/models/m/infer", body: str = "x") -> tuple[int, Any, Any]:
        """Status, body and Retry-After of a POST."""
        connection = http.client.HTTPConnection(self.http, timeout=20)
        connection.request("POST", path, body)
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        document = json.loads(text) if text.startswith(b"{") else text
        return reply.status, document, reply.headers["Retry-After"]

    @contextmanager
    def call(self, method: str) -> Iterator[Any]:
        with grpc.insecure_channel(self.grpc) as channel:
            yield channel.unary_unary(f"/{SERVICE}/{method}")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one, two = Backend("one"), Backend("two")
    with ExitStack() as stack:
        for backend in (one, two):
            backend.start()
            stack.callback(backend.stop)
        ports = (one.http_port, two.http_port), (one.grpc_port, two.grpc_port)
        addresses = stack.enter_context(balancer(tmp_path, *ports)).split()
        yield Site(one, two, *addresses)


def test_both_servers_work(site: Site) -> None:
    by = [site.ask(body=str(i))[1] for i in range(10)]
    assert {each["by"] for each in by} == {"one", "two"}
    assert [each["sent"] for each in by] == [str(i) for i in range(10)]


def test_connections_are_kept(site: Site) -> None:
    for _ in range(20):
        site.ask()
    assert len(site.one.connections) == 1
    assert len(site.two.connections) == 1


def test_a_full_server_costs_nothing(site: Site) -> None:
    site.one.status = 503
    for i in range(10):
        status, document, _ = site.ask(body=str(i))
        assert (status, document) == (200, {"by": "two", "sent": str(i)})
    assert site.one.asked, "it is asked again, since it may have room by now"
    site.one.status = 200
    assert {site.ask()[1]["by"] for _ in range(4)} == {"one", "two"}


def test_where_all_are_full_the_client_learns_when_to_come_back(site: Site) -> None:
    site.one.status = site.two.status = 503
    for _ in range(3):
        status, _, retry_after = site.ask()
        assert (status, retry_after) == (503, "7")
    site.two.status = 200
    assert site.ask()[0] == 200


def test_other_errors_are_answers(site: Site) -> None:
    site.one.status = site.two.status = 400
    assert site.ask()[0] == 400
    assert len(site.one.asked) + len(site.two.asked) == 1


def test_a_server_that_is_gone_costs_nothing(site: Site) -> None:
    site.one.stop()
    assert {site.ask()[1]["by"] for _ in range(6)} == {"two"}
    with site.call("ModelInfer") as infer:
        assert {infer(b"!", timeout=20) for _ in range(6)} == {b"two!"}


def test_grpc_reaches_both(site: Site) -> None:
    with site.call("ModelInfer") as infer:
        assert {infer(b"!", timeout=20) for _ in range(8)} == {b"one!", b"two!"}


def test_grpc_where_nobody_is(site: Site) -> None:
    site.one.stop()
    site.two.stop()
    with site.call("ModelInfer") as infer, pytest.raises(grpc.RpcError) as caught:
        infer(b"!", timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_streams_go_both_ways(site: Site) -> None:
    with grpc.insecure_channel(site.grpc) as channel:
        call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        answers = list(call(iter([b"1", b"2", b"3"]), timeout=20))
    assert answers in ([b"one1", b"one2", b"one3"], [b"two1", b"two2", b"two3"])


def test_control_and_metrics_stay_inside(site: Site) -> None:
    assert site.ask("/v2/repository/models/m/unload")[0] == 403
    assert site.ask("/metrics")[0] == 404
    with site.call("RepositoryModelLoad") as load, pytest.raises(grpc.RpcError) as caught:
        load(b"", timeout=20)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert site.one.asked == site.two.asked == []
    assert site.ask("/v2/repository/index")[0] == 200

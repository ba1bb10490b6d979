"""Raw sockets that misbehave: what they send is refused, bounded, and does not reach others."""

from __future__ import annotations

import gzip
import random
import socket
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.serve.dropped import assert_dropped
from tests.serve.http_sample import Doubling, Running, infer_bytes, read_all, read_reply, serving
from twofour.serve.http.timeouts import Timeouts
from twofour.serve.limits import Limits
from twofour.serve.tls import TlsFiles, load_tls

X = np.arange(6, dtype=np.float32).reshape(2, 3)
GET = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: a\r\n"
SMALL = Limits(body_bytes=1 << 20, head_bytes=4096)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(Doubling(), limits=SMALL) as running:
        yield running


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def healthy(running: Running) -> None:
    """Others are served as before."""
    with running.connect() as raw:
        raw.sendall(infer_bytes(X))
        status, headers, body = read_reply(raw)
    assert status == 200
    raw_bytes = body[int(headers["inference-header-content-length"]) :]
    np.testing.assert_array_equal(np.frombuffer(raw_bytes, np.float32), 2 * X.reshape(-1))


def test_byte_by_byte(running: Running) -> None:
    with running.connect() as raw:
        for at in infer_bytes(X):
            raw.sendall(bytes([at]))
        assert read_reply(raw)[0] == 200
        raw.sendall(infer_bytes(X))
        assert read_reply(raw)[0] == 200


def test_pipelined_in_order(running: Running) -> None:
    with running.connect() as raw:
        sent = b""
        for n in range(300):
            sleep = {"sleep": 0.02} if n % 100 == 0 else {}
            sent += infer_bytes(X + n, b"X-Request-ID: r%d\r\n" % n, sleep)
            sent += b"GET /nowhere%d HTTP/1.1\r\nHost: a\r\n\r\n" % n
        threading.Thread(target=raw.sendall, args=(sent,), daemon=True).start()
        for n in range(300):
            status, headers, body = read_reply(raw)
            assert (status, headers["x-request-id"]) == (200, f"r{n}")
            assert body.endswith((2 * (X + n)).tobytes())
            status, _, body = read_reply(raw)
            assert status == 404
            assert b"/nowhere%d'" % n in body


def test_a_flood_of_pipelined_requests_is_bounded(running: Running) -> None:
    with running.connect() as raw:
        raw.sendall(infer_bytes(X, parameters={"sleep": 0.3}))
        raw.setblocking(False)
        sent = 0
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            try:
                sent += raw.send((GET + b"\r\n") * 1000)
            except BlockingIOError:
                time.sleep(0.01)
        (connection,) = running.server.shared.connections
        assert len(connection.waiting) < 3000
        assert connection.paused
        raw.setblocking(True)
        assert read_reply(raw)[0] == 200
        for _ in range(1000):
            assert read_reply(raw)[0] == 200
    healthy(running)


def test_chunks(running: Running) -> None:
    body = infer_bytes(X).partition(b"\r\n\r\n")[2]
    length = len(body) - X.nbytes
    head = POST + b"Transfer-Encoding: chunked\r\nInference-Header-Content-Length: %d\r\n\r\n"
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % at for at in body)
    with running.connect() as raw:
        for _ in range(2):
            raw.sendall(head % length + chunks + b"0\r\nX-Trailer: a\r\n\r\n")
            assert read_reply(raw)[0] == 200


def test_continue(running: Running) -> None:
    request = infer_bytes(X, b"Expect: 100-continue\r\n")
    head, _, body = request.partition(b"\r\n\r\n")
    with running.connect() as raw:
        for _ in range(2):
            raw.sendall(head + b"\r\n\r\n")
            assert read_reply(raw, head=True)[0] == 100
            raw.sendall(body)
            assert read_reply(raw)[0] == 200
        # Behind a request that is being answered, it has to wait for that one's reply.
        raw.sendall(infer_bytes(X, parameters={"sleep": 0.1}) + head + b"\r\n\r\n")
        assert read_reply(raw)[0] == 200
        assert read_reply(raw, head=True)[0] == 100
        raw.sendall(body)
        assert read_reply(raw)[0] == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (
            POST.replace(b"double", b"") + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
            404,
        ),
        (POST + b"Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n", 413),
        (POST + b"Expect: a-miracle\r\nContent-Length: 9\r\n\r\n", 417),
        (POST + b"Content-Length: 9999999\r\n\r\n", 413),
        (
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n%b\r\n" % bytes(1 << 16) * 17,
            413,
        ),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", 400),
        (POST + b"Content-Length: 5, 5\r\n\r\nabcde", 400),
        (POST + b"Content-Length: +5\r\n\r\nabcde", 400),
        (POST + b"Content-Length: -5\r\n\r\nabcde", 400),
        (POST + b"Content-Length: 0x5\r\n\r\nabcde", 400),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (POST + b"Content-Length : 5\r\n\r\nabcde", 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: identity\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nz\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (GET + b"Host: b\r\n\r\n", 400),
        (GET + b" folded: a\r\n\r\n", 400),
        (GET + b"A: b\r\n folded\r\n\r\n", 400),
        (GET + b"A: b\0c\r\n\r\n", 400),
        (GET + b"A: b\rc: d\r\n\r\n", 400),
        (GET + b"A b: c\r\n\r\n", 400),
        (
            GET
            + b"Inference-Header-Content-Length: 1\r\nInference-Header-Content-Length: 2\r\n\r\n",
            400,
        ),
        (b"GET /v2\nHost: a\n\n", 400),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
        (b"GET /v2 HTTP/3.7\r\nHost: a\r\n\r\n", 400),
        (b"GET /v2 HTTP/2.0\r\nHost: a\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"HELLO /v2 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (GET + b"A: " + b"b" * 5000 + b"\r\n\r\n", 431),
        (GET + b"A: b\r\n" * 2000, 431),
        (b"GET /" + b"a" * 6000, 431),
        (b"\r\n" * 4000, 431),
    ],
)
def test_what_is_refused_ends_the_connection(
    running: Running, request_bytes: bytes, status: int
) -> None:
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    with running.connect() as raw:
        raw.sendall(request_bytes + (smuggled if status == 400 else b""))
        got = read_all(raw)
    assert got.startswith(b"HTTP/1.1 %d " % status), got
    assert got.count(b"HTTP/1.1 ") == 1, got
    assert b"connection: close" in got
    assert b"<reset>" not in got
    assert b'{"error":' in got


def test_a_large_body_is_refused_before_it_is_kept(running: Running) -> None:
    with running.connect() as raw:
        raw.sendall(POST + b"Content-Length: 9999999\r\n\r\n")
        # Clients that send everything before they read: no reset may take the refusal from them.
        for _ in range(8):
            raw.sendall(bytes(1 << 20))
            time.sleep(0.02)
        assert read_reply(raw)[0] == 413
    healthy(running)


def test_bodies_of_all_clients_together_are_bounded() -> None:
    """One that finds no room gets 503 and keeps its connection; there is room when others go."""
    with serving(Doubling(), limits=Limits(held_bytes=600_000)) as running:
        shared = running.server.shared
        body = bytes(300_000)
        asking = POST + b"Content-Length: 300000\r\n\r\n" + body
        with running.connect() as slow, running.connect() as other:
            slow.sendall(POST + b"Content-Length: 900000\r\n\r\n" + bytes(500_000))
            until(lambda: shared.held.bytes == 500_000)
            other.sendall(asking)
            status, headers, said = read_reply(other)
            assert (status, headers["retry-after"]) == (503, "1")
            assert b"no room" in said
            assert shared.held.bytes == 500_000
            slow.close()
            until(lambda: shared.held.bytes == 0)
            other.sendall(asking)
            assert read_reply(other)[0] == 400, "read, and no JSON"
        healthy(running)
        assert shared.held.bytes == 0


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_what_bodies_inflate_to_is_bounded_too(encoding: str) -> None:
    """Small on its way, and more than there is room for."""
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    how = POST + f"Content-Encoding: {encoding}\r\n".encode()
    with serving(Doubling(), limits=Limits(held_bytes=3 << 20)) as running:
        shared = running.server.shared
        with running.connect() as raw:
            for size, wanted in ((2 << 20, 400), (4 << 20, 503), (2 << 20, 400)):
                body = pack(bytes(size))
                raw.sendall(how + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                status, _, said = read_reply(raw)
                assert status == wanted, said
                assert shared.held.bytes == 0
        healthy(running)


def test_requests_that_wait_are_forgotten_with_their_client() -> None:
    service = Doubling()
    with serving(service) as running:
        shared = running.server.shared
        with running.connect() as raw:
            raw.sendall(infer_bytes(X, parameters={"sleep": 30}) + 3 * infer_bytes(X))
            until(lambda: service.begun == 1 and shared.held.bytes > 0)
        until(lambda: shared.held.bytes == 0)


@pytest.mark.parametrize(
    "endless", [b"0\r\nx: ", b"2;x="], ids=["a trailer", "an extension of a chunk"]
)
def test_what_comes_with_chunks_is_bounded(running: Running, endless: bytes) -> None:
    with running.connect() as raw:
        raw.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + endless)
        for _ in range(20):
            raw.sendall(b"a" * 1000)
            time.sleep(0.005)
        assert read_reply(raw)[0] == 431
    healthy(running)


def test_a_body_in_small_chunks(running: Running) -> None:
    message = infer_bytes(X)
    head, body = message.split(b"\r\n\r\n", 1)
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    chunks = b"".join(b"1\r\n%b\r\n" % body[i : i + 1] for i in range(len(body)))
    with running.connect() as raw:
        raw.sendall(b"\r\n".join([*lines, b"Transfer-Encoding: chunked"]) + b"\r\n\r\n")
        raw.sendall(chunks + b"0\r\n\r\n")
        status, headers, got = read_reply(raw)
    assert status == 200
    raw_bytes = got[int(headers["inference-header-content-length"]) :]
    np.testing.assert_array_equal(np.frombuffer(raw_bytes, np.float32), 2 * X.reshape(-1))


def test_refused_early_yet_the_connection_goes_on(running: Running) -> None:
    with running.connect() as raw:
        body = bytes(500_000)
        raw.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n" + body)
        assert read_reply(raw)[0] == 404
        raw.sendall(GET + b"\r\n")
        assert read_reply(raw)[0] == 200


def test_keeping_and_closing(running: Running) -> None:
    for end, version, closes in (
        (b"", b"1.1", False),
        (b"Connection: close\r\n", b"1.1", True),
        (b"", b"1.0", True),
        (b"Connection: keep-alive\r\n", b"1.0", True),
    ):
        with running.connect() as raw:
            raw.sendall(GET.replace(b"1.1", version) + end + b"\r\n")
            status, headers, _ = read_reply(raw)
            assert status == 200
            assert ("connection" in headers) == closes
            if closes:
                assert raw.recv(1) == b""
            else:
                raw.sendall(GET + b"\r\n")
                assert read_reply(raw)[0] == 200


def test_an_offer_to_upgrade_is_passed_over(running: Running) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    with running.connect() as raw:
        raw.sendall((GET + offer + b"\r\n") * 3 + infer_bytes(X, offer) + GET + b"\r\n")
        for _ in range(5):
            assert read_reply(raw)[0] == 200
        raw.sendall(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_reply(raw)[0] in (404, 405)


def test_request_ids(running: Running) -> None:
    for given, same in (("abc-1", True), ("a" * 129, False), ("ä", False), ("", False)):
        with running.connect() as raw:
            raw.sendall(GET + b"X-Request-ID: " + given.encode() + b"\r\n\r\n")
            made = read_reply(raw)[1]["x-request-id"]
        assert (made == given) == same
        assert made


def test_who_hangs_up_cancels() -> None:
    service = Doubling()
    with serving(service) as running:
        for _ in range(5):
            raw = running.connect()
            raw.sendall(infer_bytes(X, parameters={"sleep": 30}) + GET + b"\r\n")
            time.sleep(0.05)
            raw.close()
        until(lambda: service.begun == service.cancelled == 5)
        until(lambda: not running.server.shared.connections)


def test_slow_clients_are_closed() -> None:
    quick = Timeouts(head_s=0.3, idle_s=0.3, write_s=0.3, linger_s=0.3)
    with serving(Doubling(), timeouts=quick, limits=Limits(body_s=0.3)) as running:
        for begin in (b"", b"GET /v2", GET, POST + b"Content-Length: 9\r\n\r\nabc", GET + b"\r\n"):
            with running.connect() as raw:
                raw.sendall(begin)
                begun = time.monotonic()
                read_all(raw)
                assert time.monotonic() - begun < 4
        # A computation that takes longer than any of these is no slow client.
        with running.connect() as raw:
            raw.sendall(infer_bytes(X, parameters={"sleep": 1.5}))
            assert read_reply(raw)[0] == 200


def test_one_who_does_not_read_is_closed() -> None:
    quick = Timeouts(write_s=0.3)
    big = np.zeros((1 << 20, 3), np.float32)
    with serving(Doubling(), timeouts=quick) as running:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", running.port))
        raw.sendall(infer_bytes(big))
        until(lambda: bool(running.server.shared.connections))
        until(lambda: not running.server.shared.connections, 8)
        assert_dropped(raw)
        raw.close()
        healthy(running)


def test_a_large_reply_is_whole(running: Running) -> None:
    big = np.random.default_rng(0).normal(size=(80_000, 3)).astype(np.float32)
    with running.connect() as raw:
        raw.sendall(infer_bytes(big))
        time.sleep(0.3)
        status, headers, body = read_reply(raw)
        assert status == 200
        assert body[int(headers["inference-header-content-length"]) :] == (2 * big).tobytes()
        raw.sendall(infer_bytes(X) * 2)
        assert [read_reply(raw)[0] for _ in range(2)] == [200, 200]


def test_too_many_connections() -> None:
    with serving(Doubling(), most=3) as running:
        clients = [running.connect() for _ in range(6)]
        until(lambda: len(running.server.shared.connections) == 3)
        answered = 0
        for client in clients:
            try:
                client.sendall(GET + b"\r\n")
                answered += read_reply(client)[0] == 200
            except (ConnectionError, EOFError):
                pass
            client.close()
        assert answered == 3


def test_stopping_drops_no_request() -> None:
    service = Doubling()
    with serving(service) as running:
        busy = running.connect()
        busy.sendall(infer_bytes(X, parameters={"sleep": 0.6}))
        idle = running.connect()
        idle.sendall(GET + b"\r\n")
        read_reply(idle)
        late = running.connect()
        late.sendall(GET + b"\r\n")
        read_reply(late)
        until(lambda: service.begun == 1)
        stopping = threading.Thread(
            target=lambda: running.wait(running.server.stop(5.0)), daemon=True
        )
        stopping.start()
        until(lambda: running.server.shared.drain_began is not None)
        late.sendall(infer_bytes(X) * 2)
        assert read_reply(late)[0] == 200
        status, headers, _ = read_reply(late)
        assert (status, headers["connection"]) == (200, "close")
        assert late.recv(1) == b""
        status, headers, _ = read_reply(busy)
        assert (status, headers["connection"]) == (200, "close")
        assert idle.recv(1) == b""
        stopping.join(3)
        assert not stopping.is_alive()
        with pytest.raises(ConnectionRefusedError):
            running.connect()


def test_stopping_has_an_end() -> None:
    service = Doubling()
    with serving(service) as running:
        with running.connect() as raw:
            raw.sendall(infer_bytes(X, parameters={"sleep": 30}))
            until(lambda: service.begun == 1)
            assert running.wait(running.server.stop(0.2)) == 1
        until(lambda: service.cancelled == 1)


def test_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "k.pem", tmp_path / "c.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30"
    names = "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    command = [*make.split(), *names.split(), "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    context = load_tls(TlsFiles(cert, key)).context
    trusting = ssl.create_default_context(cafile=str(cert))
    big = np.zeros((50_000, 3), np.float32)
    with serving(Doubling(), tls=context, limits=SMALL) as running:
        with trusting.wrap_socket(running.connect(), server_hostname="localhost") as raw:
            for x in (X, big, X):
                raw.sendall(infer_bytes(x))
                assert read_reply(raw)[0] == 200
            raw.sendall(POST + b"Content-Length: 9999999\r\n\r\n")
            assert read_reply(raw)[0] == 413
        with running.connect() as plain:
            plain.sendall(GET + b"\r\n")
            assert b"HTTP" not in read_all(plain)


def test_damaged_requests_are_refused_and_nothing_else(running: Running) -> None:
    """No 500, no hang, no other exception (`serving` looks for those in the end)."""
    source = random.Random(7)
    whole = infer_bytes(X, b"Connection: close\r\n")
    seen = set()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(data))
            kind = source.randrange(3)
            if kind == 0:
                data[at] = source.randrange(256)
            elif kind == 1:
                del data[at : at + source.randint(1, 8)]
            else:
                data[at:at] = source.choice([b"\r\n", b"\0", b" ", b"9", b":", data[:30]])
        with running.connect() as raw:
            raw.sendall(bytes(data))
            raw.settimeout(0.05)
            try:
                got = read_all(raw)
            except TimeoutError:
                got = b"waits for more"
        seen.add(got[9:12] if got.startswith(b"HTTP") else got)
    assert b"500" not in seen
    assert {b"200", b"400", b"404"} <= seen
    healthy(running)

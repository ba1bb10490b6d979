"""Raw sockets that misbehave at the gRPC port: refused with the right code, bounded, and alone."""

from __future__ import annotations

import asyncio
import itertools
import resource
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.serve.dropped import assert_dropped
from tests.serve.grpc_raw import EMPTY, INFER, LIVE, STREAM, Raw, connected, data, flood, message
from tests.serve.grpc_sample import Running, grpc_server
from twofour.serve.grpc import frames
from twofour.serve.grpc.allowance import IDLE_FRAMES, RESETS
from twofour.serve.grpc.calls import MOST_CONTINUATIONS, MOST_TASKS
from twofour.serve.grpc.connection import FRAME_BYTES
from twofour.serve.grpc.flow import STREAM_WINDOW
from twofour.serve.grpc.frames import Code
from twofour.serve.grpc.server import GrpcOptions
from twofour.serve.grpc.timeouts import Timeouts
from twofour.serve.limits import Limits
from twofour.serve.protocol.messages import InferRequest, InferResponse
from twofour.serve.service import Call

SMALL = Limits(body_bytes=1 << 20, head_bytes=4096)
QUICK = Timeouts(0.4, 0.4, 0.4, 0.4, 1.5, 0.2)


class Sized:
    """A service whose answer has as many bytes as its request's model says, or never comes."""

    name, version, extensions = "sized", "1", ()
    live = ready = True

    def __init__(self) -> None:
        self.running = self.most = self.cancelled = 0

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if request.model == "never":
                await asyncio.Event().wait()
            y = np.zeros(int(request.model), np.uint8)
            return InferResponse("m", "1", request.id, {"y": y})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


async def sized() -> Sized:
    return Sized()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with grpc_server(sized, options=GrpcOptions(port=0, limits=SMALL)) as running:
        yield running


@pytest.fixture(scope="module")
def quick() -> Iterator[Running]:
    options = GrpcOptions(port=0, limits=SMALL, timeouts=QUICK)
    with grpc_server(sized, options=options) as running:
        yield running


def asked(model: str) -> bytes:
    """A request, as a message."""
    return message(service_pb2.ModelInferRequest(model_name=model).SerializeToString())


def healthy(server: Running) -> None:
    """Others are served as before."""
    with grpc.insecure_channel(server.url) as channel:
        assert channel.unary_unary(LIVE)(b"", timeout=10)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


HEADERS_1 = bytes.fromhex("8386") + b"\x44" + bytes([len(LIVE)]) + LIVE.encode()  # POST, http, path
REST_1 = b"\x0f\x10\x10application/grpc"


def opened(flags: int, block: bytes, stream: int = 1) -> bytes:
    return frames.frame(frames.HEADERS, flags, stream, block)


NUMBER = (0).to_bytes(4, "big")
MISTAKES = {
    "a frame too large": (frames.head(FRAME_BYTES + 1, 0, 0, 1), Code.FRAME_SIZE_ERROR),
    "data of stream 0": (data(0, b"x"), Code.PROTOCOL_ERROR),
    "data of an idle stream": (data(9, b"x"), Code.PROTOCOL_ERROR),
    "headers of stream 0": (opened(4, HEADERS_1, 0), Code.PROTOCOL_ERROR),
    "headers of an even stream": (opened(4, HEADERS_1, 2), Code.PROTOCOL_ERROR),
    "padding beyond the frame": (frames.frame(1, 4 | 8, 1, b"\x09ab"), Code.PROTOCOL_ERROR),
    "no room for padding": (frames.frame(1, 4 | 8, 1), Code.FRAME_SIZE_ERROR),
    "no room for priority": (frames.frame(1, 4 | 32, 1, b"ab"), Code.PROTOCOL_ERROR),
    "a damaged block": (opened(4, b"\xff\xff\xff\xff\xff\xff"), Code.COMPRESSION_ERROR),
    "an index beyond the table": (opened(4, b"\xfe"), Code.COMPRESSION_ERROR),
    "a table beyond its bound": (opened(4, b"\x3f\xff\xff\x03\x83"), Code.COMPRESSION_ERROR),
    "a reset of an idle stream": (frames.reset(5, Code.CANCEL), Code.PROTOCOL_ERROR),
    "a reset of stream 0": (frames.reset(0, Code.CANCEL), Code.PROTOCOL_ERROR),
    "a reset of another size": (frames.frame(3, 0, 1, b"abc"), Code.FRAME_SIZE_ERROR),
    "settings of a stream": (frames.frame(4, 0, 1), Code.PROTOCOL_ERROR),
    "settings of another size": (frames.frame(4, 0, 0, b"abc"), Code.FRAME_SIZE_ERROR),
    "an acknowledgement with settings": (frames.frame(4, 1, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
    "push that is 2": (frames.settings([(2, 2)]), Code.PROTOCOL_ERROR),
    "a window too large": (frames.settings([(4, 1 << 31)]), Code.FLOW_CONTROL_ERROR),
    "frames too small": (frames.settings([(5, 100)]), Code.PROTOCOL_ERROR),
    "a push": (frames.frame(5, 4, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a ping of a stream": (frames.frame(6, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a ping of another size": (frames.frame(6, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "a goaway of a stream": (frames.frame(7, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a window that grows by 0": (frames.window_update(0, 0), Code.PROTOCOL_ERROR),
    "a window that overflows": (frames.window_update(0, (1 << 31) - 1), Code.FLOW_CONTROL_ERROR),
    "a window of an idle stream": (frames.window_update(7, 1), Code.PROTOCOL_ERROR),
    "a window of another size": (frames.frame(8, 0, 0, b"abc"), Code.FRAME_SIZE_ERROR),
    "a continuation of nothing": (frames.frame(9, 4, 1, b""), Code.PROTOCOL_ERROR),
    "a frame within a block": (opened(0, HEADERS_1) + frames.frame(6, 0, 0, bytes(8)), 1),
    "another stream's continuation": (opened(0, HEADERS_1) + frames.frame(9, 4, 3), 1),
    "priority of stream 0": (frames.frame(2, 0, 0, bytes(5)), Code.PROTOCOL_ERROR),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_end_the_connection_with_their_code(server: Running, what: str) -> None:
    sent, code = MISTAKES[what]
    with connected(server.url) as raw:
        raw.send(sent)
        assert raw.closed(Code(code))


STREAM_MISTAKES: dict[str, tuple[Callable[[Raw], bytes], Code]] = {
    "a method that is none": (lambda raw: raw.head(1, method=""), Code.PROTOCOL_ERROR),
    "no path": (lambda raw: raw.head(1, path=""), Code.PROTOCOL_ERROR),
    "an upper-case name": (
        lambda raw: opened(4, HEADERS_1 + REST_1 + b"\x00\x01A\x01b"),
        Code.PROTOCOL_ERROR,
    ),
    "a value of two lines": (lambda raw: raw.head(1, x="a\nb"), Code.PROTOCOL_ERROR),
    "a pseudo-field behind others": (
        lambda raw: opened(4, b"\x83" + REST_1 + HEADERS_1[1:]),
        Code.PROTOCOL_ERROR,
    ),
    "a pseudo-field twice": (lambda raw: opened(4, b"\x83" + HEADERS_1), Code.PROTOCOL_ERROR),
    "a pseudo-field that is none": (
        lambda raw: opened(4, HEADERS_1 + b"\x00\x02:a\x01b"),
        Code.PROTOCOL_ERROR,
    ),
    "a field of connections": (lambda raw: raw.head(1, connection="close"), Code.PROTOCOL_ERROR),
    "te that is no trailers": (lambda raw: raw.head(1, te="gzip"), Code.PROTOCOL_ERROR),
    "a window that grows by 0": (
        lambda raw: raw.head(1, INFER) + frames.window_update(1, 0),
        Code.PROTOCOL_ERROR,
    ),
    "a window that overflows": (
        lambda raw: raw.head(1, INFER) + frames.window_update(1, (1 << 31) - 1),
        Code.FLOW_CONTROL_ERROR,
    ),
    "priority of another size": (
        lambda raw: raw.head(1, INFER) + frames.frame(2, 0, 1, b"abc"),
        Code.FRAME_SIZE_ERROR,
    ),
    "data behind its end": (
        lambda raw: raw.head(1, INFER) + data(1, asked("never"), True) + data(1, b"x"),
        Code.STREAM_CLOSED,
    ),
    "headers behind its end": (
        lambda raw: raw.head(1, INFER) + data(1, asked("never"), True) + raw.head(1, end=True),
        Code.STREAM_CLOSED,
    ),
    "trailers that do not end it": (
        lambda raw: raw.head(1, INFER) + raw.head(1),
        Code.STREAM_CLOSED,
    ),
    "more than its window": (
        lambda raw: raw.head(1, INFER) + data(1, EMPTY + bytes(99_995)) * 3,
        Code.FLOW_CONTROL_ERROR,
    ),
}


@pytest.mark.parametrize("what", STREAM_MISTAKES)
def test_mistakes_end_their_stream_with_their_code(server: Running, what: str) -> None:
    make, code = STREAM_MISTAKES[what]
    with connected(server.url) as raw:
        raw.send(make(raw))
        assert raw.until(frames.RST_STREAM, 1).code is code
        raw.send(raw.call(3))
        assert raw.status(3) == (0, "")


def test_frames_of_streams_that_have_ended(server: Running) -> None:
    for late in (data(1, b"x"), None):
        with connected(server.url) as raw:
            raw.send(raw.call(1))
            assert raw.status(1) == (0, "")
            raw.send(frames.window_update(1, 5), frames.reset(1, Code.CANCEL))
            raw.send(frames.frame(frames.PRIORITY, 0, 1, bytes(5)))
            raw.send(raw.call(3))
            assert raw.status(3) == (0, "")
            raw.send(raw.head(1) if late is None else late)
            assert raw.closed(Code.STREAM_CLOSED)


def test_data_of_a_stream_that_the_server_ended_is_dropped(server: Running) -> None:
    with connected(server.url) as raw:
        raw.send(raw.head(1, "/nothing"))
        assert raw.status(1)[0] == 12
        assert raw.until(frames.RST_STREAM, 1).code is Code.NO_ERROR
        raw.send(data(1, bytes(1000)), raw.head(1, end=True), raw.call(3))
        assert raw.status(3) == (0, "")


def test_padding_priority_continuation_and_unknown_frames(server: Running) -> None:
    with connected(server.url) as raw:
        block = raw.encoder.encode([(":method", "POST"), (":scheme", "http"), (":path", LIVE)])
        rest = raw.encoder.encode([("content-type", "application/grpc+proto"), ("te", "trailers")])
        padded = b"\x03" + bytes(5) + block + bytes(3)
        raw.send(frames.frame(77, 255, 99, b"new"))
        raw.send(frames.frame(frames.HEADERS, frames.PADDED | frames.PRIORITIZED, 1, padded))
        for at in rest[:-1]:
            raw.send(frames.frame(frames.CONTINUATION, 0, 1, bytes([at])))
        raw.send(frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, rest[-1:]))
        raw.send(frames.frame(frames.DATA, frames.PADDED, 1, b"\x02" + EMPTY[:2] + bytes(2)))
        raw.send(frames.frame(frames.DATA, frames.PADDED | 1, 1, b"\x00" + EMPTY[2:]))
        assert raw.status(1) == (0, "")


def test_byte_by_byte(server: Running) -> None:
    raw = Raw(server.url)
    sent = frames.PREFACE + frames.settings([]) + raw.call(1) + raw.call(3)
    for at in sent:
        raw.send(bytes([at]))
    assert raw.status(1) == (0, "")
    assert raw.status(3) == (0, "")
    raw.socket.close()


def test_pings_are_answered(server: Running) -> None:
    with connected(server.url) as raw:
        raw.send(frames.frame(frames.PING, 0, 0, b"12345678"))
        pong = raw.until(frames.PING)
        assert (pong.flags, pong.payload) == (frames.ACK, b"12345678")


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"grpc_timeout": "5"}, 3, "grpc-timeout"),
        ({"grpc_timeout": "123456789S"}, 3, "grpc-timeout"),
        ({"grpc_timeout": "-1S"}, 3, "grpc-timeout"),
        ({"grpc_encoding": "zip"}, 12, "grpc-encoding"),
        ({"path": "/nothing"}, 12, "no such method"),
        ({"x": "a" * 5000}, 8, "metadata is too large"),
        ({"grpc_timeout": "0n", "path": STREAM}, 4, "deadline"),
    ],
)
def test_calls_that_are_refused(
    server: Running, more: dict[str, str], status: int, said: str
) -> None:
    with connected(server.url) as raw:
        raw.send(raw.head(1, **more))
        found, text = raw.status(1)
        assert found == status
        assert said in text
        raw.send(raw.call(3))
        assert raw.status(3) == (0, "")


@pytest.mark.parametrize(
    ("more", "status"), [({"method": "GET"}, 405), ({"content_type": "a"}, 415)]
)
def test_what_is_no_call(server: Running, more: dict[str, str], status: int) -> None:
    with connected(server.url) as raw:
        raw.send(raw.head(1, **more))
        found = raw.until(frames.HEADERS, 1)
        assert found.flags & frames.END_STREAM
        assert dict(raw.decoder.decode(found.payload))[":status"] == str(status)


PACKED = zlib.compress(b"")


@pytest.mark.parametrize(
    ("body", "more", "status"),
    [
        (b"", {}, 12),
        (EMPTY + EMPTY, {}, 12),
        (EMPTY[:3], {}, 12),
        (message(b"abc")[:-1], {}, 12),
        (b"\x02" + EMPTY[1:], {}, 3),
        (b"\0\xff\xff\xff\xff", {}, 8),
        (message(PACKED, 1), {}, 3),
        (message(b"junk", 1), {"grpc_encoding": "deflate"}, 3),
        (message(zlib.compress(bytes(2 << 20)), 1), {"grpc_encoding": "deflate"}, 8),
        (message(PACKED, 1), {"grpc_encoding": "deflate"}, 0),
        (EMPTY, {"grpc_encoding": "gzip"}, 0),
        (EMPTY, {"authorization_bin": "not base64 at all", "te": ""}, 0),
    ],
)
def test_messages(server: Running, body: bytes, more: dict[str, str], status: int) -> None:
    with connected(server.url) as raw:
        raw.send(raw.call(1, LIVE, body, **more))
        assert raw.status(1)[0] == status


def test_no_preface(server: Running) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01" + bytes(50), frames.settings([]) * 3):
        raw = Raw(server.url)
        raw.send(sent)
        raw.closed(Code.PROTOCOL_ERROR)
        raw.socket.close()
    raw = Raw(server.url)
    raw.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    said = b""
    while got := raw.socket.recv(1000):
        said += got
    assert said.startswith(b"HTTP/1.1 505 ")
    assert b"gRPC" in said
    raw.socket.close()
    raw = Raw(server.url)
    raw.send(frames.PREFACE + frames.frame(frames.PING, 0, 0, bytes(8)))
    raw.closed(Code.PROTOCOL_ERROR)
    raw.socket.close()


def endless(make: Callable[[int], bytes]) -> Iterator[bytes]:
    """Frames of ever higher streams, a hundred at a time."""
    for first in itertools.count(1, 200):
        yield b"".join([make(stream) for stream in range(first, first + 200, 2)])


def one(sent: bytes) -> Callable[[int], bytes]:
    return lambda stream: sent


FLOODS: dict[str, Callable[[Raw], Callable[[int], bytes]]] = {
    "rapid resets": lambda raw: (
        lambda n: raw.head(n, INFER) + data(n, asked("never"), True) + frames.reset(n, Code.CANCEL)
    ),
    "resets by the server": lambda raw: lambda n: raw.head(n, INFER) + frames.window_update(n, 0),
    "calls beyond the most": lambda raw: lambda n: raw.head(n, INFER),
    "calls of no method": lambda raw: lambda n: raw.head(n, "/nothing", end=True),
    "settings": lambda raw: one(frames.settings([(4, 1000), (4, 2000)])),
    "acknowledgements": lambda raw: one(frames.frame(frames.SETTINGS, frames.ACK, 0)),
    "many settings at once": lambda raw: one(frames.settings([(99, 1)] * 3000)),
    "pings": lambda raw: one(frames.frame(frames.PING, 0, 0, bytes(8))),
    "answers to no ping": lambda raw: one(frames.frame(frames.PING, frames.ACK, 0, bytes(8))),
    "priorities": lambda raw: one(frames.frame(frames.PRIORITY, 0, 1, bytes(5))),
    "unknown frames": lambda raw: one(frames.frame(99, 0, 0)),
    "windows": lambda raw: one(frames.window_update(0, 1)),
    "empty data": lambda raw: lambda n: raw.head(1, INFER) if n == 1 else data(1, b""),
    "padding alone": lambda raw: (
        lambda n: raw.head(1, INFER) if n == 1 else frames.frame(0, frames.PADDED, 1, b"\0")
    ),
}


@pytest.mark.parametrize("what", FLOODS)
def test_floods_are_ended(server: Running, what: str) -> None:
    service: Any = server.service
    with connected(server.url) as raw:
        flood(raw, itertools.islice(endless(FLOODS[what](raw)), 200))
        try:
            said = raw.closed(Code.ENHANCE_YOUR_CALM)
            assert "too many" in said
        except EOFError:  # it was reset before its last words could be read
            pass
    until(lambda: service.running == 0)
    assert service.most <= MOST_TASKS
    healthy(server)


def test_cancelling_now_and_then_is_no_flood(server: Running) -> None:
    with connected(server.url) as raw:
        for n in range(1, RESETS, 2):
            raw.send(raw.head(n, INFER), frames.reset(n, Code.CANCEL))
        raw.send(raw.call(RESETS + 1))
        assert raw.status(RESETS + 1) == (0, "")


def test_many_calls_pay_for_their_frames(server: Running) -> None:
    with connected(server.url) as raw:
        for n in range(1, 2 * IDLE_FRAMES, 2):
            ping = frames.frame(frames.PING, 0, 0, bytes(8))
            raw.send(raw.call(n), ping, frames.window_update(0, 1))
            assert raw.status(n) == (0, "")


def test_a_header_block_without_an_end(server: Running) -> None:
    for part, most in ((b"", MOST_CONTINUATIONS), (bytes(1000), 6)):
        with connected(server.url) as raw:
            raw.send(frames.frame(frames.HEADERS, 0, 1, HEADERS_1))
            flood(raw, itertools.repeat(frames.frame(frames.CONTINUATION, 0, 1, part), most + 2))
            assert raw.closed(Code.ENHANCE_YOUR_CALM)


def test_a_block_that_unpacks_into_much(server: Running) -> None:
    before = cpu_s()
    with connected(server.url) as raw:
        entry = b"\x40\x01a\x7f" + b"\x81\x1e" + bytes([120]) * 4000  # a: 4000 characters
        bomb = b"\xbe" * 15_000  # the entry, again and again
        raw.send(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, HEADERS_1 + entry + bomb))
        assert raw.closed(Code.ENHANCE_YOUR_CALM)
    assert cpu_s() - before < 2
    healthy(server)


def test_connections_that_say_nothing_are_closed(quick: Running) -> None:
    part = frames.frame(frames.HEADERS, 0, 1, HEADERS_1)
    for sent in (
        b"",
        frames.PREFACE[:9],
        frames.PREFACE,
        frames.PREFACE + frames.settings([]) + part,
    ):
        raw = Raw(quick.url)
        begin = time.monotonic()
        raw.send(sent)
        raw.closed(Code.SETTINGS_TIMEOUT)
        assert 0.3 < time.monotonic() - begin < 8
        raw.socket.close()


def test_clients_that_answer_no_ping_are_gone(quick: Running) -> None:
    with connected(quick.url) as raw:
        assert raw.until(frames.PING).flags == 0
        with pytest.raises(EOFError):
            raw.until(frames.GOAWAY)
    with connected(quick.url) as raw:
        for _ in range(3):
            ping = raw.until(frames.PING)
            raw.send(frames.frame(frames.PING, frames.ACK, 0, ping.payload))


def test_a_message_that_does_not_go_on(quick: Running) -> None:
    with connected(quick.url) as raw:
        raw.send(raw.head(1, INFER), data(1, b"\0\0\0"), raw.head(3, STREAM), data(3, b"\0\0"))
        ended = {raw.until(frames.RST_STREAM).stream for _ in range(2)}
        assert ended == {1, 3}


def test_a_client_that_grants_nothing(quick: Running) -> None:
    service: Any = quick.service
    with connected(quick.url, (frames.INITIAL_WINDOW, 0)) as raw:
        raw.send(raw.call(1, INFER, asked("1000")), raw.call(3, STREAM, asked("1000")))
        ended = {raw.until(frames.RST_STREAM).stream for _ in range(2)}
        assert ended == {1, 3}
    until(lambda: service.running == 0)


def test_a_client_that_reads_nothing(quick: Running) -> None:
    most = (1 << 31) - 1
    service: Any = quick.service
    raw = Raw(quick.url)
    raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.send(frames.PREFACE + frames.settings([(frames.INITIAL_WINDOW, most)]))
    raw.send(frames.window_update(0, most - frames.FIRST_WINDOW))
    calls = (raw.call(n, INFER, asked("1000000")) for n in range(1, 200, 2))
    flood(raw, calls)
    until(lambda: quick.connections == 0)
    until(lambda: service.running == 0)
    assert_dropped(raw.socket)
    raw.socket.close()
    healthy(quick)


def test_windows_are_kept(server: Running) -> None:
    """The server sends what it may and no more, and goes on when it may."""
    with connected(server.url, (frames.INITIAL_WINDOW, 100)) as raw:
        raw.send(raw.call(1, INFER, asked("1000")))
        assert len(raw.until(frames.DATA, 1).payload) == 100
        raw.send(frames.window_update(1, 1))
        assert len(raw.until(frames.DATA, 1).payload) == 1
        raw.send(frames.settings([(frames.INITIAL_WINDOW, 50)]), frames.window_update(1, 60))
        assert len(raw.until(frames.DATA, 1).payload) == 10
        raw.send(frames.window_update(1, 5000))
        assert raw.status(1) == (0, "")


def test_a_large_message_gets_its_window_when_there_is_room(server: Running) -> None:
    """Three messages of the largest size: two have room; the third gets it when one has ended."""
    size = SMALL.body_bytes
    with connected(server.url) as raw:
        for n in (1, 3, 5):
            raw.send(raw.head(n, LIVE), data(n, message(bytes(size))[:20]))
        granted = [raw.until(frames.WINDOW_UPDATE) for _ in range(2)]
        assert [each.stream for each in granted] == [1, 3]
        assert all(
            int.from_bytes(each.payload, "big") == size + 5 - STREAM_WINDOW for each in granted
        )
        rest = message(bytes(size))[20:]
        chunks = [rest[at : at + FRAME_BYTES] for at in range(0, len(rest), FRAME_BYTES)]
        for chunk in chunks[:-1]:
            raw.send(data(1, chunk))
        raw.send(data(1, chunks[-1], end=True))
        assert raw.until(frames.WINDOW_UPDATE).stream == 5
        assert raw.status(1)[0] == 3  # so many zeros are no message of protobuf
        raw.send(frames.reset(3, Code.CANCEL), frames.reset(5, Code.CANCEL), raw.call(7))
        assert raw.status(7) == (0, "")


def test_a_client_that_vanishes_cancels_its_calls(server: Running) -> None:
    service: Any = server.service
    before = service.cancelled
    with connected(server.url) as raw:
        for n in (1, 3):
            raw.send(raw.call(n, INFER, asked("never")))
        raw.send(raw.head(5, STREAM), data(5, asked("never")))
        until(lambda: service.running == 3)
    until(lambda: service.cancelled == before + 3)


def test_draining_serves_what_is_on_its_way() -> None:
    with grpc_server(sized, options=GrpcOptions(port=0)) as server, connected(server.url) as raw:
        raw.send(raw.call(1))
        assert raw.status(1) == (0, "")
        server.do(_drained(server))
        first = raw.until(frames.GOAWAY)
        assert int.from_bytes(first.payload[:4], "big") == (1 << 31) - 1
        ping = raw.until(frames.PING)
        raw.send(raw.call(3), frames.frame(frames.PING, frames.ACK, 0, ping.payload), raw.call(5))
        second = raw.until(frames.GOAWAY)
        assert int.from_bytes(second.payload[:4], "big") == 3
        assert raw.status(3) == (0, "")
        with pytest.raises(EOFError):
            raw.status(5)


async def _drained(server: Running) -> None:
    task = asyncio.get_running_loop().create_task(server._server.stop(5))
    server.stopping = task  # type: ignore[attr-defined]
    await asyncio.sleep(0.05)

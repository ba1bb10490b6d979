"""What gRPC calls hold: bounded for the server, given back, and no fault of a client that waits."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import hpack
import pytest

from tests.serve.grpc_raw import INFER, LIVE, STREAM, Raw, connected, data, message
from tests.serve.grpc_sample import OPEN, Running, grpc_server
from tests.serve.http_sample import Doubling
from tests.serve.test_grpc_hostile import asked, sized
from twofour.serve.app import Listen, ServeOptions, running
from twofour.serve.errors import BusyError
from twofour.serve.grpc import frames
from twofour.serve.grpc.connection import FRAME_BYTES, Connection
from twofour.serve.grpc.frames import Code
from twofour.serve.grpc.server import GrpcOptions, GrpcServer
from twofour.serve.grpc.status import STATUS
from twofour.serve.grpc.streams import _Stream
from twofour.serve.held import Held, Share
from twofour.serve.limits import Limits
from twofour.serve.service import Call as About

LIMITS = Limits(body_bytes=1 << 20, held_bytes=600_000)
UNAVAILABLE = STATUS["UNAVAILABLE"]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def held_of(server: Running) -> Held:
    return server._server._shared.held


def chunks(stream: int, body: bytes, end: bool = True) -> Iterator[bytes]:
    """DATA frames of a body."""
    for at in range(0, len(body), FRAME_BYTES):
        last = at + FRAME_BYTES >= len(body)
        yield data(stream, body[at : at + FRAME_BYTES], end=end and last)


def test_a_share_gives_back_what_it_took_and_no_more() -> None:
    held = Held(100)
    one, two = Share(held), Share(held)
    one.take(60)
    with pytest.raises(BusyError, match="no room") as error:
        two.take(41)
    assert error.value.reasons == ("the bodies of other requests take 60 of 100 bytes",)
    two.take(40)
    one.give(70)
    assert (held.bytes, one.bytes, two.bytes) == (40, 0, 40)
    two.close()
    two.close()
    assert held.bytes == 0
    with pytest.raises(BusyError, match="has ended"):
        two.take(1)
    assert held.bytes == 0


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with grpc_server(sized, options=GrpcOptions(port=0, limits=LIMITS)) as found:
        yield found


def test_messages_of_all_clients_together_are_bounded(server: Running) -> None:
    """One that finds no room gets UNAVAILABLE; its connection and other calls go on."""
    held = held_of(server)
    slow, other = 200_000, 150_000
    with connected(server.url) as first, connected(server.url) as second:
        for n in (1, 3):
            first.send(first.head(n, LIVE), data(n, message(bytes(2 * slow))[:slow]))
        until(lambda: held.bytes == 2 * slow)
        body = message(bytes(other))
        second.send(second.head(1, LIVE), data(1, body[:100_000]))
        until(lambda: held.bytes == 2 * slow + 100_000)
        second.send(second.head(3, LIVE), *chunks(3, message(bytes(120_000))))
        status, said = second.status(3)
        assert status == UNAVAILABLE
        assert "no room" in said
        second.send(data(1, body[100_000:], end=True))
        assert second.status(1)[0] == STATUS["INVALID_ARGUMENT"], "read, and no protobuf"
        until(lambda: held.bytes == 2 * slow)
        first.send(frames.reset(1, Code.CANCEL))
        until(lambda: held.bytes == slow)
        second.send(second.call(5))
        assert second.status(5) == (0, "")
    until(lambda: held.bytes == 0)


def test_a_message_is_held_until_its_request_is_answered(server: Running) -> None:
    held, service = held_of(server), server.service
    assert service is not None
    with connected(server.url) as raw:
        size = len(asked("never"))
        raw.send(raw.call(1, INFER, asked("never")))
        raw.send(raw.head(3, STREAM), data(3, asked("never")))
        until(lambda: service.running == 2)  # type: ignore[attr-defined]
        assert held.bytes == 2 * (size - 5)
        raw.send(frames.reset(1, Code.CANCEL))
        until(lambda: held.bytes == size - 5)
        raw.send(raw.head(5, STREAM), *(data(5, asked("10")) for _ in range(50)))
        raw.send(data(5, b"", end=True))
        assert raw.status(5) == (0, "")
        assert held.bytes == size - 5
    until(lambda: held.bytes == 0)


@pytest.mark.parametrize("path", [LIVE, STREAM])
def test_what_messages_inflate_to_is_bounded_too(server: Running, path: str) -> None:
    """Small on its way, and more than there is room for."""
    held = held_of(server)
    packed = message(gzip.compress(bytes(700_000)), compressed=1)
    with connected(server.url) as raw:
        raw.send(raw.head(1, path, grpc_encoding="gzip"), data(1, packed, end=True))
        status, said = raw.status(1)
        assert status == UNAVAILABLE
        assert "no room" in said
        until(lambda: held.bytes == 0)
        packed = message(gzip.compress(bytes(500_000)), compressed=1)
        raw.send(raw.head(3, LIVE, grpc_encoding="gzip"), data(3, packed, end=True))
        assert raw.status(3)[0] == STATUS["INVALID_ARGUMENT"], "inflated, and no protobuf"
        until(lambda: held.bytes == 0)


def test_both_protocols_share_the_room(tmp_path: Any) -> None:
    """A body over HTTP that is not whole leaves none for a message."""
    (tmp_path / "models").mkdir()
    options = ServeOptions(
        str(tmp_path / "models"),
        tmp_path / "cache",
        listen=Listen(http_port=0, grpc_port=0),
        limits=LIMITS,
        drain_s=0,
    )

    def ask(http: int, grpc: int) -> tuple[int, str]:
        head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 550000\r\n\r\n"
        raw = Raw(f"127.0.0.1:{http}")
        raw.send(head + bytes(500_000))
        with connected(f"127.0.0.1:{grpc}") as client:
            end, number, found = time.monotonic() + 20, 1, (0, "")
            while found[0] != UNAVAILABLE and time.monotonic() < end:  # until the body is read
                client.send(client.head(number, LIVE), *chunks(number, message(bytes(150_000))))
                found, number = client.status(number), number + 2
        raw.socket.close()
        return found

    async def work() -> tuple[int, str]:
        async with running(options) as at:
            assert at.http_port is not None
            assert at.grpc_port is not None
            return await asyncio.to_thread(ask, at.http_port, at.grpc_port)

    status, said = asyncio.run(work())
    assert status == UNAVAILABLE
    assert "no room" in said


# Waiting for the server is no slowness.


class Clock:
    """An event loop whose time is set by hand."""

    def __init__(self) -> None:
        self.now, self._loop = 100.0, asyncio.get_running_loop()

    def time(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.closed = False

    def write(self, found: bytes) -> None:
        self.sent += found

    def writelines(self, found: list[bytes]) -> None:
        for each in found:
            self.sent += each

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, size: int) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def kinds(self) -> list[tuple[int, int]]:
        """Kind and stream of the frames that were written since the last call."""
        found, at = [], 0
        while at < len(self.sent):
            length, kind, _, number = frames.read_head(bytes(self.sent), at)
            at += frames.HEAD_BYTES + length
            found.append((kind, number))
        self.sent.clear()
        return found


class Client(Raw):
    """Makes frames, and says them to a connection in this process."""

    def __init__(self, connection: Connection) -> None:
        self.encoder, self._connection = hpack.Encoder(), connection

    def send(self, *found: bytes) -> None:
        self._connection.data_received(b"".join(found))


def at_hand(limits: Limits = LIMITS) -> tuple[Clock, Wire, Connection, Client]:
    """A connection that has greeted, its clock and its wire."""
    service: Any = Doubling()
    clock, wire = Clock(), Wire()
    shared = GrpcServer(service, OPEN, GrpcOptions(limits=limits))._shared
    connection = Connection(shared, clock)  # type: ignore[arg-type]
    connection.connection_made(wire)  # type: ignore[arg-type]
    client = Client(connection)
    client.send(frames.PREFACE + frames.settings([]))
    wire.kinds()
    return clock, wire, connection, client


def cut(wire: Wire) -> list[int]:
    return [number for kind, number in wire.kinds() if kind == frames.RST_STREAM]


def test_a_call_that_waits_for_room_is_not_slow() -> None:
    """Two messages of the largest size have all of a connection's room; the third waits for it."""

    async def work() -> None:
        limits = Limits(body_bytes=1 << 20)
        clock, wire, connection, client = at_hand(limits)
        message_s = connection.shared.timeouts.message_s
        begin = message(bytes(limits.body_bytes))[:20]
        for number in (1, 3, 5):
            client.send(client.head(number, LIVE), data(number, begin))
        for _ in range(3):
            clock.now += 0.8 * message_s
            client.send(data(1, b"\0"), data(3, b"\0"))
            connection.check(clock.now)
        assert cut(wire) == []
        client.send(frames.reset(1, Code.CANCEL))
        assert (frames.WINDOW_UPDATE, 5) in wire.kinds()
        clock.now += 0.8 * message_s  # since it may go on
        connection.check(clock.now)
        assert 5 not in cut(wire)
        clock.now += 0.4 * message_s
        connection.check(clock.now)
        assert 5 in cut(wire)
        connection.connection_lost(None)

    asyncio.run(work())


def test_a_call_is_not_slow_while_the_server_reads_nothing() -> None:
    """The socket takes no answers, so nothing is read of it; then it does again."""

    async def work() -> None:
        clock, wire, connection, client = at_hand()
        message_s = connection.shared.timeouts.message_s
        client.send(client.head(1, LIVE), data(1, b"\0\0"))
        connection.pause_writing()
        clock.now += 2 * message_s
        connection.resume_writing()
        connection.check(clock.now)
        assert cut(wire) == []
        clock.now += 1.2 * message_s
        connection.check(clock.now)
        assert cut(wire) == [1]
        connection.connection_lost(None)

    asyncio.run(work())


# Streams.


class Call:
    """A call whose messages are there; those that were taken are counted."""

    def __init__(self, count: int) -> None:
        self.headers: dict[str, str] = {}
        self.left, self.taken, self.freed = count, 0, 0
        self.slow, self.go_on = False, asyncio.Event()
        self.written: list[bytes] = []

    def about(self) -> Any:
        return About({}, 0, None, "grpc")

    async def comes(self) -> bool:
        if not self.left:
            await asyncio.Event().wait()
        return True

    async def take(self) -> bytes:
        self.left -= 1
        self.taken += 1
        if self.slow:
            await self.go_on.wait()
        return b"%d" % self.taken

    async def read(self) -> bytes:
        await self.comes()
        return await self.take()

    def free(self, body: bytes) -> None:
        self.freed += 1

    async def write(self, answer: bytes) -> None:
        self.written.append(answer)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def stream_of(call: Call, in_flight: int, compute: Callable[[bytes], Any]) -> tuple[Any, _Stream]:
    """A stream that computes its requests so."""
    streams: Any = SimpleNamespace(in_flight=in_flight, stopped=False, reader=None)

    class Computing(_Stream):
        async def _answer(self, body: bytes) -> bytes:
            return bytes(await compute(body))

    return streams, Computing(streams, call)  # type: ignore[arg-type]


def test_a_stream_reads_no_more_than_it_computes() -> None:
    async def work() -> None:
        gate = asyncio.Event()

        async def compute(body: bytes) -> bytes:
            await gate.wait()
            return body

        call = Call(5)
        streams, stream = stream_of(call, 2, compute)
        running = asyncio.create_task(stream.run())
        await settled()
        assert call.taken == 2
        streams.stopped = True
        stream.stop()
        gate.set()
        with pytest.raises(BusyError):
            await asyncio.wait_for(running, 20)
        assert call.written == [b"1", b"2"], "all that was read is answered"
        assert call.freed == call.taken == 2
        stream.close()

    asyncio.run(work())


def test_a_request_that_is_being_inflated_when_the_server_stops_is_answered() -> None:
    async def work() -> None:
        async def compute(body: bytes) -> bytes:
            return body

        call = Call(3)
        call.slow = True
        streams, stream = stream_of(call, 2, compute)
        running = asyncio.create_task(stream.run())
        await settled()
        streams.stopped = True
        stream.stop()
        call.go_on.set()
        with pytest.raises(BusyError):
            await asyncio.wait_for(running, 20)
        assert call.written == [b"1"]
        assert call.taken == 1
        stream.close()

    asyncio.run(work())

"""The gRPC transport with gRPC's own client: many calls, many sizes, many channels."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from tests.serve.grpc_sample import Running, grpc_server
from twofour.serve.errors import BusyError, ForbiddenError
from twofour.serve.grpc.call import Served, ServerCall

ANY = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
LARGEST = 30 << 20


class Idle:
    """A service that is not asked for anything."""

    name, version, extensions = "idle", "1", ()
    live = ready = True


async def echo(body: bytes, call: ServerCall) -> bytes:
    """The request, or as many bytes as its metadata asks for."""
    await asyncio.sleep(float(call.headers.get("wait-s", "0")))
    if "most" in call.headers:
        return bytes(int(call.headers["most"]))
    return body


async def echo_stream(call: ServerCall) -> None:
    while (body := await call.read()) is not None:
        await call.write(body)


async def count_up(body: bytes, call: ServerCall) -> None:
    for number in range(int(body)):
        await call.write(b"%d" % number)
    raise BusyError("that was all", retry_after_s=0.5)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    async def idle() -> Any:
        return Idle()

    with grpc_server(idle) as running:
        served: Any = running._server._shared.served
        served["/t/Echo"] = Served("Echo", echo, (False, False))
        served["/t/EchoStream"] = Served("EchoStream", echo_stream, (True, True))
        served["/t/CountUp"] = Served("CountUp", count_up, (False, True))
        yield running


def patterned(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize(
    "size", [0, 1, 5, 16379, 16384, 65530, 65535, 65536, 262139, 262140, 262144, 600_000, LARGEST]
)
def test_sizes_in_both_directions(server: Running, size: int) -> None:
    body = patterned(size)
    with grpc.insecure_channel(server.url, ANY) as channel:
        unary, stream = channel.unary_unary("/t/Echo"), channel.stream_stream("/t/EchoStream")
        for compression in (None, grpc.Compression.Gzip, grpc.Compression.Deflate):
            if size == LARGEST and compression is not None:
                continue
            assert unary(body, compression=compression, timeout=30) == body
            assert list(stream(iter([body, b"", body]), compression=compression, timeout=30)) == [
                body,
                b"",
                body,
            ]


@pytest.mark.parametrize("calls", [1, 32, 500, 1500])
def test_many_calls_at_a_time(server: Running, calls: int) -> None:
    async def work() -> None:
        async with grpc.aio.insecure_channel(server.url, ANY) as channel:
            echo = channel.unary_unary("/t/Echo")
            bodies = [patterned(random.Random(n).randrange(20_000)) for n in range(calls)]
            wait = (("wait-s", "0.05"),)
            found = await asyncio.gather(*(echo(body, metadata=wait) for body in bodies))
            assert found == bodies

    asyncio.run(asyncio.wait_for(work(), 60))


def test_large_messages_side_by_side(server: Running) -> None:
    """More than a connection holds at a time, in both directions."""

    async def work() -> None:
        async with grpc.aio.insecure_channel(server.url, ANY) as channel:
            echo = channel.unary_unary("/t/Echo")
            body = patterned(20 << 20)
            found = await asyncio.gather(*(echo(body) for _ in range(12)))
            assert all(each == body for each in found)

    asyncio.run(asyncio.wait_for(work(), 60))


def test_many_channels(server: Running) -> None:
    async def one(n: int) -> None:
        own = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(server.url, own) as channel:
            body = patterned(1000 + n)
            assert await channel.unary_unary("/t/Echo")(body) == body

    async def work() -> None:
        await asyncio.gather(*(one(n) for n in range(40)))

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_long_stream_of_small_messages(server: Running) -> None:
    bodies = [b"%d" % n for n in range(5000)]
    with grpc.insecure_channel(server.url) as channel:
        assert list(channel.stream_stream("/t/EchoStream")(iter(bodies))) == bodies


def test_a_slow_reader_holds_the_handler_and_gets_all(server: Running) -> None:
    async def work() -> None:
        async with grpc.aio.insecure_channel(server.url, ANY) as channel:
            written = 0
            body = patterned(1 << 20)

            async def requests() -> AsyncIterator[bytes]:
                nonlocal written
                for _ in range(60):
                    written += 1
                    yield body

            call = channel.stream_stream("/t/EchoStream")(requests())
            await asyncio.sleep(0.5)
            assert written < 50, "an unread stream is not read either"
            assert [await call.read() == body for _ in range(60)] == [True] * 60

    asyncio.run(asyncio.wait_for(work(), 60))


def test_statuses_and_trailers_behind_messages(server: Running) -> None:
    with grpc.insecure_channel(server.url) as channel:
        call = channel.unary_stream("/t/CountUp")(b"3")
        assert [next(call) for _ in range(3)] == [b"0", b"1", b"2"]
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert refused.value.details() == "that was all"
        assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "500"


def test_a_call_past_its_deadline_and_a_large_answer_to_a_small_request(server: Running) -> None:
    with grpc.insecure_channel(server.url, ANY) as channel:
        echo = channel.unary_unary("/t/Echo")
        with pytest.raises(grpc.RpcError) as refused:
            echo(b"", metadata=(("wait-s", "5"), ("most", "9")), timeout=0.2)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(echo(b"", metadata=(("most", str(LARGEST)),), timeout=20)) == LARGEST


def test_metadata_of_bytes_is_passed_over(server: Running) -> None:
    with grpc.insecure_channel(server.url) as channel:
        pairs = (("trace-bin", bytes(range(256))), ("x-text", "a, b~"), ("x-text", "c"))
        assert channel.unary_unary("/t/Echo")(b"a", metadata=pairs) == b"a"


def test_large_answers_end_once(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(server.url, ANY) as channel:
        ask = channel.unary_unary("/t/Echo")
        for size in (1, 16_000, 20_000, 100_000, 1_000_000):
            assert len(ask(b"", metadata=(("most", str(size)),), timeout=20)) == size
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_who_may_not_call_is_told_before_the_message_is_kept(server: Running) -> None:
    def admit(headers: Any) -> None:
        raise ForbiddenError("not you")

    served: Any = server._server._shared.served
    served["/t/Closed"] = Served("Closed", echo, (False, False), admit)
    with grpc.insecure_channel(server.url, ANY) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/t/Closed")(bytes(1 << 20), timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "not you" in caught.value.details()
        assert channel.unary_unary("/t/Echo")(b"x", timeout=20) == b"x"

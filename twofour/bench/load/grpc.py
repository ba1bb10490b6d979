"""The protocol over gRPC: unary calls of prebuilt bytes on one channel."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import grpc

from twofour.bench.load import protobuf
from twofour.bench.load.client import (
    NO_ANSWER,
    Answer,
    AnswerError,
    Content,
    Done,
    Feeds,
    ModelInfo,
    Target,
    Tensor,
    require_answer,
)
from twofour.bench.load.statistics import Counters
from twofour.core.errors import InputError

_SERVICE = "/inference.GRPCInferenceService/"
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class GrpcClient:
    """A `Client` over gRPC."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        """Connects to nothing yet."""
        self.target = target
        self.held = 0
        self._timeout_s = timeout_s
        self._metadata = tuple(target.headers.items())
        self._most = 1
        self._busy = 0
        self._waiting: deque[tuple[bytes, Done, int]] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._channel: grpc.aio.Channel | None = None

    async def open(self, most: int) -> None:
        """See `Client`."""
        self._most = most
        if self._channel is not None:
            return
        address = self.target.authority
        self._channel = (
            grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), _OPTIONS)
            if self.target.secure
            else grpc.aio.insecure_channel(address, _OPTIONS)
        )
        self._infer = self._channel.unary_unary(f"{_SERVICE}ModelInfer")
        try:
            async with asyncio.timeout(min(self._timeout_s, 5.0)):
                await self._channel.channel_ready()
        except TimeoutError as e:
            raise InputError(
                f"cannot connect to {self.target.url}",
                ["no gRPC server answers there"],
                "start the server, and check --url: gRPC has a port of its own",
            ) from e

    async def close(self) -> None:
        """See `Client`."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    async def server(self) -> str:
        """See `Client`."""
        answer = await self._ask("ServerMetadata", b"")
        return protobuf.server_name(require_answer(answer, self.target, "no server metadata"))

    async def model(self) -> ModelInfo:
        """See `Client`."""
        what = f"no metadata of model {self.target.model!r}"
        answer = await self._ask("ModelMetadata", self._named())
        try:
            return protobuf.model_info(require_answer(answer, self.target, what))
        except AnswerError as e:
            raise InputError(
                f"{self.target.url}: {what}", [str(e)], "give a server that speaks KServe v2"
            ) from e

    async def statistics(self) -> Counters | None:
        """See `Client`."""
        answer = await self._ask("ModelStatistics", self._named())
        return None if answer.error else protobuf.counters(answer.body)

    def encode(self, feeds: Feeds) -> bytes:
        """See `Client`."""
        return protobuf.infer_request(self.target.model, self.target.version, feeds)

    def outputs(self, answer: Answer) -> tuple[Sequence[Tensor], Content]:
        """See `Client`."""
        return protobuf.infer_outputs(answer.body)

    def holds(self, answer: Answer, content: Content) -> bool:
        """See `Client`."""
        try:
            return sum(protobuf.infer_content(answer.body)[1]) == content.tensor_bytes
        except AnswerError:
            return False

    def send(self, message: bytes, done: Done) -> None:
        """See `Client`."""
        deadline_ns = time.monotonic_ns() + int(self._timeout_s * 1e9)
        if self._busy < self._most:
            self._start(message, done, deadline_ns)
        else:
            self.held += 1
            self._waiting.append((message, done, deadline_ns))

    def _start(self, message: bytes, done: Done, deadline_ns: int) -> None:
        self._busy += 1
        call = asyncio.get_running_loop().create_task(self._run(message, done, deadline_ns))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _run(self, message: bytes, done: Done, deadline_ns: int) -> None:
        left_s = max(deadline_ns - time.monotonic_ns(), 1) / 1e9
        try:
            body = await self._infer(message, timeout=left_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as e:
            answer = _failed(e)
        else:
            answer = Answer("", time.monotonic_ns(), body)
        self._busy -= 1
        if self._waiting:
            self._start(*self._waiting.popleft())
        done(answer)

    async def _ask(self, method: str, message: bytes) -> Answer:
        assert self._channel is not None
        ask = self._channel.unary_unary(f"{_SERVICE}{method}")
        try:
            body = await ask(message, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as e:
            return _failed(e)
        return Answer("", time.monotonic_ns(), body)

    def _named(self) -> bytes:
        return protobuf.named(self.target.model, self.target.version)


def _failed(error: grpc.aio.AioRpcError) -> Answer:
    code = error.code()
    name = NO_ANSWER if code is grpc.StatusCode.DEADLINE_EXCEEDED else code.name
    return Answer(name, time.monotonic_ns(), (error.details() or "").encode())

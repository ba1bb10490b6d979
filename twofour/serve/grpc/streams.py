"""ModelStreamInfer: many requests and their answers in one call.

Requests of one stream are computed side by side and answered in their order, as clients of Triton
expect it of models with one answer to a request. A request that fails is answered in its place by
a text, with its id, and the stream goes on; a client that sends `triton_grpc_error: true` gets the
status of the first failed instead, which ends the stream.

Source: Triton, https://github.com/triton-inference-server/server, docs/user_guide/
decoupled_models.md and docs/customization_guide/inference_protocols.md.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from twofour.serve.errors import BusyError, ServeError
from twofour.serve.grpc.call import ServerCall
from twofour.serve.grpc.status import failed, text_of
from twofour.serve.limits import Limits
from twofour.serve.models.instances import clock_ns
from twofour.serve.protocol.protobuf import Reader, encode_refusal, encode_streamed
from twofour.serve.service import Service

LOG = logging.getLogger(__name__)
_STOPS = "the server stops"
_Asked = tuple[bytes, asyncio.Task[bytes]]


class Streams:
    """Streams of inference, until the server stops."""

    def __init__(self, service: Service, limits: Limits, in_flight: int) -> None:
        """Keeps what they need.

        Args:
            service: computes.
            limits: of each request.
            in_flight: requests of one stream that are computed at a time; others stay unread.
        """
        self.service, self.reader = service, Reader(limits)
        self.in_flight = in_flight
        self.stopped = False
        self._open: set[_Stream] = set()

    def stop(self) -> None:
        """Reads no further request; those that were read are answered."""
        self.stopped = True
        for stream in self._open:
            stream.stop()

    async def infer(self, call: ServerCall) -> None:
        """ModelStreamInfer."""
        if self.stopped:
            raise BusyError(_STOPS)
        stream = _Stream(self, call)
        self._open.add(stream)
        try:
            await stream.run()
        finally:
            self._open.discard(stream)
            stream.close()


class _Stream:
    """One call."""

    def __init__(self, streams: Streams, call: ServerCall) -> None:
        self._streams, self._call, self._about = streams, call, call.about()
        self._strict = call.headers.get("triton_grpc_error") == "true"
        self._asked: asyncio.Queue[_Asked | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(streams.in_flight)
        self._computing: set[asyncio.Task[bytes]] = set()
        self._stopped = self._taking = False
        self._reader = asyncio.create_task(self._read())

    async def run(self) -> None:
        """Answers the requests in their order.

        Raises:
            ServeError: of the first that failed, if the client wants that.
            BusyError: the server stops; what was read is answered.
        """
        while (asked := await self._asked.get()) is not None:
            body, task = asked
            try:
                answer = await task
            except ServeError as e:
                if self._strict:
                    raise
                answer = encode_refusal(text_of(e), self._streams.reader.id(body))
            await self._call.write(answer)
            self._call.free(body)
            self._room.release()
        if self._streams.stopped:
            raise BusyError(_STOPS)
        await self._reader

    def stop(self) -> None:
        """Reads no further request; one that is being inflated was read."""
        self._stopped = True
        if not self._taking:
            self._reader.cancel()

    def close(self) -> None:
        """Cancels what is left."""
        for task in (self._reader, *self._computing):
            task.cancel()

    async def _read(self) -> None:
        """Starts computing each request as it comes, as long as there is room.

        It waits for room first: a request that was read is computed, whatever comes meanwhile.
        """
        try:
            while not self._stopped:
                await self._room.acquire()
                if not await self._call.comes():
                    return
                self._taking = True
                body = await self._call.take()
                self._taking = False
                task = asyncio.create_task(self._answer(body))
                self._computing.add(task)
                task.add_done_callback(self._computing.discard)
                self._asked.put_nowait((body, task))
        finally:
            self._asked.put_nowait(None)

    async def _answer(self, body: bytes) -> bytes:
        try:
            request = self._streams.reader.read(body)
            call = replace(self._about, arrived_ns=clock_ns())
            return encode_streamed(await self._streams.service.infer(request, call))
        except ServeError:
            raise
        except Exception as e:  # whatever it is, no client reads it
            error = failed()
            LOG.exception("ModelStreamInfer: %s", error.what)
            raise error from e

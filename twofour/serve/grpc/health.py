"""gRPC's health service, which Kubernetes' probes and load balancers ask.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
"""

from __future__ import annotations

import asyncio

from twofour.serve.errors import NotFoundError
from twofour.serve.grpc.call import ServerCall
from twofour.serve.limits import Limits
from twofour.serve.protocol import answers
from twofour.serve.protocol.schema import HEALTH
from twofour.serve.service import Service

NAMES = {"": "ready", "ready": "ready", "inference.GRPCInferenceService": "ready", "live": "live"}
"""What may be asked for -> the state of the service that answers it."""
WATCH_S = 0.25


class Health:
    """Answers whether the server is alive, and whether requests should be sent to it."""

    def __init__(self, service: Service, limits: Limits) -> None:
        """Keeps what it needs."""
        self._service, self._limits = service, limits
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """The server is not ready from now on, and watching ends."""
        self._stopping.set()

    async def check(self, body: bytes, call: ServerCall) -> bytes:
        """Check: now."""
        name = answers.read(HEALTH["Check"], body, self._limits).service
        serving = self._serving(name)
        if serving is None:
            raise NotFoundError(
                f"there is no service {name[:100]!r}",
                [f"expected one of {', '.join(map(repr, NAMES))}"],
                "ask for one of these",
            )
        return answers.health(serving)

    async def watch(self, body: bytes, call: ServerCall) -> None:
        """Watch: now, and whenever it changes."""
        name = answers.read(HEALTH["Watch"], body, self._limits).service
        told = b"nothing"
        while True:
            stopping = self._stopping.is_set()
            if (now := answers.health(self._serving(name))) != told:
                await call.write(now)
                told = now
            if stopping:
                return
            try:
                await asyncio.wait_for(self._stopping.wait(), WATCH_S)
            except TimeoutError:
                continue

    def _serving(self, name: str) -> bool | None:
        state = NAMES.get(name)
        if state == "ready":
            return self._service.ready and not self._stopping.is_set()
        return None if state is None else self._service.live

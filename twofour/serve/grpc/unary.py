"""The methods of one request and one answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from twofour.serve.errors import BusyError, NotFoundError, UnimplementedError
from twofour.serve.grpc.call import ServerCall
from twofour.serve.limits import Limits
from twofour.serve.protocol import answers
from twofour.serve.protocol.answers import written
from twofour.serve.protocol.protobuf import Reader, encode
from twofour.serve.protocol.schema import INFERENCE, Method
from twofour.serve.service import Service

PUBLIC = frozenset({"ServerLive", "ServerReady"})
CONTROL = frozenset({"RepositoryModelLoad", "RepositoryModelUnload"})
Handler = Callable[[bytes, ServerCall], Awaitable[bytes]]
Answer = Callable[[Any], Awaitable[bytes]]


class Unary:
    """Answers them from a service."""

    def __init__(self, service: Service, limits: Limits) -> None:
        """Keeps what they need."""
        self._service, self._limits = service, limits
        self._reader = Reader(limits)

    def handlers(self) -> dict[str, Handler]:
        """Of each method by its name, from bytes to bytes."""
        others: dict[str, Answer] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._metadata,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "TraceSetting": self._settings,
            "LogSettings": self._settings,
        }
        for kind in ("System", "Cuda"):
            others[f"{kind}SharedMemoryStatus"] = self._regions
            others[f"{kind}SharedMemoryRegister"] = self._register
            others[f"{kind}SharedMemoryUnregister"] = self._unregister
        handlers = {name: self._around(INFERENCE[name], answer) for name, answer in others.items()}
        return {"ModelInfer": self.infer, **handlers}

    async def infer(self, body: bytes, call: ServerCall) -> bytes:
        """ModelInfer."""
        about = call.about()
        return encode(await self._service.infer(self._reader.read(body), about))

    def _around(self, method: Method, answer: Answer) -> Handler:
        """A method from bytes to bytes."""

        async def handler(body: bytes, call: ServerCall) -> bytes:
            return await answer(answers.read(method, body, self._limits))

        return handler

    async def _live(self, request: Any) -> bytes:
        return written("ServerLive", live=self._service.live)

    async def _ready(self, request: Any) -> bytes:
        return written("ServerReady", ready=self._service.ready)

    async def _model_ready(self, request: Any) -> bytes:
        """A model that is not there is not ready: clients wait for one in this way."""
        try:
            ready = self._service.model_ready(request.name, request.version)
        except (NotFoundError, BusyError):
            ready = False
        return written("ModelReady", ready=ready)

    async def _server_metadata(self, request: Any) -> bytes:
        s = self._service
        return written("ServerMetadata", name=s.name, version=s.version, extensions=s.extensions)

    async def _metadata(self, request: Any) -> bytes:
        return answers.model_metadata(self._service.metadata(request.name, request.version))

    async def _config(self, request: Any) -> bytes:
        return answers.config(self._service.config(request.name, request.version))

    async def _statistics(self, request: Any) -> bytes:
        return answers.statistics(self._service.statistics(request.name, request.version))

    async def _index(self, request: Any) -> bytes:
        _require_one_repository(request)
        models = [asdict(entry) for entry in self._service.index(request.ready)]
        return written("RepositoryIndex", models=models)

    async def _load(self, request: Any) -> bytes:
        _require_one_repository(request)
        others = sorted(name for name in request.parameters if name != "config")
        if others:
            got = f"got {others[0][:100]!r}"
            what, fix = "load takes no such parameter", "put files into the repository"
            raise UnimplementedError(what, ["expected 'config' or none", got], fix)
        config = request.parameters["config"].string_param if request.parameters else ""
        await self._service.load(request.model_name, config)
        return written("RepositoryModelLoad")

    async def _unload(self, request: Any) -> bytes:
        _require_one_repository(request)
        await self._service.unload(request.model_name)
        return written("RepositoryModelUnload")

    async def _regions(self, request: Any) -> bytes:
        """The shared memory that is known: none, which is what clients begin and end with."""
        if request.name:
            raise NotFoundError(f"there is no region {request.name[:100]!r} of shared memory")
        return b""

    async def _register(self, request: Any) -> bytes:
        what, fix = "the server has no shared memory", "send tensors in the request"
        raise UnimplementedError(what, [], fix)

    async def _unregister(self, request: Any) -> bytes:
        """No region is known, so none is left."""
        return b""

    async def _settings(self, request: Any) -> bytes:
        """Settings of traces or of the log: there are none, and none can be changed."""
        if request.settings:
            what, fix = "settings cannot be changed here", "set them where the server is started"
            raise UnimplementedError(what, [], fix)
        return b""


def _require_one_repository(request: Any) -> None:
    if request.repository_name:
        got = f"got {request.repository_name[:100]!r}"
        what, fix = "the server has one repository", "leave the repository's name empty"
        raise UnimplementedError(what, ["expected no name", got], fix)

"""What both protocols talk to: states, descriptions, and inference.

A request's way: the fleet names a version, the version queues it, an instance computes it with
others, and its outputs come back as they were asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from twofour.core.errors import Error
from twofour.core.version import __version__
from twofour.serve.describe import model_config, model_statistics, version_readings
from twofour.serve.errors import (
    BusyError,
    CancelledError,
    MalformedError,
    NotFoundError,
    ServeError,
)
from twofour.serve.models.fleet import Fleet
from twofour.serve.models.instances import clock_ns
from twofour.serve.models.model import Model
from twofour.serve.models.queue import Job, Outputs
from twofour.serve.models.shadow import Shadowing
from twofour.serve.models.traffic import shadowed
from twofour.serve.models.version import Ticket, Version, tensors
from twofour.serve.protocol.classes import classified
from twofour.serve.protocol.messages import InferRequest, InferResponse, ModelMetadata
from twofour.serve.readings import Finished, ServerReading
from twofour.serve.repository.config import config_of

EXTENSIONS = (
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
    "binary_tensor_data",
)
PLATFORM = "twofour"


@dataclass(frozen=True, slots=True)
class Call:
    """What the transport knows about one request.

    Attributes:
        headers: by lower-case name (gRPC: metadata).
        arrived_ns: `time.perf_counter_ns` when its last byte was there.
        deadline_ns: on the same clock, when its client gives up; None: never.
        protocol: "http" or "grpc".
    """

    headers: Mapping[str, str]
    arrived_ns: int
    deadline_ns: int | None = None
    protocol: str = ""


@dataclass(frozen=True)
class IndexEntry:
    """A version in the repository.

    Attributes:
        name: of the model.
        version: its number; "" where the model has none.
        state: "READY", "LOADING", "UNLOADING" or "UNAVAILABLE".
        reason: why it is unavailable.
    """

    name: str
    version: str
    state: str
    reason: str = ""


Listen = Callable[[Finished], None]


class Service:
    """One server's models, as its clients see them.

    Attributes:
        name: of the server.
        version: of the package.
        extensions: of the protocol that it has.
        fleet: the models.
        listeners: are told of every request that got its answer or its error.
        refused: name of an error -> requests that it kept from every version.
    """

    version = __version__
    extensions = EXTENSIONS

    def __init__(self, fleet: Fleet, name: str = "twofour") -> None:
        """Serves a fleet."""
        self.fleet, self.name = fleet, name
        self.listeners: list[Listen] = []
        self.refused: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()

    @property
    def live(self) -> bool:
        """The process answers."""
        return True

    @property
    def ready(self) -> bool:
        """Every model that should be loaded is, and the server is not being stopped."""
        return self.fleet.ready

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether a request to it would be taken now.

        Raises:
            NotFoundError: there is no such model.
        """
        model = self._model(name)
        try:
            model.version(version)
        except BusyError:
            return False
        return not self.fleet.draining

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Inputs, outputs and versions.

        Raises:
            NotFoundError: there is no such model or version.
            BusyError: it is not ready.
        """
        model = self._model(name)
        found = model.version(version)
        inputs, outputs = tensors(found.plan, rows=found.layout.batches)
        live = tuple(str(number) for number in sorted(model.live))
        return ModelMetadata(name, live, PLATFORM, tuple(inputs), tuple(outputs))

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        """The configuration as Triton's ModelConfig, in plain data.

        Raises:
            NotFoundError, BusyError: as for `metadata`.
        """
        found = self._model(name).version(version)
        return model_config(name, found.plan, found.layout, found.config)

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        """Of all ready versions, of one model, or of one version: Triton's ModelStatistics.

        Raises:
            NotFoundError: there is no such model or version.
        """
        models = [self._model(name)] if name else list(self.fleet.models.values())
        if name and version:
            return [model_statistics(models[0].version(version))]
        return [model_statistics(each) for m in models for _, each in sorted(m.live.items())]

    def index(self, ready_only: bool = False) -> list[IndexEntry]:
        """Every version of every model of the repository, with its state."""
        found = []
        for name in sorted({*self.fleet.entries, *self.fleet.models}):
            states = self.fleet.states(name)
            found += [IndexEntry(name, str(n), s.name, s.reason) for n, s in states.items()]
            if not states:
                entry = self.fleet.entries.get(name)
                reason = (entry.error if entry else "") or "no version"
                found.append(IndexEntry(name, "", "UNAVAILABLE", reason))
        return [each for each in found if each.state == "READY" or not ready_only]

    async def load(self, name: str, config: str = "") -> None:
        """Loads a model, or loads it again as the repository has it now.

        Args:
            name: of the model.
            config: JSON with the fields of `config.yaml`, to be used instead of it; "": none.

        Raises:
            ForbiddenError, NotFoundError: as `Fleet.load`.
            MalformedError: the configuration, or what it makes of the model, cannot be used.
        """
        try:
            plain = orjson.loads(config) if config else None
        except orjson.JSONDecodeError as e:
            raise MalformedError("the config is no JSON", [str(e)]) from e
        try:
            chosen = None if plain is None else config_of(plain, "the config given")
            await self.fleet.load(name, chosen)
        except ServeError:
            raise
        except Error as e:
            raise MalformedError(e.what, e.reasons, e.fix) from e

    async def unload(self, name: str) -> None:
        """Takes a model out of service once it has answered what it has.

        Raises:
            ForbiddenError, NotFoundError: as `Fleet.unload`.
        """
        await self.fleet.unload(name)

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        """Computes one request. Cancelling the task that awaits this cancels the request.

        Raises:
            ServeError: it was refused, or waited too long.
            FailedError: the server failed.
        """
        try:
            model, version = await self._route(request, call)
        except ServeError as e:
            self.refused[type(e).__name__] += 1
            self._tell(request, call, "", None, e)
            raise
        number = str(version.number)
        try:
            _require_outputs(request, version)
            future: asyncio.Future[Outputs] = self._loop.create_future()
            job = version.submit(request.inputs, _ticket(request, call), _settler(future))
            shadow = _shadow(model, version, request, call)
            try:
                outputs = await future
            except asyncio.CancelledError:
                version.cancel(job)
                raise
            if request.outputs:
                outputs = _asked_for(request, outputs, version)
        except ServeError as e:
            version.tally.failed(e, call.arrived_ns, clock_ns())
            self._tell(request, call, number, None, e)
            raise
        except asyncio.CancelledError:
            gone = CancelledError("the client has gone")
            version.tally.failed(gone, call.arrived_ns, clock_ns())
            self._tell(request, call, number, None, gone)
            raise
        if shadow is not None:
            shadow.answered(outputs)
        version.tally.answered(job, call.arrived_ns, clock_ns())
        if self.listeners:
            self._tell(request, call, number, job, None)
        return InferResponse(model.name, number, request.id, outputs)

    def reading(self) -> ServerReading:
        """The server at this moment, for metrics and the status page."""
        fleet = self.fleet
        names = sorted({*fleet.entries, *fleet.models})
        return ServerReading(
            self.name,
            self.version,
            self.ready,
            fleet.draining,
            [each for name in names for each in version_readings(fleet, name)],
            {name: model.swaps for name, model in fleet.models.items()},
            self.refused,
        )

    async def _route(self, request: InferRequest, call: Call) -> tuple[Model, Version]:
        """The version that is to answer.

        Raises:
            NotFoundError, BusyError: there is none, or none now.
        """
        fleet = self.fleet
        model = fleet.models.get(request.model)
        sticky = _sticky(model, call)
        if model is not None and model.ready and not fleet.draining:
            model.used_s = time.monotonic()
            return model, model.version(request.version, sticky)
        version = await fleet.version(request.model, request.version, sticky)
        return fleet.models[request.model], version

    def _tell(
        self,
        request: InferRequest,
        call: Call,
        version: str,
        job: Job | None,
        error: ServeError | None,
    ) -> None:
        """Tells who listens of a request that is over."""
        if not self.listeners:
            return
        finished = Finished(
            request.id or call.headers.get("x-request-id", ""),
            request.model,
            version,
            call.protocol,
            error,
            job.rows if job else 0,
            job.batch_rows if job else 0,
            call.arrived_ns,
            job.started_ns if job else 0,
            job.computing_ns if job else 0,
            job.computed_ns if job else 0,
            clock_ns(),
            call.headers,
        )
        for listen in self.listeners:
            listen(finished)

    def _model(self, name: str) -> Model:
        model = self.fleet.models.get(name)
        if model is None or (model.wanted is None and not model.ready):
            if name in self.fleet.entries and not self.fleet.entries[name].error:
                raise BusyError(f"model {name!r} is not loaded")
            raise NotFoundError(f"there is no model {name[:100]!r}")
        return model


def _sticky(model: Model | None, call: Call) -> str:
    """The value of the header that ties a client to a version; "" for none."""
    if model is None or model.wanted is None:
        return ""
    header = model.wanted.config.traffic.sticky_header
    return call.headers.get(header.lower(), "") if header else ""


def _ticket(request: InferRequest, call: Call) -> Ticket:
    """What the request's parameters ask of the queue.

    Raises:
        MalformedError: one of them is no whole number, or below 0.
    """
    if not request.parameters:
        return Ticket(call.arrived_ns, deadline_ns=call.deadline_ns)
    numbers = []
    for name in ("priority", "timeout"):
        number = request.parameters.get(name, 0)
        if type(number) is not int or number < 0:
            expected = "expected a whole number, 0 or more"
            raise MalformedError(f"parameter {name!r} is not usable", [expected])
        numbers.append(number)
    return Ticket(call.arrived_ns, numbers[0], numbers[1], call.deadline_ns)


def _settler(future: asyncio.Future[Outputs]) -> Callable[[Outputs | Exception], None]:
    """Hands a job's result to who awaits it, if somebody still does."""

    def settle(result: Outputs | Exception) -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    return settle


def _shadow(model: Model, version: Version, request: InferRequest, call: Call) -> Shadowing | None:
    """A copy of the request for the shadow version, if there is one and it is drawn."""
    if model.wanted is None:
        return None
    traffic = model.wanted.config.traffic
    shadow = model.live.get(traffic.shadow) if traffic.shadow is not None else None
    if shadow is None or shadow is version or not shadowed(traffic):
        return None
    return Shadowing(shadow, request.inputs, call.arrived_ns, model.comparison)


def _require_outputs(request: InferRequest, version: Version) -> None:
    """Refuses outputs that the model has not."""
    if not request.outputs:
        return
    known = {info.name for info in version.plan.outputs}
    unknown = [each.name[:100] for each in request.outputs if each.name not in known]
    if unknown:
        raise MalformedError(
            f"the model has no output {unknown[0]!r}",
            [f"expected some of {', '.join(sorted(known))}"],
            "ask for outputs that the model's metadata names",
        )


def _asked_for(request: InferRequest, outputs: Outputs, version: Version) -> Outputs:
    """The outputs that a request names, as tensors or as classes."""
    labels = version.config.labels
    return {
        each.name: classified(outputs[each.name], each.classes, labels.get(each.name, ()))
        if each.classes
        else outputs[each.name]
        for each in request.outputs
    }

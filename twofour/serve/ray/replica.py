"""One copy of one model, in a process of Ray Serve: its queue, its batches, its instances.

It answers the requests of HTTP as a server of its own would, and looks at the repository by
itself: a new version goes live in it as it does there, without a process that starts or ends.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from twofour.core.errors import InputError
from twofour.serve.app import SWITCH_S, ServeOptions
from twofour.serve.auth import Auth
from twofour.serve.errors import BusyError, ServeError
from twofour.serve.http.api import Api, Parts
from twofour.serve.http.messages import Reply, Request
from twofour.serve.library import Library
from twofour.serve.logs import Logs
from twofour.serve.metrics import Metrics
from twofour.serve.models.fleet import Entry, Fleet, Loaded
from twofour.serve.repository.config import ModelConfig
from twofour.serve.repository.rebuild import Builds
from twofour.serve.repository.store import Store
from twofour.serve.service import Service
from twofour.serve.status import Status
from twofour.serve.totals import Totals

log = logging.getLogger(__name__)


class OneModel:
    """A library, of which one model is seen."""

    def __init__(self, library: Library, name: str) -> None:
        """Reads nothing yet."""
        self._library, self._name = library, name

    async def entries(self) -> Mapping[str, Entry]:
        """The model, if it is there.

        Raises:
            InputError: the repository cannot be read.
        """
        entries = await self._library.entries()
        return {name: entry for name, entry in entries.items() if name == self._name}

    async def load(self, name: str, number: int, config: ModelConfig) -> Loaded:
        """As `Library.load`."""
        return await self._library.load(name, number, config)


class Replica:
    """The class of a model's deployment; Ray calls its methods in one event loop."""

    def __init__(self, model: str, options: ServeOptions) -> None:
        """Loads nothing yet: that is for `reconfigure`, which may wait."""
        self.model, self.options = model, options
        self.api: Api | None = None

    async def reconfigure(self, _: Any) -> None:
        """Loads the model; Ray sends requests when this has returned.

        Raises:
            InputError: no version of it can be served; with every reason.
        """
        if self.api is not None:
            return
        sys.setswitchinterval(SWITCH_S)
        options = self.options
        self.logs = Logs(options.logs, sys.stderr)
        store = Store(options.repository, options.cache, trust=options.trust)
        self.library = Library(store, Builds(options.cache))
        self.fleet = Fleet(OneModel(self.library, self.model), options.fleet)
        service = Service(self.fleet, options.name)
        service.listeners.append(self.logs.request)
        await self.fleet.start()
        if not self.fleet.ready:
            raise InputError(f"model {self.model!r} cannot be served", self.reasons())
        self.api = api_of(service, options)

    async def answer(self, request: Request) -> Reply:
        """The reply to a request that a front has admitted: of an error, too."""
        api = self.api
        if api is None:
            raise BusyError(f"model {self.model!r} is not loaded")
        request.arrived_ns = time.perf_counter_ns()
        try:
            reply = await api.answer(request)
        except ServeError as e:
            reply = api.failed(request, e)
        reply.body = (b"".join(reply.body),)
        return reply

    async def check_health(self) -> None:
        """Ray starts another process for one that fails here.

        Raises:
            BusyError: no version answers any more.
        """
        if not self.fleet.ready:
            raise BusyError(f"model {self.model!r} does not answer", self.reasons())

    async def __del__(self) -> None:
        """Ray calls it when all requests are answered, or are out of time."""
        if self.api is not None:
            await self.fleet.close()
            self.library.close()
            self.logs.close()

    def reasons(self) -> list[str]:
        """Why versions do not answer."""
        states = self.fleet.states(self.model).items()
        found = [f"version {n}: {s.name} {s.reason}" for n, s in states if s.name != "READY"]
        entry = self.fleet.entries.get(self.model)
        if entry is None:
            return [*found, f"the repository {self.options.repository} has no such model"]
        return [*found, *filter(None, [entry.error])]


def api_of(service: Service, options: ServeOptions) -> Api:
    """What answers: whoever asks was admitted by a front."""
    totals = Totals()
    metrics, status = Metrics(service.reading, totals), Status(service.reading, totals)
    anybody = Auth(None, None, loopback_only=False)
    return Api(Parts(service, anybody, metrics.page, status.document, options.limits))

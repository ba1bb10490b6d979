"""All models of a server: what the repository holds, what is loaded, how much memory that takes.

    repository --snapshot--> entries --become--> models --version--> one that answers

`Control` says who decides what is loaded: the repository's content at start ("none"), the same
looked at again and again ("poll"), or requests of clients ("explicit").
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from twofour.core.errors import Error, InputError
from twofour.engine import Engine
from twofour.serve.errors import BusyError, ForbiddenError, NotFoundError
from twofour.serve.models.model import Desired, Model, State
from twofour.serve.models.version import Version
from twofour.serve.repository.config import ModelConfig
from twofour.serve.repository.errors import PassingError

log = logging.getLogger(__name__)
TRIES = 3
Array = NDArray[Any]
Control = Literal["none", "poll", "explicit"]


@dataclass(frozen=True)
class Entry:
    """A model in the repository.

    Attributes:
        config: of the model.
        versions: number -> text that changes when the files of the version do.
        error: why nothing of it can be used; "" if it can.
    """

    config: ModelConfig = field(default_factory=ModelConfig)
    versions: Mapping[int, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Loaded:
    """What a version is opened from.

    Attributes:
        engine: runs here.
        warm: inputs for warm-up; None: zeros alone.
    """

    engine: Engine
    warm: Mapping[str, Array] | None = None


class Library(Protocol):
    """Where engines come from."""

    async def entries(self) -> Mapping[str, Entry]:
        """All models there are; raises Error."""

    async def load(self, name: str, number: int, config: ModelConfig) -> Loaded:
        """A version of the last `entries`, built if need be; raises Error."""


@dataclass(frozen=True)
class FleetOptions:
    """How a fleet is run.

    Attributes:
        control: who decides what is loaded.
        first: "explicit": models that are loaded at start.
        memory_bytes: most of all live versions; None: no bound.
        poll_s: "poll": seconds between two looks.
    """

    control: Control = "none"
    first: tuple[str, ...] = ()
    memory_bytes: int | None = None
    poll_s: float = 5.0


class Fleet:
    """The models of one server.

    Attributes:
        options: how it is run.
        models: by name: all that were loaded or shall be.
        entries: of the repository, as last seen.
        settled: all that is to be loaded at start is, or was refused.
        leaving: the server will stop soon: it is not ready, and answers.
        draining: no request is taken any more.
    """

    def __init__(self, library: Library, options: FleetOptions) -> None:
        """Looks at nothing yet."""
        self.options = options
        self.models: dict[str, Model] = {}
        self.entries: Mapping[str, Entry] = {}
        self.settled = False
        self.leaving = False
        self.draining = False
        self._library = library
        self._memory = asyncio.Lock()
        self._asked: dict[str, ModelConfig | None] = {}
        self._needed: set[str] = set()
        self._lazy: dict[str, asyncio.Task[None]] = {}
        self._changes: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()

    @property
    def ready(self) -> bool:
        """Every model that was to be loaded at start has a version that answers.

        So a broken model that is added later does not take a server that answers out of service.
        """
        if not self.settled or self.leaving or self.draining:
            return False
        needed = (name for name in self._needed if name in self.entries and self._should(name))
        return all(name in self.models and self._able(self.models[name]) for name in needed)

    @property
    def memory_bytes(self) -> int:
        """Of all live versions."""
        return sum(model.memory_bytes for model in self.models.values())

    async def start(self) -> None:
        """Loads what is to be loaded, and begins to poll.

        Raises:
            InputError: the repository cannot be read.
        """
        self._asked = dict.fromkeys(self.options.first)
        await self.refresh()
        self._needed = {
            name
            for name, entry in self.entries.items()
            if self._should(name) and (entry.error or entry.config.load == "start")
        }
        self.settled = True
        if self.options.control == "poll":
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    async def refresh(self) -> None:
        """Looks at the repository, and lets every model become what it says.

        Raises:
            Error: the repository cannot be read; nothing changes.
        """
        await asyncio.gather(*await self.look())

    async def load(self, name: str, config: ModelConfig | None = None) -> None:
        """Loads a model as the repository has it now, or again with what has changed.

        Args:
            name: of the model.
            config: instead of its `config.yaml`, until it is loaded anew.

        Raises:
            ForbiddenError: control is not explicit.
            NotFoundError: the repository has no such model.
            Error: a version cannot be loaded; what served before goes on.
        """
        self._require_explicit()
        await self._to_its_end(self._load_asked(name, config))

    async def _load_asked(self, name: str, config: ModelConfig | None) -> None:
        self.entries = await self._library.entries()
        if name not in self.entries:
            raise NotFoundError(f"the repository has no model {name[:100]!r}")
        if self.entries[name].error:
            raise InputError(f"model {name!r} cannot be loaded", [self.entries[name].error])
        known, before = name in self._asked, self._asked.get(name)
        self._asked[name] = config
        await self._become(name, on_demand=True, again=True)
        model = self.models[name]
        failed = [state.reason for state in model.states.values() if state.reason]
        if failed or not model.ready:
            mine = name in self._asked and self._asked[name] is config  # no other load, no unload
            if mine and known:
                self._asked[name] = before
            elif mine and not model.ready:
                del self._asked[name]
            raise InputError(f"model {name!r} was not loaded", failed or ["it has no version"])

    async def unload(self, name: str) -> None:
        """Takes a model out of service once it has answered what it has.

        Raises:
            ForbiddenError: control is not explicit.
            NotFoundError: no such model is loaded.
        """
        self._require_explicit()
        if name not in self._asked or name not in self.models:
            raise NotFoundError(f"no model {name[:100]!r} is loaded")
        del self._asked[name]
        await self._to_its_end(self._become(name))

    async def version(self, name: str, number: str = "", sticky: str = "") -> Version:
        """The version that answers a request, loaded first if the model is to be so.

        Raises:
            NotFoundError: there is no such model or version.
            BusyError: it is not ready, or the server drains.
        """
        if self.draining:
            raise BusyError("the server is being stopped", [], "send the request to another one")
        for _ in range(TRIES):  # others may want its memory before it answers
            model = self.models.get(name)
            if model is not None:
                model.used_s = time.monotonic()
            if (model is not None and model.ready) or not self._loads_on_demand(name):
                break
            await self._load_first(name)
        model = self.models.get(name)
        if model is not None and model.evicted:
            raise BusyError(f"model {name!r} finds no memory that others leave it")
        if model is None or (model.wanted is None and not model.ready):
            raise NotFoundError(f"there is no model {name[:100]!r}")
        return model.version(number, sticky)

    async def close(self) -> None:
        """Takes no more requests, answers those that came, and ends all versions."""
        self.draining = True
        tasks = (*self._lazy.values(), *self._tasks.values(), *self._changes)
        given_up = [*filter(None, [self._poller]), *tasks]
        for task in given_up:
            task.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in self.models.values()))

    def states(self, name: str) -> dict[int, State]:
        """Of every version of a model that the server knows."""
        model, entry = self.models.get(name), self.entries.get(name)
        found = dict(model.states) if model is not None else {}
        for number in entry.versions if entry is not None else ():
            found.setdefault(number, State("UNAVAILABLE", "not loaded"))
        return dict(sorted(found.items()))

    async def _to_its_end(self, change: Coroutine[Any, Any, None]) -> None:
        """Makes a change though who asked for it goes away; only `close` ends it before."""
        task = asyncio.get_running_loop().create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    @staticmethod
    def _able(model: Model) -> bool:
        """It answers, or does so again with the next request."""
        return model.ready or model.evicted

    def _require_explicit(self) -> None:
        if self.options.control != "explicit":
            raise ForbiddenError(
                "models are not loaded or unloaded on request here",
                [f"the server runs with --control {self.options.control}"],
                "start it with --control explicit",
            )

    def _loads_on_demand(self, name: str) -> bool:
        entry = self.entries.get(name)
        return entry is not None and not entry.error and self._should(name)

    def _should(self, name: str) -> bool:
        """Whether a model of the repository is to be loaded, now or with its first request."""
        return self.options.control != "explicit" or name in self._asked

    async def _load_first(self, name: str) -> None:
        """Loads a model for the requests that wait for it: once, however many there are."""
        task = self._lazy.get(name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._become(name, on_demand=True))
            self._lazy[name] = task
            task.add_done_callback(lambda _: self._lazy.pop(name, None))
        await asyncio.shield(task)

    async def look(self) -> list[asyncio.Task[None]]:
        """Looks at the repository; the tasks that then bring each model to what it says.

        Raises:
            Error: the repository cannot be read.
        """
        self.entries = await self._library.entries()
        gone = [name for name in self.models if name not in self.entries]
        return [self._bringing(name) for name in (*self.entries, *gone)]

    def _bringing(self, name: str) -> asyncio.Task[None]:
        """The task for one model; one that is at it looks once more before it ends."""
        self._again.add(name)
        task = self._tasks.get(name)
        if task is None:
            task = self._tasks[name] = asyncio.get_running_loop().create_task(self._bring(name))
        return task

    async def _bring(self, name: str) -> None:
        try:
            while name in self._again:
                self._again.discard(name)
                await self._become(name)
        finally:
            del self._tasks[name]

    async def _become(self, name: str, *, on_demand: bool = False, again: bool = False) -> None:
        """Brings one model to what repository and control say it should be.

        Args:
            name: of the model.
            on_demand: a request wants it, though it waits for its first one.
            again: versions that were refused are tried once more as they are.
        """
        entry = self.entries.get(name)
        model = self.models.get(name)
        if entry is None or not self._should(name):
            if model is not None:
                await model.become(None)
            return
        if entry.error:
            log.error("model %s cannot be used: %s", name, entry.error)
            return
        config = self._asked.get(name) or entry.config
        absent = model is None or not model.ready
        if absent and not on_demand and (config.load == "first" or (model and model.evicted)):
            return
        if model is None:
            model = self.models[name] = Model(name, lambda n, c: self._open(name, n, c))
        numbers = config.versions.choose(list(entry.versions))
        desired = Desired(config, {n: entry.versions[n] for n in numbers})
        await model.become(desired, again=again)

    async def _open(self, name: str, number: int, config: ModelConfig) -> Version:
        """Loads and starts one version, within the bound of memory.

        Raises:
            Error: it cannot be read, built, opened or held.
        """
        loaded = await self._library.load(name, number, config)
        async with self._memory:
            version = Version(name, number, config, loaded.engine)
            await self._make_room(version, name)
            await version.start(loaded.warm)
            return version

    async def _make_room(self, version: Version, name: str) -> None:
        """Unloads the models whose last request is the longest ago, until a version fits.

        Raises:
            PassingError: there is no room for it, or not while others are being loaded.
        """
        bound = self.options.memory_bytes
        if bound is None:
            return
        others = [m for m in self.models.values() if m.name != name and m.ready and not m.changing]
        others.sort(key=lambda model: model.used_s)
        own = self.models[name].memory_bytes if name in self.models else 0
        if own + version.memory_bytes > bound:
            raise PassingError(
                f"model {name!r}, version {version.number}, does not fit into the memory allowed",
                [
                    f"expected at most {bound} bytes",
                    f"got {version.memory_bytes}, and {own} of its other versions",
                ],
                "raise --memory, or serve fewer versions",
            )
        while others and self.memory_bytes + version.memory_bytes > bound:
            oldest = others.pop(0)
            log.info("model %s is unloaded to make room for %s", oldest.name, name)
            oldest.evicted = True
            await oldest.become(None)
        if self.memory_bytes + version.memory_bytes > bound:
            what = f"model {name!r}, version {version.number}, finds no memory now"
            raise PassingError(what, ["other models are being loaded"], "try again")

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.options.poll_s)
            try:
                await self.look()  # a model that takes long does not keep others from changing
            except (Error, OSError) as e:
                log.error("the repository cannot be read, what is loaded stays: %s", e)

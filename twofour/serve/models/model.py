"""A model: the versions that it should have, those that it has, and how one takes another's place.

A new version is loaded and warmed up beside the old one. When it is ready, requests go to it from
one moment to the next; the old one answers those it has, and is closed. A version that cannot be
loaded changes nothing but its own state: what served before goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from twofour.core.errors import Error
from twofour.core.memory import give_back
from twofour.serve.errors import BusyError, NotFoundError
from twofour.serve.models.shadow import Comparison
from twofour.serve.models.traffic import choose, parts
from twofour.serve.models.version import Version
from twofour.serve.repository.config import ModelConfig, WarmUp
from twofour.serve.repository.errors import PassingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """Where a version stands.

    Attributes:
        name: "LOADING", "READY", "UNLOADING" or "UNAVAILABLE".
        reason: why it is unavailable, or why its new files are.
    """

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Desired:
    """What a model should be.

    Attributes:
        config: of the model.
        versions: number -> text that changes when the files of the version do.
    """

    config: ModelConfig
    versions: Mapping[int, str]


Open = Callable[[int, ModelConfig], Awaitable[Version]]
"""Loads one version and starts it; raises Error."""


class Model:
    """One model of the server.

    Attributes:
        name: of the model.
        wanted: what it should be; None: nothing, it is unloaded.
        live: versions that answer, by number.
        states: of every version that is wanted or live.
        comparison: of the shadow's answers.
        swaps: how often a version took the place of others.
        used_s: `time.monotonic` of the last request.
        evicted: it was unloaded to make room, and comes back with its next request.
    """

    def __init__(self, name: str, open_version: Open) -> None:
        """No version yet."""
        self.name = name
        self.wanted: Desired | None = None
        self.live: dict[int, Version] = {}
        self.states: dict[int, State] = {}
        self.comparison = Comparison()
        self.swaps = 0
        self.used_s = time.monotonic()
        self.evicted = False
        self._open = open_version
        self._prints: dict[int, str] = {}
        self._refused: dict[int, tuple[str, ModelConfig]] = {}
        self._turn = asyncio.Lock()
        self._becoming = 0
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def memory_bytes(self) -> int:
        """Of all its live versions."""
        return sum(version.memory_bytes for version in self.live.values())

    @property
    def changing(self) -> bool:
        """It is becoming something else, or waits for its turn to."""
        return self._becoming > 0

    @property
    def ready(self) -> bool:
        """It has a version that answers."""
        return bool(self.live)

    def version(self, number: str, sticky: str = "") -> Version:
        """The version that answers a request.

        Args:
            number: as the client gave it; "": the server chooses.
            sticky: see `choose`.

        Raises:
            NotFoundError: no such version is served.
            BusyError: none is ready yet.
        """
        if number:
            return self._named(number)
        if not self.live:
            raise BusyError(f"model {self.name!r} is not ready", self._reasons())
        if len(self.live) == 1 or self.wanted is None:
            return self.live[max(self.live)]
        return self.live[choose(self._candidates(), self.wanted.config.traffic, sticky)]

    def share(self, number: int) -> float:
        """The share of requests without a version that this one answers, 0 to 1."""
        if not self.live or self.wanted is None:
            return 0.0
        shares = parts(self._candidates(), self.wanted.config.traffic)
        return shares.get(number, 0.0) / sum(shares.values())

    def _candidates(self) -> list[int]:
        """Live versions that are wanted; those left over where none of these lives yet."""
        assert self.wanted is not None
        return [n for n in self.live if n in self.wanted.versions] or list(self.live)

    async def become(self, wanted: Desired | None, *, again: bool = False) -> None:
        """Loads, replaces and unloads versions until the model is as wanted, or cannot be.

        Args:
            wanted: None: no version at all.
            again: versions that were refused before are tried once more though nothing of them has
                changed.
        """
        self._becoming += 1
        try:
            async with self._turn:
                await self._become(wanted, again)
        finally:
            self._becoming -= 1

    async def _become(self, wanted: Desired | None, again: bool) -> None:
        """As `become`, when it is its turn."""
        self.wanted = wanted
        if wanted is None:
            self.states.clear()
            self._refused.clear()
            self._leave(list(self.live))
            return
        self.evicted = False
        for number in sorted(wanted.versions):
            known = self._refused.get(number) == self._made_of(number, wanted)
            if self._is_current(number, wanted):
                self.live[number].config = wanted.config  # labels may have changed
                self.states[number] = State("READY")
                self._refused.pop(number, None)
            elif again or not known:
                await self._load(number, wanted)
        if all(number in self.live for number in wanted.versions):
            self._leave([n for n in self.live if n not in wanted.versions])
        for number in [n for n in self.states if n not in wanted.versions]:
            if number not in self.live:
                del self.states[number]

    async def close(self) -> None:
        """Answers what has come, then ends all versions."""
        await self.become(None)
        await asyncio.gather(*self._leaving)

    def _is_current(self, number: int, wanted: Desired) -> bool:
        """Whether the live version is made of these files, and runs as configured."""
        version = self.live.get(number)
        return (
            version is not None
            and self._prints[number] == wanted.versions[number]
            and _of_instances(version.config) == _of_instances(wanted.config)
        )

    def _made_of(self, number: int, wanted: Desired) -> tuple[str, ModelConfig]:
        """All that loading a version depends on."""
        made = _of_instances(wanted.config)
        return wanted.versions[number], made.model_copy(update={"warm_up": wanted.config.warm_up})

    async def _load(self, number: int, wanted: Desired) -> None:
        """Loads one version beside what is live; then it takes its place at once."""
        if number not in self.live:
            self.states[number] = State("LOADING")
        try:
            version = await self._open(number, wanted.config)
        except Exception as e:  # noqa: BLE001  a full memory, a bug: the other models go on
            self._refuse(number, wanted, e)
            return
        self._refused.pop(number, None)
        if self.live:
            self.swaps += 1
        if number in self.live:
            self._leave([number])
        self.live[number] = version
        self._prints[number] = wanted.versions[number]
        self.states[number] = State("READY")
        self.used_s = time.monotonic()
        log.info("model %s, version %d is ready", self.name, number)

    def _refuse(self, number: int, wanted: Desired, error: Exception) -> None:
        """Keeps why a version cannot be loaded; it is tried again when it has changed."""
        reason, trace = str(error), None
        if not isinstance(error, Error):
            reason, trace = f"{type(error).__name__}: see the server's log", error
        told = (self.name, number, reason)
        log.error("model %s, version %d cannot be loaded: %s", *told, exc_info=trace)
        if number in self.live:
            kept = f"what was loaded before goes on; its new files: {reason}"
            self.states[number] = State("READY", kept)
        else:
            self.states[number] = State("UNAVAILABLE", reason)
        if isinstance(error, Error) and not isinstance(error, PassingError):
            # Of anything else, a full memory or a lost network, the next look may find less.
            self._refused[number] = self._made_of(number, wanted)

    def _leave(self, numbers: list[int]) -> None:
        """Takes versions out of service; they end when they have answered what they have."""
        for number in numbers:
            version = self.live.pop(number)
            self.states[number] = State("UNLOADING")
            task = asyncio.get_running_loop().create_task(self._end(version))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _end(self, version: Version) -> None:
        await version.close()
        await asyncio.get_running_loop().run_in_executor(None, give_back)
        if version.number not in self.live and self.states.get(version.number) == State(
            "UNLOADING"
        ):
            del self.states[version.number]
        log.info("model %s, version %d is unloaded", self.name, version.number)

    def _named(self, number: str) -> Version:
        wanted = int(number) if number.isascii() and number.isdigit() and len(number) < 19 else 0
        version = self.live.get(wanted)
        if version is not None:
            return version
        state = self.states.get(wanted)
        if state is not None and state.name == "LOADING":
            raise BusyError(f"model {self.name!r}, version {number}, is not ready", [state.name])
        served = ", ".join(map(str, sorted(self.live))) or "none"
        raise NotFoundError(
            f"model {self.name!r} has no version {number[:32]!r}",
            [f"served: {served}"],
            "leave the version out, or name one that is served",
        )

    def _reasons(self) -> list[str]:
        """States for a client: no more than their names."""
        return [f"version {n}: {state.name}" for n, state in sorted(self.states.items())]


def _of_instances(config: ModelConfig) -> ModelConfig:
    """The part of a configuration that a running version depends on."""
    return config.model_copy(
        update={
            "versions": ModelConfig().versions,
            "traffic": ModelConfig().traffic,
            "warm_up": WarmUp(),
            "labels": {},
            "parameters": {},
            "load": "start",
        }
    )

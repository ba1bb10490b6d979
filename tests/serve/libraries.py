"""A repository in memory, which tests change as they go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from twofour.core.errors import EngineError
from twofour.engine import Engine
from twofour.serve.models.fleet import Entry, Fleet, FleetOptions, Loaded
from twofour.serve.repository.config import ModelConfig, config_of
from twofour.serve.service import Call, Service


class Shelf:
    """Models by name: their engines by version, where None is one that cannot be loaded."""

    def __init__(self) -> None:
        self.engines: dict[str, dict[int, Engine | None]] = {}
        self.configs: dict[str, Any] = {}
        self.opened: list[tuple[str, int]] = []
        self.gates: dict[str, asyncio.Event] = {}  # what a model's versions wait for

    def put(self, name: str, engines: dict[int, Engine | None], **config: Any) -> Shelf:
        self.engines[name], self.configs[name] = engines, config
        return self

    async def entries(self) -> Mapping[str, Entry]:
        return {
            name: Entry(
                config_of(self.configs[name], name),
                {number: str(id(engine)) for number, engine in engines.items()},
            )
            for name, engines in self.engines.items()
        }

    async def load(self, name: str, number: int, config: ModelConfig) -> Loaded:
        self.opened.append((name, number))
        if name in self.gates:
            await self.gates[name].wait()
        engine = self.engines[name][number]
        if engine is None:
            raise EngineError(f"{name}/{number} is not a readable engine", ["truncated"])
        return Loaded(engine)


async def serving(shelf: Shelf, **options: Any) -> Service:
    """A service on a shelf, started."""
    fleet = Fleet(shelf, FleetOptions(**options))
    await fleet.start()
    return Service(fleet)


def call(arrived_ns: int = 0, **headers: str) -> Call:
    return Call({name.replace("_", "-"): text for name, text in headers.items()}, arrived_ns)


def run(shelf: Shelf, work: Callable[[Service], Awaitable[Any]], **options: Any) -> Any:
    """Work with a service, which is closed in the end."""

    async def whole() -> Any:
        service = await serving(shelf, **options)
        try:
            return await work(service)
        finally:
            await service.fleet.close()

    return asyncio.run(asyncio.wait_for(whole(), 60))

"""A server that loads and unloads for weeks: memory, threads, descriptors and mappings stay."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvloop

from tests.serve.engines import image, image_engine
from tests.serve.libraries import call
from tests.serve.server_process import put
from twofour.serve.app import Listen, Running, ServeOptions, running
from twofour.serve.logs import LogOptions
from twofour.serve.models.fleet import FleetOptions
from twofour.serve.models.instances import clock_ns
from twofour.serve.protocol.messages import InferRequest

WARM_UP, CYCLES = 300, 200
FEW = 4
"""Threads and files of pools, which grow up to a bound when they please."""


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    rss_bytes: int
    threads: int
    files: int
    mappings: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        me = Path("/proc/self")
        rss_pages = int((me / "statm").read_text().split()[1])
        return cls(
            rss_pages * mmap.PAGESIZE,
            len(os.listdir(me / "task")),
            len(os.listdir(me / "fd")),
            len((me / "maps").read_text().splitlines()),
        )


async def cycle(server: Running, seed: int) -> None:
    """Loads, answers, loads again with another configuration, unloads."""
    service = server.service
    await service.load("m")
    request = InferRequest("m", "", "", image(2, seed))
    waiting = [service.infer(request, call(clock_ns())) for _ in range(4)]
    await asyncio.gather(*waiting)
    await service.load("m", '{"execution": "thread", "batching": {"max_size": 4}}')
    await service.infer(request, call(clock_ns()))
    await service.unload("m")
    while "m" in service.fleet.models and service.fleet.models["m"].states:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("execution", ["inline", "thread"])
def test_loading_and_unloading_holds_on_to_nothing(tmp_path: Path, execution: str) -> None:
    put(tmp_path / "models", "m", {1: image_engine()}, {"execution": execution})
    options = ServeOptions(
        str(tmp_path / "models"),
        tmp_path / "cache",
        listen=Listen(http_port=0, grpc_port=0),
        fleet=FleetOptions("explicit"),
        logs=LogOptions(level="error"),
    )

    async def work() -> tuple[Held, Held]:
        async with running(options) as server:
            await server.loaded
            for seed in range(WARM_UP):
                await cycle(server, seed)
            before = Held.now()
            for seed in range(CYCLES):
                await cycle(server, seed)
            return before, Held.now()

    before, after = uvloop.run(work())
    assert after.threads <= before.threads + FEW
    assert after.files <= before.files + FEW
    assert after.mappings <= before.mappings * 1.02
    assert after.rss_bytes <= before.rss_bytes * 1.02, (before, after)

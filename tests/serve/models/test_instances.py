"""Who computes: on which cores, in which thread."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from typing import Any

import numpy as np
import pytest

from tests.serve.engines import image, image_engine
from tests.serve.libraries import Shelf, call, run
from twofour.runtime.session import Session
from twofour.serve.models import instances
from twofour.serve.models import version as versions
from twofour.serve.protocol.messages import InferRequest
from twofour.serve.service import Service

ENGINE = image_engine()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, frozenset[int]]]:
    """Thread and cores of each run of a session."""
    found: list[tuple[int, frozenset[int]]] = []

    class Watched(Session):
        def run(self, inputs: Any) -> Any:
            found.append((threading.get_ident(), frozenset(os.sched_getaffinity(0))))
            return super().run(inputs)

    monkeypatch.setattr(instances, "Session", Watched)
    return found


async def ask(service: Service, times: int) -> None:
    requests = [InferRequest("m", "", "", image(1, i)) for i in range(times)]
    answers = await asyncio.gather(*(service.infer(each, call()) for each in requests))
    with Session(ENGINE) as session:
        for request, answer in zip(requests, answers, strict=True):
            expected = session.run(request.inputs)["y"]
            np.testing.assert_array_equal(answer.outputs["y"], expected)


def test_instances_stay_on_their_cores(seen: list[tuple[int, frozenset[int]]]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    each = [{"cores": [core]} for core in cores[:2]]
    shelf = Shelf().put("m", {1: ENGINE}, instances=each, batching={"max_size": 1})
    run(shelf, lambda service: ask(service, 40))
    where = dict(seen)
    assert {frozenset([core]) for core in cores[:2]} == set(where.values())
    assert len(where) == len(cores[:2]), "a thread each"
    assert set(os.sched_getaffinity(0)) == set(cores), "who reads requests stays free"


def test_cores_that_there_are_not(seen: list[tuple[int, frozenset[int]]]) -> None:
    shelf = Shelf().put("m", {1: ENGINE}, instances=[{"cores": [0, 4095]}])

    async def work(service: Service) -> None:
        (entry,) = service.index()
        assert entry.state == "UNAVAILABLE"
        assert "cannot run on core 4095" in entry.reason

    run(shelf, work)


@pytest.mark.parametrize(
    ("execution", "short_us", "inside"),
    [("inline", 0.0, True), ("thread", 1e9, False), ("auto", 1e9, True), ("auto", 0.0, False)],
)
def test_which_thread_computes(
    execution: str,
    short_us: float,
    inside: bool,
    seen: list[tuple[int, frozenset[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "SHORT_US", short_us)
    shelf = Shelf().put("m", {1: ENGINE}, execution=execution)

    async def work(service: Service) -> None:
        seen.clear()  # warm-up
        for _ in range(3):
            await ask(service, 5)

    run(shelf, work)
    assert {thread == threading.get_ident() for thread, _ in seen} == {inside}


def test_short_batches_here_and_long_ones_there(
    seen: list[tuple[int, frozenset[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed at random: each request is answered once, by either thread, never by both at a time."""
    monkeypatch.setattr(versions.Version, "_is_short", lambda self, rows: rows <= 2)
    shelf = Shelf().put("m", {1: ENGINE}, batching={"max_delay_us": 300, "preferred_sizes": [4]})
    draw = random.Random(0)

    async def client(service: Service) -> None:
        for _ in range(40):
            await ask(service, draw.randrange(1, 5))
            await asyncio.sleep(draw.random() * 0.002)

    async def work(service: Service) -> Any:
        seen.clear()
        await asyncio.gather(*(client(service) for _ in range(4)))
        return service.statistics("m")[0]

    found = run(shelf, work)
    assert {thread == threading.get_ident() for thread, _ in seen} == {True, False}
    assert found["execution_count"] == len(seen)
    assert found["inference_stats"]["success"]["count"] == found["inference_count"]

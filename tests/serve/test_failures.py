"""What fails in a running server: a batch, a version, a full memory; the rest goes on."""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from tritonclient.grpc.aio import InferenceServerClient, InferInput

from tests.serve.engines import image, image_engine, text, text_engine
from tests.serve.libraries import Shelf, call, serving
from tests.serve.server_process import put
from tests.serve.test_service import direct, request, run
from twofour.core.errors import InputError
from twofour.engine import Engine
from twofour.runtime.session import Session
from twofour.serve import app
from twofour.serve.errors import BusyError, FailedError, MalformedError, TimedOutError
from twofour.serve.log_lines import of_request
from twofour.serve.models import instances
from twofour.serve.models.instances import clock_ns
from twofour.serve.protocol.messages import Wanted
from twofour.serve.readings import Finished
from twofour.serve.repository.store import Store
from twofour.serve.service import Service

Array = np.ndarray[Any, Any]
EXECUTIONS = ["inline", "thread"]


class Steered(Session):
    """A session that does what `before` says before each run, once `armed`.

    Attributes:
        before: called with the inputs.
        armed: not during warm-up.
    """

    before: Callable[[Mapping[str, Array]], None] = staticmethod(lambda feeds: None)
    armed = False

    def run(self, feeds: Mapping[str, Array]) -> Any:
        if Steered.armed:
            Steered.before(feeds)
        return super().run(feeds)


@pytest.fixture
def steered(monkeypatch: pytest.MonkeyPatch) -> type[Steered]:
    monkeypatch.setattr(instances, "Session", Steered)
    monkeypatch.setattr(Steered, "armed", False)
    monkeypatch.setattr(Steered, "before", staticmethod(lambda feeds: None))
    return Steered


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("error", [RuntimeError("a secret"), MemoryError()])
def test_a_batch_that_fails_takes_nothing_with_it(
    steered: type[Steered], execution: str, error: Exception
) -> None:
    shelf = Shelf().put("m", {1: image_engine()}, execution=execution)
    told: list[Finished] = []

    def fail(feeds: Mapping[str, Array]) -> None:
        raise error

    async def work(service: Service) -> Any:
        service.listeners.append(told.append)
        steered.armed, steered.before = True, staticmethod(fail)
        requests = [service.infer(request(image(1, i)), call()) for i in range(3)]
        failed = await asyncio.gather(*requests, return_exceptions=True)
        steered.armed = False
        return failed, await service.infer(request(image(1, 9)), call())

    failed, answer = run(shelf, work)
    for each in failed:
        assert isinstance(each, FailedError)
        assert "secret" not in str(each)
    np.testing.assert_array_equal(answer.outputs["y"], direct(image_engine(), image(1, 9))["y"])
    for finished in told[:3]:
        assert f"{type(error).__name__}" in of_request(finished, 0).trace, "the log has it"


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_request_that_the_network_refuses_fails_alone(execution: str) -> None:
    """An index beyond the table is seen by the network only, in the middle of a batch."""
    shelf = Shelf().put(
        "m", {1: text_engine()}, execution=execution, batching={"max_delay_us": 20_000}
    )
    inputs = [text(1, 4, i) for i in range(5)]
    inputs[2]["ids"] = np.array([[1, 2, 999, 3]])

    async def work(service: Service) -> Any:
        waiting = [service.infer(request(x), call()) for x in inputs]
        return await asyncio.gather(*waiting, return_exceptions=True)

    for i, answer in enumerate(run(shelf, work)):
        if i == 2:
            assert isinstance(answer, MalformedError), answer
        else:
            expected = direct(text_engine(), inputs[i])
            np.testing.assert_array_equal(answer.outputs["tokens"], expected["tokens"])


def test_a_deadline_passes_though_the_instance_is_busy(steered: type[Steered]) -> None:
    shelf = Shelf().put("m", {1: image_engine()}, execution="thread")
    release = threading.Event()

    async def work(service: Service) -> Any:
        steered.armed, steered.before = True, staticmethod(lambda feeds: release.wait(20))
        long = asyncio.ensure_future(service.infer(request(image()), call()))
        await asyncio.sleep(0.1)
        late = [
            service.infer(request(image(), parameters={"timeout": 50_000}), call()),
            service.infer(request(image()), call_until(clock_ns() + 50_000_000)),
        ]
        began = time.monotonic()
        refused = await asyncio.gather(*late, return_exceptions=True)
        took_s = time.monotonic() - began
        assert not long.done()
        release.set()
        return refused, took_s, await long

    refused, took_s, answer = run(shelf, work)
    assert [type(each) for each in refused] == [TimedOutError] * 2
    assert 0.04 < took_s < 1
    assert answer.outputs["y"].shape == (1, 3)


def call_until(deadline_ns: int) -> Any:
    found = call()
    return type(found)(found.headers, found.arrived_ns, deadline_ns, "grpc")


def test_a_full_queue_refuses_and_as_much_is_computed_as_ever(steered: type[Steered]) -> None:
    """Two hundred clients ask again and again: what is answered does not collapse."""
    shelf = Shelf().put(
        "m", {1: image_engine()}, execution="thread", queue={"length": 16}, batching={"max_size": 4}
    )
    refused: list[BusyError] = []
    batch_s, whole_s = 0.01, 1.0

    async def client(service: Service, end: float) -> int:
        answered = 0
        while time.monotonic() < end:
            try:
                await service.infer(request(image()), call())
                answered += 1
            except BusyError as e:
                refused.append(e)
                await asyncio.sleep(0.02)
        return answered

    async def work(service: Service) -> list[int]:
        steered.armed, steered.before = True, staticmethod(lambda feeds: time.sleep(batch_s))
        answered = []
        for clients in (8, 200):
            refused.clear()
            end = time.monotonic() + whole_s
            asking = [client(service, end) for _ in range(clients)]
            answered.append(sum(await asyncio.gather(*asking)))
        return answered

    few, flood = run(shelf, work)
    assert len(refused) > flood
    assert all(each.retry_after_s >= 1 for each in refused)
    assert flood > 0.2 * few


def test_the_wall_clock_may_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hours, to and fro: no request times out and no batch stalls."""
    shelf = Shelf().put(
        "m",
        {1: image_engine()},
        execution="thread",
        queue={"timeout_ms": 5000},
        batching={"max_delay_us": 5000},
    )
    real, real_ns, step = time.time, time.time_ns, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + step[0])
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(step[0] * 1e9))

    async def work(service: Service) -> list[float]:
        took = []
        for step[0] in (0.0, 7200.0, -7200.0, 1e6, 0.0):
            waiting = [service.infer(request(image(1, i)), call()) for i in range(3)]
            step[0] = -step[0]
            began = time.perf_counter()
            await asyncio.gather(*waiting)
            took.append(time.perf_counter() - began)
        return took

    assert max(run(shelf, work)) < 2


@pytest.mark.parametrize("execution", ["auto", "inline", "thread"])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_version_for_which_there_is_no_room_is_refused_alone(
    monkeypatch: pytest.MonkeyPatch, execution: str, copies: int, error: Exception
) -> None:
    """The others are loaded, and the server is not ended nor held up."""
    if execution == "inline" and copies > 1:
        copies = 1
    big = image_engine(1)
    shelf = Shelf().put("big", {1: big}, execution=execution, instances=[{}] * copies)
    shelf.put("m", {1: image_engine()}, execution=execution)

    def session(engine: Engine, threads: int | None, **more: Any) -> Session:
        if engine is big:
            raise error
        return Session(engine, threads, **more)

    monkeypatch.setattr(instances, "Session", session)

    async def work(service: Service) -> Any:
        states = {each.name: each for each in service.index()}
        assert states["big"].state == "UNAVAILABLE"
        assert type(error).__name__ in states["big"].reason
        assert not service.ready
        monkeypatch.setattr(instances, "Session", Session)
        shelf.engines["big"] = {1: image_engine(2)}
        await service.fleet.refresh()
        assert service.ready
        return await service.infer(request(image()), call())

    before = threading.active_count()
    assert run(shelf, work).outputs["y"].shape == (1, 3)
    assert threading.active_count() <= before


def test_a_client_that_goes_away_does_not_stop_a_load() -> None:
    """Nor leaves the model between two states."""
    shelf = SlowShelf().put("m", {1: image_engine()})

    async def work(service: Service) -> None:
        asking = asyncio.ensure_future(service.load("m"))
        await shelf.begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        shelf.go_on.set()
        while not service.fleet.models["m"].ready:
            await asyncio.sleep(0.01)
        assert [each.state for each in service.index()] == ["READY"]

    run(shelf, work, control="explicit")


def test_the_end_does_not_wait_for_a_load() -> None:
    shelf = SlowShelf().put("m", {1: image_engine()})

    async def whole() -> None:
        service = await serving(shelf, control="explicit")
        asking = asyncio.ensure_future(service.load("m"))
        await shelf.begun.wait()
        await asyncio.wait_for(service.fleet.close(), 2)
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(asyncio.wait_for(whole(), 20))


class SlowShelf(Shelf):
    """Loads when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def load(self, *which: Any) -> Any:
        self.begun.set()
        await self.go_on.wait()
        return await super().load(*which)


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file grows beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_while_files_are_fetched(tmp_path: Path) -> None:
    """The version is refused with the reason, nothing half fetched stays, and later it works."""
    engine = image_engine().save(tmp_path / "m.engine").read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe("/full-disk/m/1/model.engine", engine)
    store = Store("memory://full-disk", tmp_path / "cache")
    version = store.snapshot().models["m"].versions[1]
    with full_disk(len(engine) // 2):
        with pytest.raises(InputError, match="make room"), store.files(version, version.engines):
            pass
    assert [path.name for path in (tmp_path / "cache" / "files").glob("*.partial")] == []
    with store.files(version, version.engines) as folder:
        assert (folder / "model.engine").read_bytes() == engine


def test_a_batch_that_never_ends_does_not_hold_up_the_end(
    steered: type[Steered], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(tmp_path / "models", "m", {1: image_engine()}, {"execution": "thread"})
    monkeypatch.setattr(app, "LAST_S", 0.3)
    release = threading.Event()
    options = app.ServeOptions(
        str(tmp_path / "models"),
        tmp_path / "cache",
        listen=app.Listen(http_port=0, grpc_port=0),
        drain_s=0.1,
    )

    async def whole() -> float:
        async with app.running(options) as server:
            await server.loaded
            steered.armed, steered.before = True, staticmethod(lambda feeds: release.wait(20))
            asking = asyncio.ensure_future(server.service.infer(request(image()), call()))
            await asyncio.sleep(0.1)
            began = time.monotonic()
        asking.cancel()
        return time.monotonic() - began

    took_s = asyncio.run(asyncio.wait_for(whole(), 20))
    release.set()
    assert took_s < 2


def test_labels_may_change_without_loading_again() -> None:
    shelf = Shelf().put("m", {1: image_engine()}, labels={"y": ["a", "b", "c"]})

    async def work(service: Service) -> list[bytes]:
        shelf.configs["m"] = {"labels": {"y": ["d", "e", "f"]}}
        await service.fleet.refresh()
        asked = request(image(), outputs=(Wanted("y", classes=3),))
        answer = await service.infer(asked, call())
        assert len(shelf.opened) == 1
        return sorted(each.rpartition(b":")[2] for each in answer.outputs["y"][0])

    assert run(shelf, work) == [b"d", b"e", b"f"]


def test_http_listens_no_more_while_grpc_still_answers(
    steered: type[Steered], tmp_path: Path
) -> None:
    """Else a server that is being stopped would take requests for as long as gRPC has work."""
    put(tmp_path / "models", "m", {1: image_engine()}, {"execution": "thread"})
    release = threading.Event()
    folder, cache = str(tmp_path / "models"), tmp_path / "cache"
    options = app.ServeOptions(folder, cache, listen=app.Listen(http_port=0, grpc_port=0))
    given = InferInput("x", [1, 4, 6, 6], "FP32")
    given.set_data_from_numpy(image()["x"])

    async def whole() -> Any:
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(app.running(options))
            await server.loaded
            steered.armed, steered.before = True, staticmethod(lambda feeds: release.wait(20))
            async with InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
                asking = asyncio.ensure_future(client.infer("m", [given]))
                await asyncio.sleep(0.3)
                ending = asyncio.ensure_future(stack.pop_all().aclose())
                await asyncio.sleep(0.3)
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection("127.0.0.1", server.http_port)
                release.set()
                answer = await asking
                await ending
                return answer.as_numpy("y")

    y = asyncio.run(asyncio.wait_for(whole(), 30))
    np.testing.assert_array_equal(y, direct(image_engine(), image())["y"])

"""Loading, swapping, splitting and unloading, under requests that must all be answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.serve.engines import image, image_engine
from tests.serve.libraries import Shelf, call, run
from twofour.core.errors import InputError
from twofour.runtime.session import Session
from twofour.serve.errors import BusyError, MalformedError, NotFoundError
from twofour.serve.models.fleet import Loaded
from twofour.serve.models.traffic import choose
from twofour.serve.protocol.messages import InferRequest
from twofour.serve.repository.config import ModelConfig, Traffic
from twofour.serve.repository.errors import PassingError
from twofour.serve.service import Service

OLD, NEW = image_engine(0), image_engine(1)


async def ask(service: Service, seed: int = 0, name: str = "m", **headers: str) -> tuple[str, Any]:
    answer = await service.infer(InferRequest(name, "", "", image(1, seed)), call(0, **headers))
    return answer.version, answer.outputs["y"]


def expected(seed: int = 0) -> dict[str, Any]:
    """Version -> what it answers."""
    found = {}
    for version, engine in (("1", OLD), ("2", NEW)):
        with Session(engine) as session:
            found[version] = session.run(image(1, seed))["y"]
    return found


@pytest.mark.parametrize("execution", ["inline", "thread"])
def test_versions_swap_under_load_and_no_request_fails(execution: str) -> None:
    shelf = Shelf().put("m", {1: OLD}, execution=execution)
    right = expected()

    async def work(service: Service) -> Any:
        seen: list[str] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                version, y = await ask(service)
                np.testing.assert_array_equal(y, right[version])
                seen.append(version)
                await asyncio.sleep(0)

        clients = [asyncio.ensure_future(client()) for _ in range(8)]
        for turn in range(6):
            await asyncio.sleep(0.02)
            shelf.engines["m"] = {1: OLD} if turn % 2 else {1: OLD, 2: NEW}
            await service.fleet.refresh()
            assert seen
            version, _ = await ask(service)
            assert version == ("1" if turn % 2 else "2"), "new requests go to the new one at once"
        stop.set()
        await asyncio.gather(*clients)
        return Counter(seen), service.fleet.models["m"].swaps

    seen, swaps = run(shelf, work)
    assert set(seen) == {"1", "2"}
    assert swaps == 6


def test_a_bad_version_changes_nothing_and_is_not_tried_again() -> None:
    shelf = Shelf().put("m", {1: OLD})

    async def work(service: Service) -> None:
        shelf.engines["m"] = {1: OLD, 2: None}
        await service.fleet.refresh()
        await service.fleet.refresh()
        assert (await ask(service))[0] == "1"
        assert service.ready
        assert shelf.opened == [("m", 1), ("m", 2)], "refused once; nothing of it has changed"
        states = {e.version: e for e in service.index()}
        assert (states["1"].state, states["2"].state) == ("READY", "UNAVAILABLE")
        shelf.engines["m"] = {1: OLD, 2: NEW}
        await service.fleet.refresh()
        assert (await ask(service))[0] == "2"

    run(shelf, work)


def test_what_the_network_refused_is_tried_again_though_nothing_has_changed() -> None:
    class Flaky(Shelf):
        async def load(self, name: str, number: int, config: ModelConfig) -> Loaded:
            if (name, number) not in self.opened:
                self.opened.append((name, number))
                raise PassingError("the store does not answer")
            return await super().load(name, number, config)

    shelf = Flaky().put("m", {1: OLD})

    async def work(service: Service) -> None:
        assert not service.ready
        await service.fleet.refresh()
        assert (await ask(service))[0] == "1"

    run(shelf, work)


def test_files_of_a_version_that_change_replace_it() -> None:
    shelf = Shelf().put("m", {1: OLD})

    async def work(service: Service) -> None:
        shelf.engines["m"] = {1: NEW}
        await service.fleet.refresh()
        np.testing.assert_array_equal((await ask(service))[1], expected()["2"])
        shelf.engines["m"] = {1: None}
        await service.fleet.refresh()
        np.testing.assert_array_equal((await ask(service))[1], expected()["2"])
        (entry,) = service.index()
        assert entry.state == "READY", "something answers"
        assert entry.reason.startswith("what was loaded before goes on; its new files:")

    run(shelf, work)


def test_a_split_is_by_share_and_sticky_by_header() -> None:
    traffic = {"split": {1: 90, 2: 10}, "sticky_header": "X-User"}
    shelf = Shelf().put("m", {1: OLD, 2: NEW}, versions={"all": True}, traffic=traffic)

    async def work(service: Service) -> None:
        seen = Counter([(await ask(service))[0] for _ in range(600)])
        assert 20 < seen["2"] < 120
        for user in range(20):
            answers = {(await ask(service, x_user=str(user)))[0] for _ in range(5)}
            assert len(answers) == 1
        rows = {s["version"]: s["inference_count"] for s in service.statistics("m")}
        assert rows["1"] + rows["2"] == 700

    run(shelf, work)


def test_shares() -> None:
    traffic = Traffic(split={1: 3, 2: 1, 4: 0})
    seen = Counter(choose([1, 2, 3, 4], traffic, str(i)) for i in range(8000))
    assert set(seen) == {1, 2}
    assert seen[1] / seen[2] == pytest.approx(3, rel=0.1)
    assert choose([2, 3], traffic, "a") == 2, "what is not live gives its share to the others"
    assert choose([3, 4], traffic, "a") == 4, "none of the split lives: the highest"
    assert choose([1, 5], Traffic(), "a") == 5


def test_a_shadow_is_compared_and_never_answers() -> None:
    traffic = {"split": {1: 100}, "shadow": 2}
    shelf = Shelf().put("m", {1: OLD, 2: NEW}, versions={"all": True}, traffic=traffic)

    async def work(service: Service) -> Any:
        for seed in range(20):
            assert (await ask(service, seed))[0] == "1"
        await asyncio.sleep(0.05)
        return service.fleet.models["m"].comparison

    found = run(shelf, work)
    assert (found.compared, found.failed, found.tops) == (20, 0, 20)
    cosines = []
    same = 0
    for seed in range(20):
        a, b = expected(seed).values()
        cosines.append(float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())))
        same += int(a.argmax() == b.argmax())
    assert found.same_top == same
    assert found.cosine_sum == pytest.approx(sum(cosines), rel=1e-5)
    assert found.lowest_cosine == pytest.approx(min(cosines), rel=1e-5)


def test_explicit_control() -> None:
    shelf = Shelf().put("m", {1: OLD, 2: NEW}).put("n", {1: None})

    async def work(service: Service) -> None:
        assert service.ready
        with pytest.raises(BusyError, match="not loaded"):
            service.metadata("m")
        with pytest.raises(NotFoundError):
            await ask(service)
        await service.load("m")
        assert (await ask(service))[0] == "2"
        await service.load("m", '{"versions": {"specific": [1]}}')
        assert (await ask(service))[0] == "1", "rolled back"
        with pytest.raises(MalformedError, match="truncated"):
            await service.load("n")
        with pytest.raises(MalformedError, match="wrong"):
            await service.load("m", '{"wrong": 1}')
        with pytest.raises(MalformedError, match="no JSON"):
            await service.load("m", "{")
        with pytest.raises(NotFoundError):
            await service.load("other")
        assert (await ask(service))[0] == "1"
        await service.unload("m")
        with pytest.raises(NotFoundError):
            await ask(service)
        with pytest.raises(NotFoundError):
            await service.unload("m")

    run(shelf, work, control="explicit")


def test_the_first_request_loads() -> None:
    shelf = Shelf().put("m", {1: OLD}, load="first")

    async def work(service: Service) -> None:
        assert service.ready
        assert shelf.opened == []
        answers = await asyncio.gather(*(ask(service) for _ in range(5)))
        assert {version for version, _ in answers} == {"1"}
        assert shelf.opened == [("m", 1)]

    run(shelf, work)


def test_a_broken_model_is_not_loaded_again_by_each_request() -> None:
    shelf = Shelf().put("m", {1: None}, load="first")

    async def work(service: Service) -> None:
        for _ in range(3):
            with pytest.raises(BusyError):
                await ask(service)
        assert shelf.opened == [("m", 1)]
        shelf.engines["m"] = {1: OLD}
        await service.fleet.refresh()
        assert (await ask(service))[0] == "1"

    run(shelf, work)


def test_the_least_recently_used_makes_room_and_comes_back() -> None:
    shelf = Shelf()
    for name in "abc":
        shelf.put(name, {1: OLD}, load="first")
    one = OLD.size_bytes + OLD.plan.arena_bytes

    async def work(service: Service) -> None:
        for name in ("a", "b", "a", "c"):
            await ask(service, name=name)
        loaded = {name for name, model in service.fleet.models.items() if model.ready}
        assert loaded == {"a", "c"}, "b was used least recently"
        assert service.fleet.memory_bytes <= 2 * one
        await service.fleet.refresh()
        assert not service.fleet.models["b"].ready
        await ask(service, name="b")
        assert not service.fleet.models["a"].ready

    run(shelf, work, memory_bytes=2 * one)


def test_what_can_never_fit_is_refused() -> None:
    shelf = Shelf().put("m", {1: OLD})

    async def work(service: Service) -> None:
        assert not service.ready
        assert "does not fit into the memory" in service.index()[0].reason

    run(shelf, work, memory_bytes=10)


def test_loads_that_wait_for_memory_and_for_a_turn_do_not_wait_for_each_other() -> None:
    shelf = Shelf().put("a", {1: OLD}).put("b", {1: OLD})
    one = OLD.size_bytes + OLD.plan.arena_bytes

    async def work(service: Service) -> None:
        first = asyncio.ensure_future(service.load("a"))
        await asyncio.sleep(0)
        others = [service.load("b"), service.load("a", '{"batching": {"max_size": 1}}')]
        await asyncio.wait_for(asyncio.gather(first, *others, return_exceptions=True), 20)
        await service.load("a")
        assert (await ask(service, name="a"))[0] == "1"
        assert service.fleet.memory_bytes <= 1.5 * one

    run(shelf, work, control="explicit", memory_bytes=int(1.5 * one))


def test_a_refused_load_leaves_no_trace_in_the_next_one() -> None:
    shelf = Shelf().put("m", {1: OLD})

    async def work(service: Service) -> None:
        await service.load("m")
        with pytest.raises(MalformedError, match="max_size is 64"):
            await service.load("m", '{"batching": {"max_size": 64}}')
        await service.load("m")
        assert [entry.reason for entry in service.index()] == [""]

    run(shelf, work, control="explicit")


def test_short_timeouts() -> None:
    queue = {"length": 100}
    shelf = Shelf().put("m", {1: OLD}, queue=queue, batching={"max_delay_us": 3_600_000_000})

    async def work(service: Service) -> None:
        requests = [
            InferRequest("m", "", "", image(1), parameters={"timeout": 100}) for _ in range(4)
        ]
        waiting = [service.infer(each, call(0)) for each in requests]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each).__name__ for each in found] == ["TimedOutError"] * 4

    run(shelf, work)


def test_a_shadow_without_a_split_answers_nobody() -> None:
    shelf = Shelf().put("m", {1: OLD, 2: NEW}, versions={"all": True}, traffic={"shadow": 2})

    async def work(service: Service) -> None:
        assert {(await ask(service, seed))[0] for seed in range(5)} == {"1"}
        await asyncio.sleep(0.05)
        assert service.fleet.models["m"].comparison.compared == 5

    run(shelf, work)


def test_polling_sees_what_changes() -> None:
    shelf = Shelf()

    async def work(service: Service) -> None:
        assert service.ready, "an empty repository is no failure"
        shelf.put("m", {1: OLD})
        for _ in range(200):
            if service.index(ready_only=True):
                break
            await asyncio.sleep(0.01)
        assert (await ask(service))[0] == "1"
        del shelf.engines["m"]
        for _ in range(200):
            if not service.index():
                break
            await asyncio.sleep(0.01)
        with pytest.raises(NotFoundError):
            await ask(service)

    run(shelf, work, control="poll", poll_s=0.01)


def test_a_model_that_takes_long_does_not_hold_up_others() -> None:
    shelf = Shelf().put("slow", {1: OLD})

    async def work(service: Service) -> None:
        shelf.gates["slow"] = asyncio.Event()
        shelf.engines["slow"] = {1: OLD, 2: NEW}
        await asyncio.sleep(0.05)
        shelf.put("m", {1: OLD})
        for _ in range(200):
            if service.fleet.models.get("m") and service.model_ready("m"):
                break
            await asyncio.sleep(0.01)
        assert (await ask(service))[0] == "1"
        assert (await ask(service, name="slow"))[0] == "1", "the new version is still being loaded"
        shelf.engines["slow"] = {1: OLD, 2: NEW, 3: OLD}
        await asyncio.sleep(0.05)
        shelf.gates["slow"].set()
        for _ in range(200):
            if (await ask(service, name="slow"))[0] == "3":
                return
            await asyncio.sleep(0.01)
        raise AssertionError("what changed meanwhile was seen")

    run(shelf, work, control="poll", poll_s=0.01)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    queue = {"length": 2, "timeout_ms": 30}
    shelf = Shelf().put("m", {1: OLD}, queue=queue, batching={"max_delay_us": 3_600_000_000})

    async def work(service: Service) -> None:
        waiting = [asyncio.ensure_future(ask(service, i)) for i in range(3)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        kinds = [type(each).__name__ for each in results]
        assert kinds == ["TimedOutError", "TimedOutError", "BusyError"]
        assert isinstance(results[2], BusyError)
        assert results[2].retry_after_s >= 1
        failed = service.statistics("m")[0]["inference_stats"]["fail"]
        assert failed["count"] == 3

    run(shelf, work)


def test_closing_answers_what_came() -> None:
    shelf = Shelf().put("m", {1: OLD}, batching={"max_delay_us": 3_600_000_000})

    async def work(service: Service) -> None:
        waiting = [asyncio.ensure_future(ask(service, i)) for i in range(3)]
        await asyncio.sleep(0.01)
        await service.fleet.close()
        assert {version for version, _ in await asyncio.gather(*waiting)} == {"1"}
        with pytest.raises(BusyError, match="being stopped"):
            await ask(service)
        assert not service.ready

    run(shelf, work)


def test_configurations_that_do_not_fit_the_engine() -> None:
    shelf = Shelf().put("m", {1: OLD}, batching={"max_size": 64})

    async def work(service: Service) -> None:
        assert "the engine takes 8 at once" in service.index()[0].reason

    run(shelf, work)
    with pytest.raises(InputError, match=r"queue\.length"):
        run(Shelf().put("m", {1: OLD}, queue={"length": 0}), work)

"""Requests to a service, each answer compared with the engine called directly."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from tests.serve.engines import image, image_engine, text, text_engine
from tests.serve.libraries import Shelf, call, run
from twofour.runtime.session import Session
from twofour.serve.errors import BusyError, ForbiddenError, MalformedError, NotFoundError
from twofour.serve.models.instances import clock_ns
from twofour.serve.protocol.messages import InferRequest, Wanted
from twofour.serve.service import Service


def request(inputs: Any, model: str = "m", version: str = "", **more: Any) -> InferRequest:
    return InferRequest(model, version, "r1", inputs, **more)


def direct(engine: Any, inputs: Any) -> Any:
    with Session(engine) as session:
        return session.run(inputs)


@pytest.mark.parametrize("execution", ["inline", "thread"])
def test_each_of_many_gets_its_own_answer(execution: str) -> None:
    shelf = Shelf().put("m", {1: image_engine()}, execution=execution)
    inputs = [image(1 + i % 4, i) for i in range(40)]

    async def work(service: Service) -> Any:
        waiting = [service.infer(request(x), call(clock_ns())) for x in inputs]
        answers = await asyncio.gather(*waiting)
        return answers, service.statistics("m")[0]

    answers, statistics = run(shelf, work)
    for x, answer in zip(inputs, answers, strict=True):
        assert (answer.model, answer.version, answer.id) == ("m", "1", "r1")
        np.testing.assert_array_equal(answer.outputs["y"], direct(image_engine(), x)["y"])
    assert statistics["inference_count"] == sum(len(x["x"]) for x in inputs)
    assert statistics["execution_count"] < 40, "requests shared runs"
    assert statistics["inference_stats"]["success"]["count"] == 40


@pytest.mark.parametrize("execution", ["inline", "thread"])
def test_sequences_of_unlike_length_share_a_batch(execution: str) -> None:
    lengths = {"inputs": {"ids": 1, "mask": 1}, "buckets": [4, 8, 16]}
    shelf = Shelf().put("m", {1: text_engine()}, execution=execution, batching={"lengths": lengths})
    inputs = [text(1 + i % 2, 1 + i % 16, i) for i in range(32)]

    async def work(service: Service) -> Any:
        answers = await asyncio.gather(*(service.infer(request(x), call()) for x in inputs))
        return answers, service.statistics("m")[0]["execution_count"]

    answers, runs = run(shelf, work)
    assert runs < 20
    for x, answer in zip(inputs, answers, strict=True):
        expected = direct(text_engine(), x)
        for name in ("tokens", "mean"):
            assert answer.outputs[name].shape == expected[name].shape
            np.testing.assert_allclose(answer.outputs[name], expected[name], rtol=1e-6, atol=1e-6)


def test_a_request_that_the_network_cannot_take_fails_alone() -> None:
    """Of the wrong shape: refused before it is queued; the others of its batch are answered."""
    shelf = Shelf().put("m", {1: image_engine()}, execution="thread")

    async def work(service: Service) -> Any:
        bad = {"x": np.zeros((1, 4, 6, 7), np.float32)}
        waiting = [service.infer(request(x), call()) for x in (image(1, 1), bad, image(1, 2))]
        return await asyncio.gather(*waiting, return_exceptions=True)

    first, second, third = run(shelf, work)
    assert isinstance(second, MalformedError)
    assert "x[3]: expected 6, got 7" in str(second)
    for seed, answer in ((1, first), (2, third)):
        np.testing.assert_array_equal(
            answer.outputs["y"], direct(image_engine(), image(1, seed))["y"]
        )


def test_outputs_and_classes_are_chosen() -> None:
    shelf = Shelf().put("m", {1: image_engine()}, labels={"y": ["cat", "dog", "eel"]})

    async def work(service: Service) -> Any:
        classes = await service.infer(request(image(2), outputs=(Wanted("y", classes=2),)), call())
        with pytest.raises(MalformedError, match="has no output 'z'"):
            await service.infer(request(image(2), outputs=(Wanted("z"),)), call())
        return classes.outputs["y"]

    found = run(shelf, work)
    y = direct(image_engine(), image(2))["y"]
    assert found.shape == (2, 2)
    for row in range(2):
        value, place, label = found[row, 0].decode().split(":")
        assert int(place) == y[row].argmax()
        assert float(value) == pytest.approx(y[row].max(), abs=1e-5)
        assert label == ["cat", "dog", "eel"][int(place)]


def test_what_is_not_there() -> None:
    shelf = Shelf().put("m", {1: image_engine()}).put("broken", {1: None})

    async def work(service: Service) -> None:
        assert not service.ready, "one of its models cannot be loaded"
        assert service.model_ready("m")
        assert not service.model_ready("broken")
        for name, version in (("nothing", ""), ("m", "2"), ("m", "x"), ("m", "-1"), ("m", "²")):
            with pytest.raises(NotFoundError):
                await service.infer(request(image(), name, version), call())
        with pytest.raises(BusyError):
            await service.infer(request(image(), "broken"), call())
        states = {(e.name, e.version): e for e in service.index()}
        assert states["m", "1"].state == "READY"
        assert states["broken", "1"].state == "UNAVAILABLE"
        assert "truncated" in states["broken", "1"].reason
        assert [e.name for e in service.index(ready_only=True)] == ["m"]
        with pytest.raises(ForbiddenError, match="--control"):
            await service.load("m")

    run(shelf, work)


def test_descriptions() -> None:
    shelf = Shelf().put(
        "m", {3: image_engine()}, batching={"preferred_sizes": [4], "max_delay_us": 7}
    )

    async def work(service: Service) -> None:
        found = service.metadata("m")
        assert (found.versions, found.platform) == (("3",), "twofour")
        assert (found.inputs[0].datatype, found.inputs[0].shape) == ("FP32", (-1, 4, 6, 6))
        assert found.outputs[0].shape == (-1, 3)
        config = service.config("m")
        assert config["max_batch_size"] == 8
        assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [4, 6, 6]}]
        assert config["dynamic_batching"]["preferred_batch_size"] == [4]
        assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 7

    run(shelf, work)


def test_a_cancelled_request_is_not_computed() -> None:
    shelf = Shelf().put("m", {1: image_engine()}, batching={"max_delay_us": 200_000, "max_size": 8})

    async def work(service: Service) -> Any:
        tasks = [asyncio.ensure_future(service.infer(request(image(1, i)), call())) for i in (1, 2)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        answer = await tasks[1]
        return answer, service.statistics("m")[0]["inference_count"]

    answer, rows = run(shelf, work)
    assert rows == 1
    np.testing.assert_array_equal(answer.outputs["y"], direct(image_engine(), image(1, 2))["y"])

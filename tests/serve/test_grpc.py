"""The gRPC server with the clients that users have: tritonclient, and gRPC's health stub."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient import grpc as triton
from tritonclient.grpc import aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.serve.engines import image, image_engine, text, text_engine
from tests.serve.grpc_sample import Running, grpc_server
from tests.serve.libraries import Shelf, serving
from tests.serve.test_protobuf import message, mutated
from twofour.core.errors import InputError
from twofour.runtime.session import Session
from twofour.serve.auth import Auth, TokenFile
from twofour.serve.errors import BusyError, MalformedError
from twofour.serve.grpc.server import GrpcOptions
from twofour.serve.limits import Limits
from twofour.serve.models.instances import clock_ns
from twofour.serve.protocol.messages import InferRequest, InferResponse
from twofour.serve.service import Call
from twofour.serve.tls import TlsFiles, load_tls


def shelf() -> Shelf:
    lengths = {"inputs": {"ids": 1, "mask": 1}, "buckets": [4, 8, 16]}
    kept = Shelf().put("m", {1: image_engine()}, labels={"y": ["cat", "dog", "eel"]})
    return kept.put("text", {1: text_engine()}, batching={"lengths": lengths})


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with grpc_server(lambda: serving(shelf(), control="explicit", first=("m", "text"))) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url) as connected:
        yield connected


def given(inputs: dict[str, Any]) -> list[Any]:
    """Inputs as the client takes them."""
    kinds = {"float32": "FP32", "int64": "INT64"}
    made = [triton.InferInput(n, x.shape, kinds[x.dtype.name]) for n, x in inputs.items()]
    return [each.set_data_from_numpy(x) for each, x in zip(made, inputs.values(), strict=True)]


def into(answers: queue.Queue[Any]) -> Any:
    """A callback that keeps what a client is told."""
    return lambda result, error: answers.put((result, error))


def direct(engine: Any, inputs: Any) -> Any:
    with Session(engine) as session:
        return session.run(inputs)


def test_states_and_descriptions(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert not client.is_model_ready("m", "7")
    assert not client.is_model_ready("none")
    about = client.get_server_metadata()
    assert about.name == "twofour"
    assert "statistics" in about.extensions
    metadata = client.get_model_metadata("m")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("x", "FP32", [-1, 4, 6, 6])
    ]
    config = client.get_model_config("m").config
    assert (config.name, config.max_batch_size) == ("m", 8)
    assert list(config.input[0].dims) == [4, 6, 6]
    assert config.HasField("dynamic_batching")
    with pytest.raises(InferenceServerException, match="there is no model 'none'") as refused:
        client.get_model_metadata("none")
    assert refused.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_answers_are_the_engines(client: Any, compression: str | None) -> None:
    for rows in (1, 3):
        x = image(rows, rows)
        result = client.infer(
            "m", given(x), request_id="é7", compression_algorithm=compression, client_timeout=10
        )
        assert result.get_response().id == "é7"
        assert result.get_response().model_version == "1"
        np.testing.assert_array_equal(result.as_numpy("y"), direct(image_engine(), x)["y"])


def test_sequences_that_were_padded_come_back_cut(client: Any) -> None:
    waiting: queue.Queue[Any] = queue.Queue()
    inputs = {str(i): text(1, 1 + i % 16, i) for i in range(20)}
    for name, x in inputs.items():
        client.async_infer(
            "text", given(x), lambda result, error: waiting.put((result, error)), request_id=name
        )
    for _ in inputs:
        result, error = waiting.get(timeout=20)
        assert error is None
        expected = direct(text_engine(), inputs[result.get_response().id])
        for output in ("tokens", "mean"):
            found = result.as_numpy(output)
            np.testing.assert_allclose(found, expected[output], rtol=1e-6, atol=1e-6)


def test_classes(client: Any) -> None:
    wanted = [triton.InferRequestedOutput("y", class_count=2)]
    found = client.infer("m", given(image(2)), outputs=wanted).as_numpy("y")
    y = direct(image_engine(), image(2))["y"]
    assert found.shape == (2, 2)
    for row in range(2):
        value, place, label = found[row, 0].decode().split(":")
        assert (int(place), label) == (y[row].argmax(), ["cat", "dog", "eel"][y[row].argmax()])
        assert float(value) == pytest.approx(y[row].max(), abs=1e-5)


def test_refusals_say_what_is_wrong(client: Any) -> None:
    bad = {"x": np.zeros((1, 4, 6, 7), np.float32)}
    for call, status, said in (
        (lambda: client.infer("m", given(bad)), "INVALID_ARGUMENT", "expected 6, got 7"),
        (lambda: client.infer("no", given(image())), "NOT_FOUND", "there is no model 'no'"),
        (lambda: client.infer("no" * 50_000, given(image())), "RESOURCE_EXHAUSTED", "too long"),
        (lambda: client.infer("m", given(image()), priority=-1), "INVALID_ARGUMENT", "priority"),
    ):
        try:
            with pytest.raises(InferenceServerException, match=said) as refused:
                call()
        except ValueError:  # the client itself takes no such number
            continue
        assert refused.value.status() == f"StatusCode.{status}"
    client.infer("m", given(image()))


def test_statistics_and_repository(client: Any) -> None:
    client.infer("m", given(image(3)))
    (found,) = client.get_inference_statistics("m").model_stats
    assert found.inference_stats.success.count >= 1
    assert found.inference_count >= 3
    states = {(each.name, each.state) for each in client.get_model_repository_index().models}
    assert states == {("m", "READY"), ("text", "READY")}


def test_models_are_unloaded_and_loaded() -> None:
    with (
        grpc_server(lambda: serving(shelf(), control="explicit", first=("m", "text"))) as server,
        triton.InferenceServerClient(server.url) as client,
    ):
        client.unload_model("m")
        assert not client.is_model_ready("m")
        client.load_model("m", config='{"labels": {"y": ["a", "b", "c"]}}')
        wanted = [triton.InferRequestedOutput("y", class_count=1)]
        found = client.infer("m", given(image()), outputs=wanted).as_numpy("y")
        assert found[0, 0].decode()[-1] in "abc"
        with pytest.raises(InferenceServerException, match="no JSON"):
            client.load_model("m", config="{")
        with pytest.raises(InferenceServerException, match="no such parameter") as refused:
            client.load_model("m", config="{}", files={"file:1/m.onnx": b"x"})
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


def test_control_may_be_off() -> None:
    with (
        grpc_server(lambda: serving(shelf())) as server,
        triton.InferenceServerClient(server.url) as client,
        pytest.raises(InferenceServerException) as refused,
    ):
        client.unload_model("m")
    assert refused.value.status() == "StatusCode.PERMISSION_DENIED"


def test_what_the_server_does_not_have(client: Any) -> None:
    assert not client.get_system_shared_memory_status().regions
    assert not client.get_cuda_shared_memory_status().regions
    assert not client.get_trace_settings().settings
    assert not client.get_log_settings().settings
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    region = triton.InferInput("x", [1, 4, 6, 6], "FP32")
    region.set_shared_memory("r", 576)
    for call, status in (
        (lambda: client.register_system_shared_memory("r", "/r", 576), "UNIMPLEMENTED"),
        (lambda: client.register_cuda_shared_memory("r", b"", 0, 576), "UNIMPLEMENTED"),
        (lambda: client.update_log_settings({"log_verbose_level": 1}), "UNIMPLEMENTED"),
        (lambda: client.update_trace_settings(settings={"trace_rate": "1"}), "UNIMPLEMENTED"),
        (lambda: client.get_system_shared_memory_status("r"), "NOT_FOUND"),
        (lambda: client.infer("m", [region]), "INVALID_ARGUMENT"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert refused.value.status() == f"StatusCode.{status}"


def test_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a" * 32)
    (tmp_path / "control").write_text("b" * 32)
    auth = Auth(TokenFile(tmp_path / "tokens"), TokenFile(tmp_path / "control"), True)
    user, owner = ({"authorization": f"Bearer {letter * 32}"} for letter in "ab")
    with (
        grpc_server(lambda: serving(shelf(), control="explicit", first=("m",)), auth) as server,
        triton.InferenceServerClient(server.url) as client,
    ):
        assert client.is_server_ready()
        client.infer("m", given(image()), headers=user)
        client.unload_model("m", headers=owner)
        for call, status in (
            (lambda: client.infer("m", given(image())), "UNAUTHENTICATED"),
            (lambda: client.get_model_repository_index(), "UNAUTHENTICATED"),
            (lambda: client.load_model("m", headers=user), "PERMISSION_DENIED"),
        ):
            with pytest.raises(InferenceServerException) as refused:
                call()
            assert refused.value.status() == f"StatusCode.{status}"
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(into(answers))
        assert answers.get(timeout=10)[1].status() == "StatusCode.UNAUTHENTICATED"
        client.stop_stream()


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(tmp_path: Path, mutual: bool) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*words.split(), *more], check=True, capture_output=True)
    tls = load_tls(TlsFiles(cert, key, cert if mutual else None))
    with grpc_server(lambda: serving(shelf()), options=GrpcOptions(port=0, tls=tls)) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        own = {"private_key": str(key), "certificate_chain": str(cert)} if mutual else {}
        with triton.InferenceServerClient(url, ssl=True, root_certificates=str(cert)) as client:
            if mutual:
                with pytest.raises(InferenceServerException):
                    client.infer("m", given(image()))
        with triton.InferenceServerClient(url, ssl=True, root_certificates=str(cert), **own) as ok:
            x = image()
            y = ok.infer("m", given(x)).as_numpy("y")
            np.testing.assert_array_equal(y, direct(image_engine(), x)["y"])


def test_a_taken_port_is_an_error(server: Running) -> None:
    port = int(server.url.rpartition(":")[2])
    with (
        pytest.raises(InputError, match=f"cannot listen for gRPC at 127.0.0.1:{port}"),
        grpc_server(slow, options=GrpcOptions(port=port)),
    ):
        pass


def test_the_asyncio_client(server: Running) -> None:
    async def work() -> None:
        async with triton_aio.InferenceServerClient(server.url) as client:
            assert await client.is_server_ready()
            inputs = [image(1 + i % 3, i) for i in range(16)]
            results = await asyncio.gather(*(client.infer("m", given(x)) for x in inputs))
            for x, result in zip(inputs, results, strict=True):
                np.testing.assert_array_equal(result.as_numpy("y"), direct(image_engine(), x)["y"])

            async def requests() -> Any:
                for i, x in enumerate(inputs):
                    yield {"model_name": "m", "inputs": given(x), "request_id": str(i)}

            seen = [pair async for pair in client.stream_infer(requests())]
            assert [r.get_response().id for r, _ in seen] == [str(i) for i in range(16)]
            for x, (result, error) in zip(inputs, seen, strict=True):
                assert error is None
                np.testing.assert_array_equal(result.as_numpy("y"), direct(image_engine(), x)["y"])

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_stream_answers_in_order_and_outlives_a_refusal(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(into(answers))
    inputs = [image(1 + i % 8, i) for i in range(100)]
    inputs[7] = {"x": np.zeros((1, 4, 6, 7), np.float32)}
    for i, x in enumerate(inputs):
        client.async_stream_infer(
            "m", given(x), request_id=str(i), enable_empty_final_response=True
        )
    for i, x in enumerate(inputs):
        result, error = answers.get(timeout=20)
        if i == 7:
            assert "expected 6, got 7" in str(error)
            continue
        response = result.get_response()
        assert response.id == str(i)
        assert response.parameters["triton_final_response"].bool_param
        np.testing.assert_array_equal(result.as_numpy("y"), direct(image_engine(), x)["y"])
    client.stop_stream()
    assert answers.empty()


def test_a_stream_of_a_strict_client_ends_with_the_status(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(into(answers), headers={"triton_grpc_error": "true"})
    client.async_stream_infer("m", given(image()))
    client.async_stream_infer("none", given(image()))
    result, _ = answers.get(timeout=20)
    assert result is not None
    _, error = answers.get(timeout=20)
    assert error.status() == "StatusCode.NOT_FOUND"
    client.stop_stream()


class Slow:
    """A service whose requests take until they are let go."""

    name, version, extensions = "slow", "1", ()
    live = ready = True

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.calls: list[Call] = []
        self.cancelled = 0
        self.here = threading.Semaphore(0)

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        self.calls.append(call)
        self.here.release()
        if request.model == "bug":
            raise KeyError("secret")
        if request.model == "busy":
            raise BusyError("the queue is full", retry_after_s=2.5)
        if request.model == "wordy":
            raise MalformedError("é" * 100_000)
        try:
            if request.model != "fast":
                await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return InferResponse("m", "1", request.id, {"y": np.ones(1, np.float32)})


async def slow() -> Slow:
    return Slow()


@pytest.fixture
def waiting() -> Iterator[Running]:
    with grpc_server(slow) as running:
        yield running


def cancelled(service: Any, count: int) -> None:
    """Waits until so many requests are."""
    end = time.monotonic() + 10
    while service.cancelled < count and time.monotonic() < end:
        time.sleep(0.01)
    assert service.cancelled == count


def test_deadlines_reach_the_service_and_cancel(waiting: Running) -> None:
    with triton.InferenceServerClient(waiting.url) as client:
        begin = clock_ns()
        with pytest.raises(InferenceServerException) as refused:
            client.infer("m", given(image()), client_timeout=0.5, headers={"x-who": "me"})
        assert refused.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    service: Any = waiting.service
    (call,) = service.calls
    assert 0.2e9 < call.deadline_ns - begin < 0.8e9
    assert begin < call.arrived_ns < call.deadline_ns
    assert call.headers["x-who"] == "me"
    assert call.protocol == "grpc"
    cancelled(service, 1)


def test_a_client_that_cancels_cancels_its_requests(waiting: Running) -> None:
    service: Any = waiting.service
    with triton.InferenceServerClient(waiting.url) as client:
        one = client.async_infer("m", given(image()), lambda result, error: None)
        assert service.here.acquire(timeout=10)
        one.cancel()
        cancelled(service, 1)
        assert service.calls[0].deadline_ns is None
        client.start_stream(lambda result, error: None)
        for _ in range(3):
            client.async_stream_infer("m", given(image()))
        for _ in range(3):
            assert service.here.acquire(timeout=10)
        client.stop_stream(cancel_requests=True)
        cancelled(service, 4)


def test_a_client_that_is_gone_cancels_its_requests(waiting: Running) -> None:
    service: Any = waiting.service
    client = triton.InferenceServerClient(waiting.url)
    client.async_infer("m", given(image()), lambda result, error: None)
    assert service.here.acquire(timeout=10)
    client.close()
    cancelled(service, 1)


def test_no_internals_in_refusals(waiting: Running, caplog: pytest.LogCaptureFixture) -> None:
    with triton.InferenceServerClient(waiting.url) as client:
        with pytest.raises(InferenceServerException) as refused:
            client.infer("bug", given(image()))
        assert refused.value.status() == "StatusCode.INTERNAL"
        name = refused.value.message().split("request ")[1].split()[0]
        assert "secret" not in refused.value.message()
        assert "secret" in caplog.text
        assert name in caplog.text
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(into(answers))
        client.async_stream_infer("bug", given(image()))
        assert "the server failed on request" in str(answers.get(timeout=10)[1])
        client.stop_stream()


def test_long_refusals_are_cut(waiting: Running) -> None:
    with triton.InferenceServerClient(waiting.url) as client:
        with pytest.raises(InferenceServerException) as refused:
            client.infer("wordy", given(image()))
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert 900 < len(refused.value.message()) < 1100


def stub(url: str) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(url))


def test_a_busy_server_says_when_to_try_again(waiting: Running) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub(waiting.url).ModelInfer(service_pb2.ModelInferRequest(model_name="busy"))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "2500"


def test_bytes_that_are_no_message_are_refused(server: Running) -> None:
    with grpc.insecure_channel(server.url) as channel:
        for name in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name:
            if name == "ModelStreamInfer":
                continue
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"\xff\xff")
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, name
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"")
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_damaged_messages_are_the_clients_fault(server: Running) -> None:
    body = message(image(), id="1").SerializeToString()
    seen = set()
    with grpc.insecure_channel(server.url) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for seed in range(400):
            try:
                infer(mutated(body, seed))
                seen.add("OK")
            except grpc.RpcError as e:
                seen.add(e.code().name)
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        replies = list(stream(mutated(body, seed) for seed in range(400)))
    assert {"OK", "INVALID_ARGUMENT"} <= seen
    assert seen <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
    assert len(replies) == 400
    assert not any(b"the server failed" in reply for reply in replies)


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_messages_beyond_the_limit_are_refused_inflated_too(compression: Any) -> None:
    options = GrpcOptions(port=0, limits=Limits(body_bytes=100_000), compression="gzip")
    with grpc_server(slow, options=options) as server:
        request = service_pb2.ModelInferRequest(raw_input_contents=[bytes(1_000_000)])
        with pytest.raises(grpc.RpcError) as refused:
            stub(server.url).ModelInfer(request, compression=compression)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_stopping_answers_what_was_taken(waiting: Running) -> None:
    service: Any = waiting.service
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(waiting.url) as client:
        client.async_infer("m", given(image()), into(answers))
        client.start_stream(into(answers))
        client.async_stream_infer("m", given(image()))
        for _ in range(2):
            assert service.here.acquire(timeout=10)
        stopping = threading.Thread(target=waiting.stop, args=(10,))
        stopping.start()
        time.sleep(0.2)
        assert answers.empty()
        begin = time.monotonic()
        waiting.do(_let_go(service))
        stopping.join(10)
        assert time.monotonic() - begin < 5, "an open stream does not hold the server"
        seen = [answers.get(timeout=10) for _ in range(3)]
        assert [result is not None for result, _ in seen].count(True) == 2
        (error,) = [error for result, error in seen if result is None]
        assert error.status() == "StatusCode.UNAVAILABLE"
        client.stop_stream()


async def _let_go(service: Slow) -> None:
    service.let_go.set()


def test_a_later_answer_that_is_ready_first_waits_for_its_turn(waiting: Running) -> None:
    service: Any = waiting.service
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(waiting.url) as client:
        client.start_stream(into(answers))
        for name in ("m", "fast"):
            client.async_stream_infer(name, given(image()), request_id=name)
        for _ in range(2):
            assert service.here.acquire(timeout=10)
        time.sleep(0.2)
        assert answers.empty()
        waiting.do(_let_go(service))
        ids = [answers.get(timeout=10)[0].get_response().id for _ in range(2)]
        client.stop_stream()
    assert ids == ["m", "fast"]


def test_health_for_probes(waiting: Running) -> None:
    service: Any = waiting.service
    statuses = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(waiting.url) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        check = lambda name: health.Check(health_pb2.HealthCheckRequest(service=name)).status  # noqa: E731
        assert check("") == check("inference.GRPCInferenceService") == statuses.SERVING
        watched = health.Watch(health_pb2.HealthCheckRequest())
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="none"))
        assert next(watched).status == statuses.SERVING
        assert next(unknown).status == statuses.SERVICE_UNKNOWN
        unknown.cancel()
        service.ready = False
        assert next(watched).status == statuses.NOT_SERVING
        assert (check("ready"), check("live")) == (statuses.NOT_SERVING, statuses.SERVING)
        with pytest.raises(grpc.RpcError) as refused:
            check("none")
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        service.ready = True
        assert next(watched).status == statuses.SERVING
        waiting.stop(5)
        assert [each.status for each in watched] == [statuses.NOT_SERVING]

"""The real clients of Triton, unmodified, against the HTTP server."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as client_library
import tritonclient.http.aio as aio_library
from openapi_spec_validator import OpenAPIV31SpecValidator
from tritonclient.utils import InferenceServerException

from tests.serve.http_sample import Doubling, Running, infer_bytes, read_reply, serving
from twofour.serve.auth import Auth, TokenFile
from twofour.serve.http.openapi import OPERATIONS, document
from twofour.serve.http.routes import ROUTES
from twofour.serve.limits import Limits

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(Doubling()) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[client_library.InferenceServerClient]:
    with client_library.InferenceServerClient(running.url, concurrency=4) as client:
        yield client


def tensor(library: Any, binary: bool = True, x: np.ndarray = X) -> Any:
    found = library.InferInput("x", list(x.shape), "FP32")
    found.set_data_from_numpy(x, binary_data=binary)
    return found


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_inference(
    client: client_library.InferenceServerClient, binary_in: bool, binary_out: bool | None
) -> None:
    outputs = None
    if binary_out is not None:
        outputs = [client_library.InferRequestedOutput("y", binary_data=binary_out)]
    result = client.infer(
        "double", [tensor(client_library, binary_in)], "2", outputs, request_id="mine"
    )
    np.testing.assert_array_equal(result.as_numpy("y"), 2 * X)
    response = result.get_response()
    assert (response["model_name"], response["model_version"]) == ("double", "2")
    assert response["id"] == "mine"


@pytest.mark.parametrize("request_packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_packed", [None, "gzip", "deflate"])
def test_compressed(
    client: client_library.InferenceServerClient,
    request_packed: str | None,
    response_packed: str | None,
) -> None:
    x = np.zeros((100, 3), np.float32)
    result = client.infer(
        "double",
        [tensor(client_library, x=x)],
        request_compression_algorithm=request_packed,
        response_compression_algorithm=response_packed,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), x)


@pytest.mark.parametrize("binary", [True, False])
def test_classes(client: client_library.InferenceServerClient, binary: bool) -> None:
    output = client_library.InferRequestedOutput("y", binary_data=binary, class_count=2)
    result = client.infer("double", [tensor(client_library)], outputs=[output])
    texts = result.as_numpy("y").astype(str)
    assert texts.tolist() == [["4.000000:2", "2.000000:1"], ["10.000000:2", "8.000000:1"]]


def test_asynchronous(client: client_library.InferenceServerClient) -> None:
    pending = [client.async_infer("double", [tensor(client_library, x=X + n)]) for n in range(20)]
    for n, request in enumerate(pending):
        np.testing.assert_array_equal(request.get_result().as_numpy("y"), 2 * (X + n))


def test_descriptions(client: client_library.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("double")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert metadata["versions"] == ["1", "2"]
    assert client.get_model_config("double", "2")["max_batch_size"] == 8
    assert client.get_inference_statistics()["model_stats"][0]["version"] == "2"
    assert client.get_inference_statistics("double", "1")["model_stats"][0]["version"] == "1"


def test_control() -> None:
    service = Doubling()
    with serving(service) as running, client_library.InferenceServerClient(running.url) as client:
        index = client.get_model_repository_index()
        assert [entry["state"] for entry in index] == ["READY", "UNAVAILABLE"]
        client.load_model("double")
        client.load_model("a b", config='{"max_batch_size": 4}')
        assert service.loaded == [("double", ""), ("a b", '{"max_batch_size": 4}')]
        client.unload_model("double")
        with pytest.raises(InferenceServerException, match="this model stays"):
            client.unload_model("kept")
        with pytest.raises(InferenceServerException, match="not taken from requests"):
            client.load_model("double", config="{}", files={"file:1/m.engine": b"a"})


def test_what_there_is_not(client: client_library.InferenceServerClient) -> None:
    for call in (
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.unregister_system_shared_memory,
        client.get_trace_settings,
        client.get_log_settings,
        lambda: client.update_trace_settings("double", {}),
        lambda: client.register_system_shared_memory("r", "/r", 4),
    ):
        with pytest.raises(InferenceServerException, match="has no extension for") as caught:
            call()
        assert caught.value.status() == "501"


def test_refusals_reach_the_client(client: client_library.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="there is no model 'other'") as caught:
        client.infer("other", [tensor(client_library)])
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="queue is full") as caught:
        client.infer("double", [tensor(client_library)], parameters={"raise": "busy"})
    assert caught.value.status() == "503"


def test_nothing_internal_comes_out(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Doubling()) as running, running.connect() as raw:
        raw.sendall(infer_bytes(X, b"X-Request-ID: abc\r\n", {"raise": "bug"}))
        status, headers, body = read_reply(raw)
    assert status == 500
    assert b"secret" not in body
    assert b"RuntimeError" not in body
    assert b"abc" in body
    assert headers["x-request-id"] == "abc"
    assert "a secret of the server's" in caplog.text
    assert "abc" in caplog.text


def test_tokens(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("user-token-user-token\n")
    (tmp_path / "c").write_text("ctrl-token-ctrl-token\n")
    auth = Auth(TokenFile(tmp_path / "t"), TokenFile(tmp_path / "c"), False)
    with serving(Doubling(), auth) as running:
        with client_library.InferenceServerClient(running.url) as client:
            user = {"Authorization": "Bearer user-token-user-token"}
            control = {"Authorization": "Bearer ctrl-token-ctrl-token"}
            assert client.is_server_live()
            with pytest.raises(InferenceServerException, match="needs a token") as caught:
                client.infer("double", [tensor(client_library)])
            assert caught.value.status() == "401"
            client.infer("double", [tensor(client_library)], headers=user)
            with pytest.raises(InferenceServerException, match="not good for control"):
                client.load_model("double", headers=user)
            client.load_model("double", headers=control)
        reply = running.ask(b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"401 Unauthorized" in reply
        assert b"www-authenticate: Bearer" in reply


def test_the_aio_client(running: Running) -> None:
    async def use() -> None:
        async with aio_library.InferenceServerClient(running.url) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("double")
            assert (await client.get_model_metadata("double"))["platform"] == "twofour"
            results = await asyncio.gather(
                *(client.infer("double", [tensor(aio_library, x=X + n)]) for n in range(50))
            )
            for n, result in enumerate(results):
                np.testing.assert_array_equal(result.as_numpy("y"), 2 * (X + n))
            packed = await client.infer(
                "double",
                [tensor(aio_library)],
                request_compression_algorithm="gzip",
                response_compression_algorithm="deflate",
            )
            np.testing.assert_array_equal(packed.as_numpy("y"), 2 * X)
            with pytest.raises(InferenceServerException, match="no model 'other'"):
                await client.infer("other", [tensor(aio_library)])

    asyncio.run(use())
    gc.collect()


def get(running: Running, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    with running.connect() as raw:
        raw.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        return read_reply(raw, method == "HEAD")


def test_pages(running: Running) -> None:
    status, headers, body = get(running, "/page/")
    assert (status, body) == (200, b"<p>status")
    assert headers["content-type"] == "text/html; charset=utf-8"
    status, headers, _ = get(running, "/page/", "HEAD")
    assert (status, headers["content-length"]) == (200, "9")
    status, headers, _ = get(running, "/")
    assert (status, headers["location"]) == (307, "page/")
    assert get(running, "/v2/status?since=7")[2] == b'{"since": 7}'
    for wrong in ("-1", "x", "²", "1" * 16):
        assert get(running, f"/v2/status?since={wrong}")[0] == 400
    status, headers, body = get(running, "/metrics?a=b")
    assert (status, body) == (200, b"# HELP a b\n")
    status, _, body = get(running, "http://somewhere:80/v2")
    assert (status, json.loads(body)["name"]) == (200, "twofour")
    for path in ("/nowhere", "/v2/", "//v2", "/v2/models//infer", "/..%2f..%2fetc/passwd", "a:b"):
        status, _, body = get(running, path)
        assert status in (400, 404), path
        assert set(json.loads(body)) == {"error"}
    status, headers, _ = get(running, "/v2", "DELETE")
    assert (status, headers["allow"]) == (405, "get, head")


def test_unready_is_503() -> None:
    service = Doubling()
    service.ready = False
    with serving(service) as running:
        assert get(running, "/v2/health/live")[0] == 200
        for path in ("/v2/health/ready", "/v2/models/double/ready"):
            status, _, body = get(running, path)
            assert (status, json.loads(body)["ready"]) == (503, False)
        with client_library.InferenceServerClient(running.url) as client:
            assert not client.is_server_ready()
            assert not client.is_model_ready("double")


def test_openapi_is_valid_and_complete(running: Running) -> None:
    status, _, body = get(running, "/openapi.json")
    page = json.loads(body)
    assert status == 200
    OpenAPIV31SpecValidator(page).validate()
    assert page == json.loads(json.dumps(document(Doubling().version, Limits())))
    described = {
        (m.upper(), p) for p, item in page["paths"].items() for m in item if m != "parameters"
    }
    assert described == {(route.method, route.path) for route in ROUTES}
    assert {route.operation for route in ROUTES} == set(OPERATIONS)
    names = [
        o["operationId"]
        for item in page["paths"].values()
        for o in item.values()
        if "operationId" in o
    ]
    assert len(names) == len(set(names))


def test_what_the_service_is_told() -> None:
    service = Doubling()
    with serving(service) as running, running.connect() as raw:
        raw.sendall(infer_bytes(X, b"X-User: Mia\r\nX-Tag: a\r\nX-Tag: b\r\n"))
        status, headers, _ = read_reply(raw)
    assert status == 200
    (call,) = service.calls
    assert call.protocol == "http"
    assert call.deadline_ns is None
    assert call.headers["x-user"] == "Mia"
    assert call.headers["x-tag"] == "a, b"
    assert headers["x-request-id"]

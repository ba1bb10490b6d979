"""The server as a process, Triton's clients unmodified; each answer beside the engine's own."""

from __future__ import annotations

import asyncio
import json
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tritonclient.grpc as grpc_library
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_library
import tritonclient.http.aio as http_aio
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from tests.serve.engines import image, image_engine, text, text_engine
from tests.serve.server_process import Served, put, serving, wait_for
from tests.serve.test_tls import make
from twofour.runtime.session import Session
from twofour.serve.metrics import HISTOGRAMS

LENGTHS = {"inputs": {"ids": 1, "mask": 1}, "buckets": [4, 8, 16]}
TYPES = {"float32": "FP32", "int64": "INT64"}
TOKEN, CONTROL = "a" * 40, "b" * 40


def fill(repository: Path) -> Path:
    """Models: images with two versions and labels, texts, and one that runs in a thread."""
    labels = {"labels": {"y": ["cat", "dog", "eel"]}}
    put(repository, "image", {1: image_engine(0), 2: image_engine(1)}, labels)
    (repository / "image" / "config.yaml").write_text(
        json.dumps({**labels, "versions": {"all": True}, "queue": {"levels": 3}})
    )
    put(repository, "text", {1: text_engine()}, {"batching": {"lengths": LENGTHS}})
    put(repository, "slow", {1: image_engine()}, {"execution": "thread"})
    return repository


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with serving(fill(folder / "models"), folder, "--log-requests") as served:
        yield served


def direct(engine: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with Session(engine) as session:
        return dict(session.run(inputs))


def tensors(library: Any, inputs: dict[str, np.ndarray]) -> list[Any]:
    found = []
    for name, x in inputs.items():
        found.append(library.InferInput(name, list(x.shape), TYPES[str(x.dtype)]))
        found[-1].set_data_from_numpy(x)
    return found


CASES = [
    ("image", "1", image_engine(0), image(3, 1)),
    ("image", "2", image_engine(1), image(8, 2)),
    ("image", "", image_engine(1), image(1, 3)),
    ("slow", "", image_engine(0), image(2, 4)),
    ("text", "", text_engine(), text(2, 7, 5)),
]


@pytest.mark.parametrize(("model", "version", "engine", "inputs"), CASES)
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_the_engines(
    served: Served, protocol: str, model: str, version: str, engine: Any, inputs: Any
) -> None:
    library = http_library if protocol == "http" else grpc_library
    url = served.http if protocol == "http" else served.grpc
    with library.InferenceServerClient(url) as client:
        result = client.infer(model, tensors(library, inputs), version, request_id="mine")
    for name, expected in direct(engine, inputs).items():
        np.testing.assert_allclose(result.as_numpy(name), expected, rtol=1e-6, atol=1e-6)
        if model != "text":
            np.testing.assert_array_equal(result.as_numpy(name), expected)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_many_at_once(served: Served, protocol: str) -> None:
    library = http_aio if protocol == "http" else grpc_aio
    inputs = [image(1 + i % 8, i) for i in range(64)]

    async def all_of_them() -> list[Any]:
        url = served.http if protocol == "http" else served.grpc
        async with library.InferenceServerClient(url) as client:
            return await asyncio.gather(
                *(client.infer("slow", tensors(library, x)) for x in inputs)
            )

    for x, result in zip(inputs, asyncio.run(all_of_them()), strict=True):
        np.testing.assert_array_equal(result.as_numpy("y"), direct(image_engine(), x)["y"])


def test_a_stream_is_answered_in_its_order(served: Served) -> None:
    """A request that is refused is answered in its place, and the stream goes on."""
    answers: queue.Queue[Any] = queue.Queue()
    with grpc_library.InferenceServerClient(served.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for i in range(20):
            x = {"x": np.zeros((1, 4, 6, 7), np.float32)} if i == 10 else image(1 + i % 3, i)
            client.async_stream_infer("slow", tensors(grpc_library, x), request_id=str(i))
        for i in range(20):
            result, error = answers.get(timeout=20)
            if i == 10:
                assert "expected 6, got 7" in str(error)
                continue
            assert result.get_response().id == str(i)
            expected = direct(image_engine(), image(1 + i % 3, i))["y"]
            np.testing.assert_array_equal(result.as_numpy("y"), expected)
        client.stop_stream()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_classes_have_labels(served: Served, protocol: str) -> None:
    library = http_library if protocol == "http" else grpc_library
    url = served.http if protocol == "http" else served.grpc
    wanted = [library.InferRequestedOutput("y", class_count=2)]
    with library.InferenceServerClient(url) as client:
        found = client.infer("image", tensors(library, image(2)), outputs=wanted).as_numpy("y")
    y = direct(image_engine(1), image(2))["y"]
    for row in range(2):
        _, place, label = found[row][0].decode().split(":")
        assert (int(place), label) == (y[row].argmax(), ["cat", "dog", "eel"][y[row].argmax()])


@pytest.mark.parametrize("packed", ["gzip", "deflate"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_compressed(served: Served, protocol: str, packed: str) -> None:
    x = image(8, 9)
    expected = direct(image_engine(1), x)["y"]
    if protocol == "grpc":
        with grpc_library.InferenceServerClient(served.grpc) as client:
            result = client.infer("image", tensors(grpc_library, x), compression_algorithm=packed)
    else:
        with http_library.InferenceServerClient(served.http) as client:
            result = client.infer(
                "image",
                tensors(http_library, x),
                request_compression_algorithm=packed,
                response_compression_algorithm=packed,
            )
    np.testing.assert_array_equal(result.as_numpy("y"), expected)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_priority_and_timeout(served: Served, protocol: str) -> None:
    library = http_library if protocol == "http" else grpc_library
    url = served.http if protocol == "http" else served.grpc
    with library.InferenceServerClient(url) as client:
        for more in ({"priority": 1}, {"priority": 3}, {"timeout": 5_000_000}):
            result = client.infer("image", tensors(library, image()), **more)
            assert result.as_numpy("y").shape == (1, 3)
        with pytest.raises(InferenceServerException, match="no such priority"):
            client.infer("image", tensors(library, image()), priority=4)


def test_descriptions_agree(served: Served) -> None:
    """HTTP and gRPC say the same, and it is right."""
    with (
        http_library.InferenceServerClient(served.http) as http,
        grpc_library.InferenceServerClient(served.grpc) as grpc,
    ):
        for client in (http, grpc):
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("image", "2")
            assert not client.is_model_ready("nothing")
        as_json = {"as_json": True}
        assert http.get_server_metadata() == grpc.get_server_metadata(**as_json)
        metadata = http.get_model_metadata("text")
        assert [each["name"] for each in metadata["inputs"]] == ["ids", "mask"]
        assert [each["shape"] for each in metadata["outputs"]] == [[-1, -1, 4], [-1, 4]]
        found = grpc.get_model_metadata("text", **as_json)
        assert [each["datatype"] for each in found["inputs"]] == ["INT64", "FP32"]
        config = http.get_model_config("image", "1")
        assert config["max_batch_size"] == 8
        assert grpc.get_model_config("image", "1").config.max_batch_size == 8
        index = {
            (each["name"], each["version"]): each for each in http.get_model_repository_index()
        }
        assert set(index) == {("image", "1"), ("image", "2"), ("slow", "1"), ("text", "1")}
        assert all(each["state"] == "READY" for each in index.values())
        assert len(grpc.get_model_repository_index().models) == len(index)


def test_statistics_count(served: Served) -> None:
    with (
        http_library.InferenceServerClient(served.http) as http,
        grpc_library.InferenceServerClient(served.grpc) as grpc,
    ):

        def rows() -> tuple[int, int]:
            mine = http.get_inference_statistics("image", "1")["model_stats"][0]
            other = grpc.get_inference_statistics("image", "1").model_stats[0]
            assert mine["inference_count"] == other.inference_count
            assert mine["inference_stats"]["fail"]["count"] == other.inference_stats.fail.count
            return mine["inference_count"], mine["inference_stats"]["fail"]["count"]

        before = rows()
        http.infer("image", tensors(http_library, image(5)), "1")
        grpc.infer("image", tensors(grpc_library, image(2)), "1")
        with pytest.raises(InferenceServerException):
            http.infer("image", tensors(http_library, image(9)), "1")
        assert rows() == (before[0] + 7, before[1] + 1)


def test_metrics_and_status(served: Served) -> None:
    status, body = served.get("/metrics")
    families = {each.name: each for each in text_string_to_metric_families(body.decode())}
    assert status == 200
    assert set(HISTOGRAMS) <= set(families)
    for name in ("requests", "refused", "queue_length", "instances_busy", "instances", "swaps"):
        assert f"twofour_{name}" in families
    for name in ("model_ready", "model_memory_bytes", "traffic_share", "ready", "draining"):
        assert f"twofour_{name}" in families
    ready = {s.labels["model"]: s.value for s in families["twofour_model_ready"].samples}
    assert ready == {"image": 1, "slow": 1, "text": 1}
    wait_for(lambda: all(v["share"] is not None for v in versions(served)), what="a tick")
    assert sorted((v["state"], v["version"]) for v in versions(served)) == [
        ("READY", "1"),
        ("READY", "1"),
        ("READY", "1"),
        ("READY", "2"),
    ]
    status, page = served.get("/")
    assert status == 200
    assert b"<script" in page
    description = json.loads(served.get("/openapi.json")[1])
    schema = {"$ref": "#/components/schemas/ModelMetadata", "components": description["components"]}
    jsonschema.validate(json.loads(served.get("/v2/models/image")[1]), schema)


def versions(served: Served) -> list[dict[str, Any]]:
    """Of all models on the status page."""
    document = json.loads(served.get("/v2/status")[1])
    assert document["server"]["ready"]
    return [version for model in document["models"] for version in model["versions"]]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_loading_on_request(tmp_path: Path, protocol: str) -> None:
    library = http_library if protocol == "http" else grpc_library
    repository = fill(tmp_path / "models")
    options = ("--control", "explicit", "--load", "image")
    with serving(repository, tmp_path, *options) as served:
        url = served.http if protocol == "http" else served.grpc
        with library.InferenceServerClient(url) as client:
            assert client.is_model_ready("image")
            assert not client.is_model_ready("slow")
            client.load_model("slow")
            x = image(2, 3)
            found = client.infer("slow", tensors(library, x)).as_numpy("y")
            np.testing.assert_array_equal(found, direct(image_engine(), x)["y"])
            client.load_model("slow", config='{"batching": {"max_size": 2}}')
            with pytest.raises(InferenceServerException, match="more rows than a batch"):
                client.infer("slow", tensors(library, image(3)))
            with pytest.raises(InferenceServerException, match="batching"):
                client.load_model("slow", config='{"batching": {"max_size": -2}}')
            with pytest.raises(InferenceServerException, match="takes 8 at once"):
                client.load_model("slow", config='{"batching": {"max_size": 64}}')
            client.infer("slow", tensors(library, image(2)))
            client.unload_model("slow")
            wait_for(lambda: not client.is_model_ready("slow"))
            with pytest.raises(InferenceServerException, match="slow"):
                client.infer("slow", tensors(library, x))
            with pytest.raises(InferenceServerException, match="no model 'nothing'"):
                client.load_model("nothing")
            shutil.rmtree(repository / "text")
            (repository / "text").mkdir()
            (repository / "text" / "config.yaml").write_text("queue: {length: many}")
            with pytest.raises(InferenceServerException, match=r"queue\.length"):
                client.load_model("text")
            shutil.rmtree(repository)
            with pytest.raises(InferenceServerException, match="cannot be read"):
                client.load_model("text")
            client.infer("image", tensors(library, image(2)))


def test_tokens_and_tls(tmp_path: Path) -> None:
    repository = fill(tmp_path / "models")
    files = make(tmp_path, "server")
    (tmp_path / "tokens").write_text(TOKEN)
    (tmp_path / "control").write_text(CONTROL)
    options = ["--tls-cert", str(files.cert), "--tls-key", str(files.key), "--control", "explicit"]
    options += ["--load", "image", "--tokens", str(tmp_path / "tokens")]
    options += ["--control-tokens", str(tmp_path / "control")]
    x = image(2)
    expected = direct(image_engine(1), x)["y"]
    with serving(repository, tmp_path, *options) as served:
        url = f"localhost:{served.http.rpartition(':')[2]}"
        http = http_library.InferenceServerClient(
            url, ssl=True, ssl_options={"ca_certs": str(files.cert)}
        )
        grpc = grpc_library.InferenceServerClient(
            f"localhost:{served.grpc.rpartition(':')[2]}",
            ssl=True,
            root_certificates=str(files.cert),
        )
        for library, client in ((http_library, http), (grpc_library, grpc)):
            good, bad = ({"authorization": f"Bearer {each}"} for each in (TOKEN, "c" * 40))
            found = client.infer("image", tensors(library, x), headers=good).as_numpy("y")
            np.testing.assert_array_equal(found, expected)
            for headers, said in ((bad, "token is unknown"), ({}, "needs a token")):
                with pytest.raises(InferenceServerException, match=said):
                    client.infer("image", tensors(library, x), headers=headers)
            with pytest.raises(InferenceServerException, match="not good for control"):
                client.load_model("slow", headers=good)
            client.load_model("slow", headers={"authorization": f"Bearer {CONTROL}"})
            assert client.is_server_live()
            client.close()
        with pytest.raises((OSError, EOFError)):
            served.get("/v2/health/live")

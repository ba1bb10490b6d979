"""Exported models on the real Triton server: its answers are the engine's, bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig as TritonConfig
from tritonclient.utils import InferenceServerException, np_to_triton_dtype
from typer.testing import CliRunner

from tests.graphs import graph
from tests.sample_models import conv_model
from tests.serve.engines import image, image_engine, text, text_engine
from tests.serve.tritons import Triton, triton
from twofour.cli import app
from twofour.compiler.build import build
from twofour.core.errors import InputError, UnsupportedError
from twofour.engine import Engine
from twofour.runtime.session import Session
from twofour.serve.repository.config import ModelConfig, config_of
from twofour.serve.triton.config import as_text
from twofour.serve.triton.export import Source, export, read_source

RANDOM = np.random.default_rng(0)
QUICK: dict[str, Any] = {"tuning_effort": 0, "race": False}
DELAY_US = 100_000
BATCHED = {
    "batching": {"max_delay_us": DELAY_US, "preferred_sizes": [4, 8]},
    "queue": {"levels": 3, "timeout_ms": 2000, "length": 64},
    "labels": {"y": [f"class {i}" for i in range(3)]},
    "instances": [{"threads": 1, "cores": [0]}],
    "parameters": {"owner": 'a "quoted" \\ näme'},
}
RAGGED = {
    "batching": {
        "max_delay_us": DELAY_US,
        "lengths": {"inputs": {"ids": 1, "mask": 1}, "buckets": [8, 16]},
    }
}
REFUSING = {"batching": {"max_delay_us": DELAY_US}}
X = image(8)["x"]
Arrays = Mapping[str, np.ndarray]


def refusing_engine() -> Engine:
    """x, at [1-8, 2, 1] -> those elements of x: an index beyond its 8 is refused at run time."""
    model = graph(
        "(float[b,8] x, int64[b,2,1] at) => (float[b,2] y) { a = MatMul (x, k)"
        " y = GatherND <batch_dims = 1> (a, at) }",
        k=np.eye(8, dtype=np.float32),
    )
    ranges = {"x": ((1, 8), (2, 8), (8, 8)), "at": ((1, 2, 1), (2, 2, 1), (8, 2, 1))}
    return build(model, shapes=ranges, **QUICK)


def typed_engine() -> Engine:
    """An input and an output of every type that engines pass on, the protocol's names of them."""
    kinds = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float double".split()
    inputs = ", ".join(f"{kind}[2,3] x_{kind}" for kind in kinds)
    outputs = ", ".join(f"{kind}[3,2] y_{kind}" for kind in kinds)
    nodes = " ".join(f"y_{kind} = Transpose <perm = [1,0]> (x_{kind})" for kind in kinds)
    return build(graph(f"({inputs}) => ({outputs}) {{ {nodes} }}"), **QUICK)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    made = {
        "image": image_engine(),
        "one": build(str(conv_model(folder / "1.onnx")), shapes={"x": (1, 4, 8, 8)}, **QUICK),
        "text": text_engine(),
        "refusing": refusing_engine(),
        "typed": typed_engine(),
    }
    return {name: engine.save(folder / f"{name}.engine") for name, engine in made.items()}


@pytest.fixture(scope="module")
def server(engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """All exported models, served."""
    repository = tmp_path_factory.mktemp("triton") / "repository"
    plain = {"image": BATCHED, "text": RAGGED, "refusing": REFUSING}
    for name, path in engines.items():
        versions = {1: path, 3: path} if name == "image" else {1: path}
        source = Source(name, config_of(plain.get(name, {}), "test"), versions)
        export(source, repository)
    with triton(repository, tmp_path_factory.mktemp("scratch")) as running:
        with http_client.InferenceServerClient(running.http) as client:
            models = client.get_model_repository_index()
            states = {each["name"]: (each["state"], each.get("reason", "")) for each in models}
        assert states == dict.fromkeys(engines, ("READY", "")), running.log.read_text()[-4000:]
        yield running


def ask_http(server: Triton, model: str, feeds: Arrays, **options: Any) -> dict[str, np.ndarray]:
    with http_client.InferenceServerClient(server.http) as client:
        return _ask(http_client, client, model, feeds, options)


def ask_grpc(server: Triton, model: str, feeds: Arrays, **options: Any) -> dict[str, np.ndarray]:
    with grpc_client.InferenceServerClient(server.grpc) as client:
        return _ask(grpc_client, client, model, feeds, options)


def _ask(
    module: Any, client: Any, model: str, feeds: Arrays, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    inputs = []
    for name, array in feeds.items():
        kind = np_to_triton_dtype(array.dtype)
        inputs.append(module.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    response = client.infer(model, inputs, **options)
    described = response.get_response()
    outputs = described["outputs"] if isinstance(described, dict) else described.outputs
    names = [each["name"] if isinstance(each, dict) else each.name for each in outputs]
    return {name: response.as_numpy(name) for name in names}


def counts(server: Triton, model: str) -> tuple[int, int]:
    """Answered requests, and runs of the model that it took."""
    with http_client.InferenceServerClient(server.http) as client:
        stats = client.get_inference_statistics(model)["model_stats"]
    return (
        sum(each["inference_stats"]["success"]["count"] for each in stats),
        sum(each["execution_count"] for each in stats),
    )


def added(server: Triton, model: str, before: tuple[int, int], asked: int) -> tuple[int, int]:
    """What was added when so many requests were answered: Triton answers first, then it counts."""
    end = time.monotonic() + 30
    while True:
        after = counts(server, model)
        requests, runs = after[0] - before[0], after[1] - before[1]
        if requests >= asked or time.monotonic() > end:
            return requests, runs
        time.sleep(0.05)


@pytest.mark.parametrize("ask", [ask_http, ask_grpc])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_answers_are_those_of_the_engine(
    server: Triton, engines: dict[str, Path], ask: Callable[..., Arrays], rows: int
) -> None:
    with Session(Engine.load(engines["image"])) as session:
        expected = session.run({"x": X[:rows]})["y"]
    assert np.array_equal(ask(server, "image", {"x": X[:rows]})["y"], expected)


def test_a_model_without_open_rows(server: Triton, engines: dict[str, Path]) -> None:
    x = RANDOM.normal(size=(1, 4, 8, 8)).astype(np.float32)
    with Session(Engine.load(engines["one"])) as session:
        expected = session.run({"x": x})["y"]
    got = ask_http(server, "one", {"x": x})["y"]
    assert got.shape == expected.shape
    assert np.array_equal(got, expected)
    with pytest.raises(InferenceServerException, match="shape"):
        ask_http(server, "one", {"x": np.repeat(x, 2, axis=0)})


@pytest.mark.parametrize("ask", [ask_http, ask_grpc])
def test_every_type(server: Triton, engines: dict[str, Path], ask: Callable[..., Arrays]) -> None:
    engine = Engine.load(engines["typed"])
    feeds = {
        info.name: RANDOM.integers(0, 2 if info.dtype == "bool" else 100, info.shape).astype(
            info.dtype
        )
        for info in engine.plan.inputs
    }
    got = ask(server, "typed", feeds)
    assert len(got) == 12
    for name, array in feeds.items():
        assert got[f"y{name[1:]}"].dtype == array.dtype
        assert np.array_equal(got[f"y{name[1:]}"], array.T), name


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results, or what was raised."""

    def one(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except InferenceServerException as e:
            return e

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_requests_that_come_together_are_one_run(server: Triton, engines: dict[str, Path]) -> None:
    before = counts(server, "image")
    parts = [X[:1], X[1:3], X[3:4], X[4:8]]
    got = at_once([lambda x=x: ask_grpc(server, "image", {"x": x})["y"] for x in parts])
    requests, runs = added(server, "image", before, 4)
    with Session(Engine.load(engines["image"])) as session:
        for x, y in zip(parts, got, strict=True):
            assert np.array_equal(y, session.run({"x": x})["y"])
    assert requests >= 4
    assert runs < requests  # a batch of Triton's is one run of the engine: see model.py


def test_ragged_lengths_share_a_run(server: Triton, engines: dict[str, Path]) -> None:
    before = counts(server, "text")
    parts = [text(1, n, seed=n) for n in (3, 5, 8, 1, 11, 16)]
    got = at_once([lambda feeds=feeds: ask_grpc(server, "text", feeds) for feeds in parts])
    requests, runs = added(server, "text", before, 6)
    with Session(Engine.load(engines["text"])) as session:
        for feeds, answer in zip(parts, got, strict=True):
            expected = session.run(feeds)
            assert np.array_equal(answer["tokens"], expected["tokens"])
            # Zeros of the padding are added, in another order: 16 sums round otherwise.
            bound = 16 * np.finfo(np.float32).eps * np.abs(expected["tokens"]).mean(axis=1)
            assert np.all(np.abs(answer["mean"] - expected["mean"]) <= bound)
    assert requests >= 6
    assert runs < requests


def test_a_wrong_request_fails_alone(server: Triton) -> None:
    x = RANDOM.normal(size=(1, 8)).astype(np.float32)
    before = counts(server, "refusing")
    ats = [np.array([[[i], [k]]]) for i, k in ((0, 7), (9, 1), (3, 3), (2, 99))]
    feeds = [{"x": x, "at": at} for at in ats]
    got = at_once([lambda f=f: ask_grpc(server, "refusing", f)["y"] for f in feeds])
    assert [isinstance(y, InferenceServerException) for y in got] == [False, True, False, True]
    assert np.array_equal(got[0], x[:, [0, 7]])
    assert np.array_equal(got[2], x[:, [3, 3]])
    assert got[1].status() == "StatusCode.INVALID_ARGUMENT"
    requests, runs = added(server, "refusing", before, 2)
    assert requests >= 2  # those that fail alone are counted, too
    assert runs < 4


def test_only_wanted_outputs_versions_and_labels(server: Triton) -> None:
    wanted = [http_client.InferRequestedOutput("y", class_count=2)]
    top = ask_http(server, "image", {"x": X[:1]}, outputs=wanted, model_version="3")["y"]
    assert top.shape == (1, 2)
    assert b":class " in top[0, 0]
    with pytest.raises(InferenceServerException, match="version 1 is not found"):
        ask_http(server, "image", {"x": X[:1]}, model_version="1")  # versions: the latest only


def test_triton_has_the_same_batching(server: Triton) -> None:
    with http_client.InferenceServerClient(server.http) as client:
        config = client.get_model_config("image")
    batching = config["dynamic_batching"]
    assert config["max_batch_size"] == 8
    assert batching["preferred_batch_size"] == [4, 8]
    assert batching["max_queue_delay_microseconds"] == DELAY_US
    assert batching["priority_levels"] == 3
    assert batching["default_priority_level"] == 2
    assert batching["default_queue_policy"] == {
        "timeout_action": "REJECT",
        "default_timeout_microseconds": 2_000_000,
        "allow_timeout_override": True,
        "max_queue_size": 64,
    }
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    assert config["parameters"]["owner"] == {"string_value": 'a "quoted" \\ näme'}


# What is written, without a server.


def written(folder: Path) -> TritonConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), TritonConfig())


def test_groups_of_instances(engines: dict[str, Path], tmp_path: Path) -> None:
    one, two = {"threads": 1, "cores": [0]}, {"threads": 2, "cores": [0, 1]}
    config = config_of({"instances": [one, two, one], "versions": {"latest": 2}}, "test")
    done = export(Source("m", config, {2: engines["image"], 5: engines["image"]}), tmp_path)
    assert done.versions == (2, 5)
    found = written(done.path)
    assert [(each.name, each.count) for each in found.instance_group] == [("cpu0", 2), ("cpu1", 1)]
    settings = json.loads(found.parameters["twofour"].string_value)
    assert settings["instances"] == {"cpu0": one, "cpu1": two}
    assert found.version_policy.latest.num_versions == 2


def test_text_is_read_back_as_it_was() -> None:
    texts = {"a": 'x"\\y', "b": "näme\n\t", "c": ""}
    text = as_text({"parameters": {key: {"string_value": each} for key, each in texts.items()}})
    read = text_format.Parse(text, TritonConfig())
    assert {key: each.string_value for key, each in read.parameters.items()} == texts


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"traffic": {"split": {1: 50, 2: 50}}}, "traffic.split"),
        ({"traffic": {"shadow": 2}}, "traffic.shadow"),
        ({"queue": {"max_timeout_ms": 5}}, "max_timeout_ms without"),
        ({"queue": {"max_timeout_ms": 5, "timeout_ms": 9}}, "is below timeout_ms"),
        ({"parameters": {"twofour": "x"}}, "the name under which"),
        ({"batching": {"max_size": 1}, "queue": {"levels": 2}}, "only models that batch"),
    ],
)
def test_what_triton_cannot_say_is_refused(
    engines: dict[str, Path], tmp_path: Path, config: Any, reason: str
) -> None:
    source = Source("m", config_of(config, "test"), {1: engines["image"]})
    with pytest.raises(UnsupportedError, match=reason):
        export(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_triton_cannot_describe(tmp_path: Path) -> None:
    model = graph(
        "(float[4] x) => (float y, int64[1,n] z)"
        "{ y = ReduceSum <keepdims = 0> (x) z = NonZero (x) }"
    )
    path = build(model, **QUICK).save(tmp_path / "m.engine")
    with pytest.raises(UnsupportedError) as caught:
        export(Source("m", ModelConfig(), {1: path}), tmp_path / "out")
    assert "y: it has no dimension" in str(caught.value)
    assert "z: its shape depends on the data;" in str(caught.value)


def test_versions_that_differ_are_refused(engines: dict[str, Path], tmp_path: Path) -> None:
    source = Source("m", ModelConfig(), {1: engines["image"], 2: engines["text"]})
    with pytest.raises(UnsupportedError, match="version 1 differs from version 2"):
        export(source, tmp_path)


def test_nothing_is_overwritten_unless_told(engines: dict[str, Path], tmp_path: Path) -> None:
    first = Source("m", ModelConfig(), {1: engines["image"]})
    path = export(first, tmp_path).path
    old = (path / "config.pbtxt").read_text()
    second = Source("m", ModelConfig(), {2: engines["text"]})
    with pytest.raises(InputError, match="--force"):
        export(second, tmp_path)
    assert (path / "config.pbtxt").read_text() == old
    export(second, tmp_path, force=True)
    assert {each.name for each in path.iterdir()} == {"config.pbtxt", "2"}
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


def test_nothing_half_written_remains(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("twofour.serve.triton.export.shutil.copyfile", full)
    with pytest.raises(InputError, match="No space left"):
        export(Source("m", ModelConfig(), {1: engines["image"]}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_models_folder(engines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for version in (1, 2, 10):
        (folder / str(version)).mkdir(parents=True)
        (folder / str(version) / "m.engine").write_bytes(engines["image"].read_bytes())
    (folder / "config.yaml").write_text("versions: {latest: 2}\nbatching: {max_size: 4}\n")
    source = read_source(folder)
    assert (source.name, sorted(source.engines)) == ("model", [2, 10])
    assert source.config.batching.max_size == 4
    assert sorted(read_source(folder, version=1).engines) == [1]
    with pytest.raises(InputError, match="no such version"):
        read_source(folder, version=3)
    (folder / "10" / "other.engine").write_bytes(b"damaged")
    assert read_source(folder).engines[10].name == "m.engine"
    (folder / "10" / "m.engine").unlink()
    with pytest.raises(InputError, match=r"other\.engine: .* is not a readable engine"):
        read_source(folder)
    with pytest.raises(InputError, match="no name of a model"):
        read_source(engines["image"], name="../x")


def test_the_command(engines: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("queue: {timeout_ms: 100}\n")
    call = ["export-triton", str(engines["image"]), "-o", str(tmp_path / "out"), "--name", "m"]
    result = CliRunner().invoke(app, [*call, "--config", str(tmp_path / "c.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "twofour.export-triton/1"
    assert document["versions"] == [1]
    assert "Triton shortens only" in document["notes"][0]
    again = CliRunner().invoke(app, call)
    assert again.exit_code == 2
    assert "--force" in again.stderr

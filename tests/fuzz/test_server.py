"""Damaged requests to a real server: answered or refused, never its fault; then it answers on.

Here a few thousand of the same seeds each time; longer on demand, as in test_fuzz.py. A failure
names its seed: --fuzz-seed SEED begins with it.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
import tritonclient.http as http_library
from tritonclient.grpc import service_pb2

from tests.serve.engines import image, image_engine, text, text_engine
from tests.serve.server_process import Served, put, serving
from twofour.runtime.session import Session

SEEDS, BATCH = 2000, 200
HEADER = "Inference-Header-Content-Length"
TOKENS = [
    *(b"-1", b"0", b"1e999", b"9223372036854775808", b"-0.0", b"null", b"true", b"[]", b"{}"),
    *(b'"shape":[1,4,6,6]', b'"shape":[99999999,99999999]', b'"datatype":"BYTES"', b'"FP16"'),
    *(b'"parameters":{"binary_data_size":4294967296}', b'"classification":-1', b"[" * 200),
    *(b"\x00", b"\xff\xff\xff\xff", b"\x80\x80\x80\x80\x10", b'"\\ud800"', b"NaN", b'"timeout":-1'),
    *(b'"binary_data_output":true', b'"priority":99', b'"data":[[1],2,[[3]]]', b'"y"', b'"x"'),
]
"""Pieces that mean something to one of the decoders."""
FINE = {200, 400, 404, 413, 429, 431, 499, 501, 503, 504}
FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
METHODS = {
    "ModelInfer": 8,
    "ModelMetadata": 1,
    "ModelConfig": 1,
    "ModelReady": 1,
    "ModelStatistics": 1,
    "RepositoryIndex": 1,
    "RepositoryModelLoad": 1,
    "RepositoryModelUnload": 1,
    "TraceSetting": 1,
    "LogSettings": 1,
    "SystemSharedMemoryRegister": 1,
}
"""With how often each is taken."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fuzzed")
    lengths = {"inputs": {"ids": 1, "mask": 1}, "buckets": [4, 8, 16]}
    put(folder / "models", "m", {1: image_engine()}, {"labels": {"y": ["a", "b", "c"]}})
    put(folder / "models", "t", {1: text_engine()}, {"batching": {"lengths": lengths}})
    with serving(folder / "models", folder, "--max-body", "4M") as served:
        yield served


def changed(data: bytes, rng: random.Random) -> bytes:
    """The bytes with up to three changes."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.randint(1, 16))
        match rng.randrange(7):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:end]
            case 2:
                found[at:at] = rng.choice(TOKENS)
            case 3:
                found[at:end] = rng.choice(TOKENS)
            case 4:
                found[at:at] = found[at:end]
            case 5:
                del found[at:]
            case _:
                found[at:end] = rng.randbytes(end - at)
    return bytes(found)


def http_bodies() -> list[tuple[str, bytes, int]]:
    """Model, body, bytes of its JSON: of raw tensors and of JSON alone."""
    found = []
    for model, inputs in (("m", image(2)), ("t", text(2, 3))):
        for binary in (True, False):
            given = []
            for name, x in inputs.items():
                kind = {"float32": "FP32", "int64": "INT64"}[str(x.dtype)]
                given.append(http_library.InferInput(name, list(x.shape), kind))
                given[-1].set_data_from_numpy(x, binary_data=binary)
            client = http_library.InferenceServerClient
            body, size = client.generate_request_body(given, request_id="1", priority=0)
            found.append((model, bytes(body), size or len(body)))
    return found


def grpc_bodies() -> dict[str, list[bytes]]:
    """Method -> requests of it."""
    infer = []
    for model, inputs in (("m", image(2)), ("t", text(2, 3))):
        message = service_pb2.ModelInferRequest(model_name=model, id="1")
        for name, x in inputs.items():
            kind = {"float32": "FP32", "int64": "INT64"}[str(x.dtype)]
            message.inputs.add(name=name, datatype=kind, shape=x.shape)
            message.raw_input_contents.append(x.tobytes())
        message.parameters["timeout"].int64_param = 1_000_000
        infer.append(message.SerializeToString())
    named = service_pb2.ModelMetadataRequest(name="m", version="1").SerializeToString()
    return {name: infer if name == "ModelInfer" else [named] for name in METHODS}


class Good:
    """A request that is right, and its answer."""

    def __init__(self, served: Served) -> None:
        self.served = served
        with Session(image_engine()) as session:
            self.expected = session.run(image(3, 1))["y"]

    def check(self) -> None:
        given = http_library.InferInput("x", [3, 4, 6, 6], "FP32")
        given.set_data_from_numpy(image(3, 1)["x"])
        with http_library.InferenceServerClient(self.served.http, network_timeout=20) as client:
            found = client.infer("m", [given]).as_numpy("y")
        np.testing.assert_array_equal(found, self.expected)


def run_seeds(request: pytest.FixtureRequest, good: Good, case: Callable[[int], str]) -> None:
    """All seeds, or as many as there is time for; prints how they ended."""
    seconds = request.config.getoption("--fuzz-seconds")
    first = request.config.getoption("--fuzz-seed")
    end = time.monotonic() + seconds
    ended: Counter[str] = Counter()
    seed = first
    while (time.monotonic() < end) if seconds else (seed < first + SEEDS):
        ended[case(seed)] += 1
        seed += 1
        if (seed - first) % BATCH == 0:
            good.check()
            assert good.served.process.poll() is None
    print(f"seeds {first} to {seed - 1}: {dict(ended)}")
    assert len(ended) > 1, f"all ended alike: {ended}"


def test_damaged_http(served: Served, request: pytest.FixtureRequest) -> None:
    bodies = http_bodies()
    host, _, port = served.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)

    def case(seed: int) -> str:
        rng = random.Random(seed)
        model, body, size = rng.choice(bodies)
        data = changed(body[:size], rng) + body[size:] if rng.random() < 0.7 else changed(body, rng)
        head = len(data) - (len(body) - size) if rng.random() < 0.8 else rng.randrange(1 << 12)
        headers = {HEADER: str(max(head, 0))} if rng.random() < 0.9 else {}
        connection.request("POST", f"/v2/models/{model}/infer", data, headers)
        reply = connection.getresponse()
        answer = reply.read()
        assert reply.status in FINE, (seed, reply.status, answer)
        if reply.status != 200:
            assert json.loads(answer)["error"], seed
        elif reply.headers.get(HEADER) is None:
            json.loads(answer)
        return str(reply.status)

    run_seeds(request, Good(served), case)
    connection.close()


def test_damaged_grpc(served: Served, request: pytest.FixtureRequest) -> None:
    bodies = grpc_bodies()
    with grpc.insecure_channel(served.grpc) as channel:
        calls = {
            name: channel.unary_unary(f"/inference.GRPCInferenceService/{name}") for name in METHODS
        }

        def case(seed: int) -> str:
            rng = random.Random(seed)
            name = rng.choices(list(METHODS), list(METHODS.values()))[0]
            data = changed(rng.choice(bodies[name]), rng)
            call = calls[name].future(data, timeout=20)
            assert call.code() not in FAULTS, (seed, name, call.details())
            return str(call.code().name)

        run_seeds(request, Good(served), case)


def test_damaged_streams(served: Served, request: pytest.FixtureRequest) -> None:
    """Every request of a stream gets its answer, in order, or its refusal."""
    bodies = grpc_bodies()["ModelInfer"]
    with grpc.insecure_channel(served.grpc) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")

        def case(seed: int) -> str:
            rng = random.Random(seed)
            sent = [changed(rng.choice(bodies), rng) for _ in range(10)]
            answers = [
                service_pb2.ModelStreamInferResponse.FromString(each)
                for each in call(iter(sent), timeout=20)
            ]
            assert len(answers) == 10, seed
            assert not any("server failed" in each.error_message for each in answers), seed
            return str(sum(bool(each.error_message) for each in answers))

        run_seeds(request, Good(served), case)


def test_damaged_frames(served: Served, request: pytest.FixtureRequest) -> None:
    """Compressed and chunked bodies, on connections of their own."""
    bodies = http_bodies()
    host, _, port = served.http.rpartition(":")

    def case(seed: int) -> str:
        rng = random.Random(seed)
        model, body, size = rng.choice(bodies)
        pack, encoding = rng.choice(((gzip.compress, "gzip"), (zlib.compress, "deflate")))
        data = pack(changed(body, rng) if rng.random() < 0.3 else body)
        data = changed(data, rng) if rng.random() < 0.3 else data
        headers = {HEADER: str(size), "Content-Encoding": encoding}
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        chunks = [data[:9], data[9:]]
        chunked = rng.random() < 0.5
        connection.request(
            "POST",
            f"/v2/models/{model}/infer",
            iter(chunks) if chunked else data,
            headers,
            encode_chunked=chunked,
        )
        reply = connection.getresponse()
        reply.read()
        connection.close()
        assert reply.status in FINE | {415}, (seed, reply.status)
        return str(reply.status) if not chunked else f"chunked {reply.status}"

    run_seeds(request, Good(served), case)

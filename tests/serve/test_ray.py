"""A repository on a real Ray cluster of two nodes, asked by an unmodified client.

Every answer is compared with the engine called directly. Requests that fail are counted: none may,
while a deployment grows and while the repository changes. The tests share a cluster, and each
leaves it as it was: they may run in any order, and spread over several processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[serve]'")

import tritonclient.http as triton
from ray import serve
from tritonclient.utils import InferenceServerException

from tests.serve.clusters import (
    CONFIGS,
    SLOWLY,
    Served,
    ask,
    assert_close,
    cluster_of_two,
    expected,
    load,
    put_model,
    replicas,
    tensor,
    together,
    wait,
)
from tests.serve.engines import image

pytestmark = pytest.mark.slow

MOST_S = 120  # any of the steps takes seconds, beside other tests on few cores more


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with cluster_of_two() as found:
        yield found


def test_answers_are_those_of_the_engine(served: Served) -> None:
    client = served.client()
    for rows, binary in ((1, True), (3, True), (2, False)):
        assert_close(ask(client, "pair", rows, rows, binary=binary), "pair", rows, rows)
    compressed = client.infer(
        "pair", [tensor(image(2)["x"], binary=True)], request_compression_algorithm="gzip"
    )
    assert_close(compressed.as_numpy("y"), "pair", 2, 0)


def test_what_a_server_says_of_itself(served: Served) -> None:
    client = served.client()
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("pair")
    assert client.get_server_metadata()["name"] == "twofour"
    assert client.get_model_metadata("pair")["inputs"][0]["shape"] == [-1, 4, 6, 6]
    assert client.get_model_config("grows")["name"] == "grows"
    index = {each["name"]: each["state"] for each in client.get_model_repository_index()}
    assert index == dict.fromkeys(CONFIGS, "READY")
    names = {each["name"] for each in client.get_inference_statistics()["model_stats"]}
    assert names == set(CONFIGS)


def test_refusals_are_those_of_a_server(served: Served) -> None:
    client = served.client()
    with pytest.raises(InferenceServerException, match="no model 'absent'") as absent:
        ask(client, "absent", 1, 0)
    assert absent.value.status() == "404"
    with pytest.raises(InferenceServerException, match="x") as shape:
        client.infer("pair", [tensor(np.zeros((1, 2), np.float32), binary=True)])
    assert shape.value.status() == "400"
    with pytest.raises(InferenceServerException, match="not loaded on request") as control:
        client.load_model("pair")
    assert control.value.status() == "403"


def test_a_full_queue_is_said_and_loses_nothing(served: Served) -> None:
    replies = []

    def once(seed: int) -> None:
        body, length = triton.InferenceServerClient.generate_request_body(
            [tensor(image(1, seed)["x"], binary=True)]
        )
        headers = {"Inference-Header-Content-Length": str(length)}
        client = served.client()
        replies.append(client._post("v2/models/narrow/infer", body, headers, None))

    together([lambda seed=seed: once(seed) for seed in range(16)])
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 503}
    refused = next(reply for reply in replies if reply.status_code == 503)
    assert int(refused.get("retry-after")) >= 1


def test_replicas_are_added_under_load(served: Served) -> None:
    with load(served, "grows", clients=6) as seen:
        wait(lambda: replicas("grows") == 2, MOST_S)
    assert seen.failed == []
    assert seen.right > 0


def test_a_changing_repository_fails_no_request(served: Served) -> None:
    folder, client = served.repository, served.client()
    small = "ray: {num_cpus: 0.1}\n"
    put_model(folder, "swaps", SLOWLY + small, 0)
    wait(lambda: is_ready(client, "swaps"), MOST_S)
    with load(served, "swaps", clients=4, engines=(0, 7)) as seen:
        put_model(folder, "swaps", SLOWLY + small, 7, version=2)
        put_model(folder, "late", small, 5)
        wait(lambda: client.get_model_metadata("swaps")["versions"] == ["2"], MOST_S)
        wait(lambda: is_ready(client, "late"), MOST_S)
        shutil.rmtree(folder / "late")
        wait(lambda: "late" not in str(client.get_model_repository_index()), MOST_S)
    shutil.rmtree(folder / "swaps")
    wait(lambda: "swaps" not in str(client.get_model_repository_index()), MOST_S)
    assert seen.failed == []
    assert seen.right > 0


def test_a_model_that_cannot_be_loaded_is_tried_again_when_it_changes(served: Served) -> None:
    client, place = served.client(), served.repository / "mends"
    place.mkdir()
    (place / "config.yaml").write_text("ray: {num_cpus: 0.1}\n")
    (place / ".1").mkdir()
    (place / ".1" / "model.engine").write_bytes(b"no engine")
    (place / ".1").rename(place / "1")
    wait(lambda: "mends" in str(client.get_model_repository_index()), MOST_S)
    wait(
        lambda: serve.status().applications["twofour"].status == "RUNNING", MOST_S
    )  # both fronts know
    with pytest.raises(InferenceServerException, match="could not be loaded"):
        ask(client, "mends", 1, 0)
    assert client.is_server_ready(), "a broken model that is added takes no server out of service"
    put_model(served.repository, "mends", "ray: {num_cpus: 0.1}\n", 0, version=2)
    wait(lambda: client.is_model_ready("mends"), MOST_S)
    np.testing.assert_array_equal(ask(client, "mends", 1, 0), expected(0, 1, 0))
    shutil.rmtree(place)
    wait(lambda: "mends" not in str(client.get_model_repository_index()), MOST_S)


def is_ready(client: triton.InferenceServerClient, name: str) -> bool:
    index = client.get_model_repository_index()
    return {"name": name, "version": "1", "state": "READY", "reason": ""} in index

"""A repository on a real Ray cluster of two nodes, asked by an unmodified client.

Every answer is compared with the engine called directly. Requests that fail are counted: none may,
while a deployment grows, while the repository changes, and while a process and a node are killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[serve]'")

import ray
import tritonclient.http as triton
from ray import serve
from ray.cluster_utils import Cluster
from tritonclient.utils import InferenceServerException

from tests.serve.engines import image, image_engine
from tests.serve.tritons import free_ports
from twofour.runtime.session import Session

ROOT = Path(__file__).resolve().parents[2]
SLOWLY = "batching: {max_delay_us: 100000}\n"  # so that requests are always under way
CONFIGS = {
    "pair": SLOWLY + "ray: {min_replicas: 2, max_replicas: 2, num_cpus: 0.6}\n",
    "grows": SLOWLY
    + "ray: {max_replicas: 2, target_ongoing_requests: 1, upscale_delay_s: 0, num_cpus: 0.1}\n",
    "narrow": SLOWLY + "queue: {length: 1}\nray: {target_ongoing_requests: 0.5, num_cpus: 0.1}\n",
}
SEEDS = {name: seed for seed, name in enumerate(CONFIGS)}
DEPLOY = """
import sys
from pathlib import Path
from twofour.serve.app import Listen, ServeOptions
from twofour.serve.models.fleet import FleetOptions
from twofour.serve.ray.deploy import deploy
repository, cache, port, address = sys.argv[1:]
listen, fleet = Listen(http_port=int(port)), FleetOptions("poll", poll_s=1)
options = ServeOptions(repository, Path(cache), listen=listen, fleet=fleet)
deploy(options, address)
"""
pytestmark = pytest.mark.slow


@dataclass
class Served:
    """A cluster, what it serves, and who deployed it."""

    cluster: Cluster
    worker: object
    repository: Path
    port: int
    arguments: list[str]
    driver: subprocess.Popen[bytes] = field(init=False)

    def deploy(self) -> None:
        self.driver = subprocess.Popen([sys.executable, "-c", DEPLOY, *self.arguments])

    def client(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(f"127.0.0.1:{self.port}", network_timeout=60)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    folder = Path(mkdtemp(prefix="tf", dir="/tmp"))  # short, for the paths of sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        for name, config in CONFIGS.items():
            put_model(folder / "models", name, config, SEEDS[name])
        options = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        worker = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        ray.init(cluster.address, log_to_driver=False)
        (port,) = free_ports(1)
        # Both nodes have one address here: one proxy, so that a killed node is not also a proxy's.
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        arguments = [str(folder / "models"), str(folder / "cache"), str(port), cluster.address]
        found = Served(cluster, worker, folder / "models", port, arguments)
        found.deploy()
        try:
            wait(lambda: ready(found), 60)
            yield found
        finally:
            found.driver.terminate()
            found.driver.wait(30)
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder)


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
        wait(lambda: replicas("grows") == 2, 40)
    assert seen.failed == []
    assert seen.right > 0


def test_a_changing_repository_fails_no_request(served: Served) -> None:
    folder, client = served.repository, served.client()
    with load(served, "pair", clients=4, seeds=(0, 7)) as seen:
        put_model(folder, "pair", CONFIGS["pair"], 7, version=2)
        put_model(folder, "late", "ray: {num_cpus: 0.1}\n", 5)
        wait(lambda: client.get_model_metadata("pair")["versions"] == ["2"], 20)
        wait(
            lambda: (
                {"name": "late", "version": "1", "state": "READY", "reason": ""}
                in client.get_model_repository_index()
            ),
            30,
        )
        shutil.rmtree(folder / "late")
        wait(lambda: "late" not in str(client.get_model_repository_index()), 20)
    assert seen.failed == []
    assert seen.right > 0


def test_a_model_that_cannot_be_loaded_is_tried_again_when_it_changes(served: Served) -> None:
    client, place = served.client(), served.repository / "mends"
    place.mkdir()
    (place / "config.yaml").write_text("ray: {num_cpus: 0.1}\n")
    (place / ".1").mkdir()
    (place / ".1" / "model.engine").write_bytes(b"no engine")
    (place / ".1").rename(place / "1")
    wait(lambda: "mends" in str(client.get_model_repository_index()), 10)
    wait(lambda: serve.status().applications["twofour"].status == "RUNNING", 10)  # both fronts know
    with pytest.raises(InferenceServerException, match="could not be loaded"):
        ask(client, "mends", 1, 0)
    assert client.is_server_ready(), "a broken model that is added takes no server out of service"
    put_model(served.repository, "mends", "ray: {num_cpus: 0.1}\n", 0, version=2)
    wait(lambda: client.is_model_ready("mends"), 30)
    np.testing.assert_array_equal(ask(client, "mends", 1, 0), expected(0, 1, 0))


def test_the_deploying_process_may_be_killed(served: Served) -> None:
    before = processes("pair")
    with load(served, "grows", clients=2) as seen:
        served.driver.kill()
        served.driver.wait()
        shutil.rmtree(served.repository / "mends")
        served.deploy()
        wait(lambda: "twofour:mends" not in serve.status().applications, 30)
    assert seen.failed == []
    assert seen.right > 0
    assert processes("pair") == before, "processes were started anew"


def test_a_killed_replica_and_a_killed_node_lose_no_request(served: Served) -> None:
    with load(served, "pair", clients=8, seeds=(0, 7)) as seen:
        time.sleep(1)
        assert len(set(processes("pair").values())) == 2, "expected a replica on each node"
        served.cluster.remove_node(served.worker, allow_graceful=False)
        wait(lambda: len(processes("pair")) == 1, 20)
        ((left, _),) = processes("pair").items()
        time.sleep(1)
        os.kill(left, signal.SIGKILL)
        wait(lambda: len(processes("pair")) == 1 and left not in processes("pair"), 40)
        answered = seen.right
        wait(lambda: seen.right > answered + 20, 20)
    assert seen.failed == []


def test_it_ends_after_what_it_was_asked(served: Served) -> None:
    client, answers = served.client(), []
    asking = threading.Thread(target=lambda: answers.append(ask(client, "grows", 1, 3)))
    asking.start()
    time.sleep(0.03)
    served.driver.send_signal(signal.SIGTERM)
    asking.join()
    assert_close(answers[0], "grows", 1, 3)
    assert served.driver.wait(30) == 0
    assert serve.status().applications == {}


def put_model(folder: Path, name: str, config: str, seed: int, version: int = 1) -> None:
    """Puts a version into a repository, whole at once."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(config)
    draft = place / f".{version}"
    draft.mkdir()
    image_engine(seed).save(draft / "model.engine")
    draft.rename(place / str(version))


def tensor(x: np.ndarray, *, binary: bool) -> triton.InferInput:
    found = triton.InferInput("x", list(x.shape), "FP32")
    found.set_data_from_numpy(x, binary_data=binary)
    return found


def ask(
    client: triton.InferenceServerClient, name: str, rows: int, seed: int, *, binary: bool = True
) -> np.ndarray:
    outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
    inputs = [tensor(image(rows, seed)["x"], binary=binary)]
    return client.infer(name, inputs, outputs=outputs).as_numpy("y")


def expected(engine: int, rows: int, seed: int) -> np.ndarray:
    with Session(image_engine(engine)) as session:
        return session.run(image(rows, seed))["y"]


def assert_close(found: np.ndarray, name: str, rows: int, seed: int) -> None:
    np.testing.assert_array_equal(found, expected(SEEDS[name], rows, seed))


@dataclass
class Seen:
    """What clients got: answers of one of the engines, and anything else."""

    right: int = 0
    failed: list[str] = field(default_factory=list)


@contextmanager
def load(served: Served, name: str, clients: int, seeds: tuple[int, ...] = ()) -> Iterator[Seen]:
    """Clients that ask as fast as they are answered, while the context is open."""
    seen, stop = Seen(), threading.Event()
    engines = seeds or (SEEDS[name],)
    allowed = [[expected(engine, 1, seed) for engine in engines] for seed in range(clients)]

    def run(seed: int) -> None:
        client = served.client()
        while not stop.is_set():
            try:
                found = ask(client, name, 1, seed)
            except (InferenceServerException, OSError) as e:
                seen.failed.append(repr(e)[:300])
                continue
            if any(np.array_equal(found, each) for each in allowed[seed]):
                seen.right += 1
            else:
                seen.failed.append(f"wrong: {found}")

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def wait(condition: Callable[[], bool], most_s: float) -> None:
    end = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end, f"not within {most_s} s"
        time.sleep(0.2)


def ready(served: Served) -> bool:
    assert served.driver.poll() is None, "the deploying process has ended"
    return bool(served.client().is_server_ready())


def replicas(name: str) -> int:
    states = serve.status().applications[f"twofour:{name}"].deployments["Model"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def processes(name: str) -> dict[int, int]:
    """The replicas of a model on this machine: process -> its parent, which stands for the node."""
    title = f"ray::ServeReplica:twofour:{name}:Model"
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("cmdline").read_text().startswith(title):
                parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
                found[int(folder.name)] = int(parent)
        except OSError:  # it has ended meanwhile
            continue
    return found

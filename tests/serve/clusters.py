"""A Ray cluster of two nodes on this machine, a repository on it, and clients that ask it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir, mkdtemp

import numpy as np
import pytest
import ray
import tritonclient.http as triton
from ray import serve
from ray.cluster_utils import Cluster
from tritonclient.utils import InferenceServerException

from tests.ports import free_ports
from tests.serve.engines import image, image_engine
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
ONE_AT_A_TIME = Path(gettempdir(), "twofour-tests-ray.lock")


@dataclass
class Served:
    """A cluster, what it serves, and who deployed it."""

    cluster: Cluster
    worker: object
    folder: Path
    port: int
    arguments: list[str]
    driver: subprocess.Popen[bytes] = field(init=False)

    @property
    def repository(self) -> Path:
        return self.folder / "models"

    def deploy(self) -> None:
        self.driver = subprocess.Popen([sys.executable, "-c", DEPLOY, *self.arguments])

    def client(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(f"127.0.0.1:{self.port}", network_timeout=60)


@contextmanager
def cluster_of_two() -> Iterator[Served]:
    """Both nodes ready and everything deployed; one such at a time, whoever else runs tests."""
    folder = Path(mkdtemp(prefix="tf", dir="/tmp"))  # short, for the paths of sockets
    with ONE_AT_A_TIME.open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # A proxy that takes longer than Ray's 5 s to start, as beside other tests, is killed.
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
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
        found = Served(cluster, worker, folder, port, arguments)
        found.deploy()
        try:
            wait(lambda: ready(found), 120)
            yield found
        finally:
            found.driver.terminate()
            found.driver.wait(30)
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder)


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
def load(served: Served, name: str, clients: int, engines: tuple[int, ...] = ()) -> Iterator[Seen]:
    """Clients that ask as fast as they are answered, while the context is open.

    Answers are right that are those of one of the `engines`, by default the model's first.
    """
    seen, stop = Seen(), threading.Event()
    engines = engines or (SEEDS[name],)
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
    try:
        return bool(served.client().is_server_ready())
    except OSError:  # the proxy listens before it answers
        return False


def replicas(name: str) -> int:
    states = serve.status().applications[f"twofour:{name}"].deployments["Model"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def processes(served: Served, name: str) -> dict[int, int]:
    """The replicas of a model on this cluster: process -> its parent, which stands for the node."""
    title = f"ray::ServeReplica:twofour:{name}:Model"
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if not folder.joinpath("cmdline").read_text().startswith(title):
                continue
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if str(served.folder) in Path("/proc", parent, "cmdline").read_text():
                found[int(folder.name)] = int(parent)
        except OSError:  # it has ended meanwhile
            continue
    return found

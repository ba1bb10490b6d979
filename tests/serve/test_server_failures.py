"""The server as a process while files, disks, clients and its own children fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as http_library

from tests.serve.engines import image, image_engine
from tests.serve.server_process import Served, put, serving, starting, wait_for
from tests.serve.test_server import direct, tensors
from tests.serve.test_server_end import BODY, WAITING, onnx_file, queued

GOOD = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}"


def answers(served: Served, seed: int = 0, engine: Any = None) -> None:
    """The model answers, rightly."""
    with http_library.InferenceServerClient(served.http, network_timeout=20) as client:
        found = client.infer("m", tensors(http_library, image(2, seed))).as_numpy("y")
    expected = direct(engine or image_engine(), image(2, seed))["y"]
    np.testing.assert_array_equal(found, expected)


def states(served: Served) -> dict[str, tuple[str, str]]:
    """Model/version -> state and reason."""
    with http_library.InferenceServerClient(served.http) as client:
        index = client.get_model_repository_index()
    return {f"{e['name']}/{e['version']}": (e["state"], e["reason"]) for e in index}


def connect(served: Served) -> socket.socket:
    host, _, port = served.http.rpartition(":")
    return socket.create_connection((host, int(port)), 20)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    put(tmp_path / "models", "m", {1: image_engine()}, {"execution": "thread"})
    with serving(tmp_path / "models", tmp_path) as served:
        yield served


@pytest.mark.parametrize("damage", ["deleted", "truncated", "overwritten", "no folder"])
def test_files_of_a_loaded_model_do_not_matter(tmp_path: Path, damage: str) -> None:
    """Engines are read, not mapped: no SIGBUS. What is broken takes nobody's place."""
    repository = tmp_path / "models"
    file = put(repository, "m", {1: image_engine()}, {}) / "1" / "model.engine"
    with serving(repository, tmp_path, "--control", "poll", "--poll", "0.2") as served:
        answers(served)
        if damage == "deleted":
            file.unlink()
        elif damage == "truncated":
            os.truncate(file, 100)
        elif damage == "overwritten":
            file.write_bytes(os.urandom(file.stat().st_size))
        else:
            shutil.rmtree(repository)
        reason = "stays" if damage == "no folder" else "cannot be loaded|is unloaded"
        served.wait_for_log(reason)
        time.sleep(0.5)
        for seed in range(3):
            answers(served, seed)
        repository.mkdir(exist_ok=True)
        put(repository, "m", {1: image_engine(1)}, {})
        served.wait_for_log("version 1 is ready(.|\n)*version 1 is ready")
        answers(served, engine=image_engine(1))


def test_a_broken_version_does_not_replace_one_that_works(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    put(repository, "m", {1: image_engine()}, {})
    with serving(repository, tmp_path, "--control", "poll", "--poll", "0.2") as served:
        whole = (repository / "m" / "1" / "model.engine").read_bytes()
        (repository / "m" / "2").mkdir()
        (repository / "m" / "2" / "model.engine").write_bytes(whole[: len(whole) // 2])
        served.wait_for_log("version 2 cannot be loaded")
        assert states(served)["m/2"][0] == "UNAVAILABLE"
        assert states(served)["m/1"] == ("READY", "")
        answers(served)
        assert served.get("/v2/health/ready")[0] == 200
        put(repository, "m", {2: image_engine(1)})
        served.wait_for_log("version 2 is ready")
        answers(served, engine=image_engine(1))
        assert served.log.count("version 2 cannot be loaded") < 4, "once for each change"


def test_dribbling_clients_hold_nobody_up(served: Served) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(served)) for _ in range(20)]
        began = time.monotonic()
        for byte in GOOD[:60]:
            for each in slow:
                each.sendall(byte.encode())
        answers(served)
        assert time.monotonic() - began < 5
        for each in slow:
            each.sendall(GOOD[60:].encode())
        for each in slow:
            assert each.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_clients_that_hang_up_are_forgotten(tmp_path: Path) -> None:
    """While their requests wait, or are computed: nothing is left in the queue."""
    put(tmp_path / "models", "m", {1: image_engine()}, WAITING)
    with serving(tmp_path / "models", tmp_path) as served:
        for _ in range(3):
            for _ in range(20):
                with connect(served) as client:
                    client.sendall(GOOD.encode())
            for _ in range(20):
                with connect(served) as client:
                    client.sendall(GOOD[:-10].encode())
        wait_for(lambda: queued(served) == 0)
        answers(served)
        assert served.get("/v2/health/ready")[0] == 200


def test_a_thousand_connections(tmp_path: Path) -> None:
    """All idle ones stay, and each is answered; the usual limit of a shell is raised for them."""
    put(tmp_path / "models", "m", {1: image_engine()}, {"execution": "thread"})
    with ExitStack() as stack:
        limits = "-S -n 256"
        served = stack.enter_context(serving(tmp_path / "models", tmp_path, limits=limits))
        clients = [stack.enter_context(connect(served)) for _ in range(1000)]
        answers(served)
        for each in clients:
            each.sendall(GOOD.encode())
        for each in clients:
            assert each.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_no_file_descriptors_left(tmp_path: Path) -> None:
    """Connections beyond the limit wait or are closed; when others end, the server answers."""
    put(tmp_path / "models", "m", {1: image_engine()}, {})
    with serving(tmp_path / "models", tmp_path, limits="-n 64") as served:
        with ExitStack() as stack:
            clients = [stack.enter_context(connect(served)) for _ in range(150)]
            time.sleep(0.5)
            del clients
        wait_for(lambda: _answered(served))
        answers(served)


def _answered(served: Served) -> bool:
    try:
        return served.get("/v2/health/live")[0] == 200
    except OSError:
        return False


def test_a_client_that_never_reads_costs_bounded_memory(served: Served) -> None:
    """It sends requests without end; the server stops to read them."""

    def rss_bytes() -> int:
        pages = Path(f"/proc/{served.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    answers(served)
    before = rss_bytes()
    with connect(served) as client:
        client.settimeout(2)
        sent = 0
        try:
            while sent < 64 << 20:
                sent += client.send((GOOD * 50).encode())
        except TimeoutError:
            pass
        answers(served)
        assert sent < 32 << 20
        assert rss_bytes() - before < 32 << 20
    answers(served)


def test_two_servers_share_a_cache_and_build_once(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m" / "1"
    folder.mkdir(parents=True)
    shutil.copy(onnx_file(tmp_path), folder / "model.onnx")
    for name in "ab":
        (tmp_path / name).mkdir()
    cache = ("--cache", str(tmp_path / "cache"))
    with (
        starting(tmp_path / "models", tmp_path / "a", *cache) as a,
        starting(tmp_path / "models", tmp_path / "b", *cache) as b,
    ):
        bodies = [_matrix_answer(each) for each in (a, b)]
        assert bodies[0] == bodies[1]
        builds = [p for p in (tmp_path / "cache" / "builds").iterdir() if p.is_dir()]
        assert len(builds) == 1
        assert [each.stop() for each in (a, b)] == [0, 0]


def _matrix_answer(served: Served) -> Any:
    served.wait_for_log("model m, version 1 is ready", 60)
    x = np.arange(64, dtype=np.float32)[None]
    with http_library.InferenceServerClient(served.http) as client:
        return client.infer("m", tensors(http_library, {"x": x})).as_numpy("y").tolist()


def test_a_build_that_is_killed_is_refused_and_tried_again(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    put(repository, "m", {1: image_engine()}, {})
    (repository / "other" / "1").mkdir(parents=True)
    shutil.copy(onnx_file(tmp_path), repository / "other" / "1" / "model.onnx")
    options = ("--control", "explicit", "--load", "m")
    with serving(repository, tmp_path, *options) as served:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(load(served, "other")))
        thread.start()
        wait_for(lambda: any(os.getpgid(child) == child for child in children(served.pid)))
        os.killpg(children(served.pid)[0], signal.SIGKILL)
        thread.join(30)
        assert "ended with code -9" in str(found[0])
        answers(served)
        assert load(served, "other") is None
        assert states(served)["other/1"] == ("READY", "")


def load(served: Served, name: str) -> Exception | None:
    """Asks for it; the refusal."""
    with http_library.InferenceServerClient(served.http, network_timeout=60) as client:
        try:
            client.load_model(name)
        except http_library.InferenceServerException as e:
            return e
    return None


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    lines = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(each) for line in lines for each in line.split()]


def test_a_full_disk_refuses_the_version_that_has_to_be_built(tmp_path: Path) -> None:
    """No file of the server may grow beyond 16 KB; the engine that is there is served."""
    repository = tmp_path / "models"
    put(repository, "m", {1: image_engine()}, {})
    (repository / "other" / "1").mkdir(parents=True)
    shutil.copy(onnx_file(tmp_path), repository / "other" / "1" / "model.onnx")
    with serving(repository, tmp_path, limits="-f 32") as served:
        state, reason = states(served)["other/1"]
        assert state == "UNAVAILABLE"
        assert re.search(r"could be built|cannot be written", reason)
        answers(served)
        builds = tmp_path / "cache" / "builds"
        assert [path.name for path in builds.iterdir() if path.is_dir()] == []
        assert json.loads(served.get("/v2/health/ready")[1]) == {"ready": False}

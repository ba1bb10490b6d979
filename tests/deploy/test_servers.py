"""Two real servers behind nginx, one of which is stopped under load; and what manifests call."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import typer

from tests.deploy.balancer import balancer
from tests.deploy.test_containerfile import arguments
from tests.deploy.test_manifests import container
from tests.deploy.test_monitoring import EXPRESSIONS, selectors
from tests.ports import free_ports
from tests.serve.engines import image, image_engine
from twofour.cli import app
from twofour.runtime.session import Session

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
LOAD_S = 4.0
CLIENTS = 4


def image_arguments() -> list[str]:
    return list(json.loads(arguments("CMD")[0]))


@pytest.mark.parametrize(
    "called",
    [
        image_arguments(),
        container("kubernetes.yaml")["args"],
        container("kserve.yaml")["args"],
    ],
    ids=["Containerfile", "kubernetes.yaml", "kserve.yaml"],
)
def test_the_command_takes_what_they_give_it(called: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    parsed = command.commands["serve"].make_context("serve", list(map(str, called)))
    assert parsed.params["host"] == "0.0.0.0"


@contextmanager
def serving(repository: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """`twofour serve` as a process: it, and its ports."""
    http, grpc = free_ports(2)
    code = "from twofour.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(repository), "--cache", str(log.parent)]
    command += ["--http", str(http), "--grpc", str(grpc), "--drain", "10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        _wait_ready(process, http, log)
        yield process, http, grpc
    finally:
        process.terminate()
        process.wait(30)


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(f"the server does not get ready: {log.read_text()[-4000:]}")


def ask(module: Any, address: str, until: float, seed: int) -> tuple[int, list[str]]:
    """Asks until then; how many right answers came, and what went wrong."""
    feeds = image(1 + seed % 3, seed)
    with Session(image_engine()) as session:
        expected = session.run(feeds)["y"]
    tensor = module.InferInput("x", feeds["x"].shape, "FP32")
    tensor.set_data_from_numpy(feeds["x"])
    right, wrong = 0, []
    with module.InferenceServerClient(address) as client:
        while time.monotonic() < until:
            try:
                answer = client.infer("image", [tensor]).as_numpy("y")
            except (module.InferenceServerException, OSError) as e:
                wrong.append(str(e))
                continue
            if np.array_equal(answer, expected):
                right += 1
            else:
                wrong.append("another answer than the engine's")
    return right, wrong


def test_a_server_that_goes_loses_no_request(tmp_path: Path) -> None:
    version = tmp_path / "repository" / "image" / "1"
    version.mkdir(parents=True)
    image_engine().save(version / "image.engine")
    with ExitStack() as stack:
        logs = [tmp_path / "one" / "log", tmp_path / "two" / "log"]
        for log in logs:
            log.parent.mkdir()
        servers = [stack.enter_context(serving(version.parents[1], log)) for log in logs]
        (one, *first), (_, *second) = servers
        (tmp_path / "nginx").mkdir()
        ports = (first[0], second[0]), (first[1], second[1])
        http, grpc = stack.enter_context(balancer(tmp_path / "nginx", *ports)).split()
        until = time.monotonic() + LOAD_S
        with ThreadPoolExecutor(CLIENTS) as pool:
            kinds = [(http_client, http), (grpc_client, grpc)] * (CLIENTS // 2)
            asked = [pool.submit(ask, *kind, until, i) for i, kind in enumerate(kinds)]
            time.sleep(LOAD_S / 2)
            page = urllib.request.urlopen(f"http://127.0.0.1:{second[0]}/metrics", timeout=5).read()
            one.send_signal(signal.SIGTERM)
            results = [each.result() for each in asked]
        assert one.wait(20) == 0, logs[0].read_text()[-4000:]
    asked_for = {name for each in EXPRESSIONS for name, _ in selectors(each)} - {"up"}
    assert [name for name in asked_for if name.encode() not in page] == []
    assert [wrong for _, wrong in results] == [[]] * CLIENTS
    assert all(right > 0 for right, _ in results)
    assert not re.search(r"Traceback", logs[0].read_text() + logs[1].read_text())

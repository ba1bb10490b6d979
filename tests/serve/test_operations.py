"""A server with its tokens, metrics, log and status page as one process has them."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.engines import image_engine
from tests.serve.test_page import Shown, needs_browser
from tests.serve.test_page import browser as browser

USER, ADMIN = "user-0123456789abcdef", "admin-0123456789abcdef"
LABELS = ("model", "version", "result", "reason")


@dataclass(frozen=True)
class Process:
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str, token: str = USER, body: bytes | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, body)
        if token:
            request.add_header("authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()

    def infer(self, shape: list[int]) -> tuple[int, bytes]:
        count = math.prod(shape)
        tensor = {"name": "x", "datatype": "FP32", "shape": shape, "data": [0.5] * count}
        body = json.dumps({"id": "my-id", "inputs": [tensor]}).encode()
        return self.get("/v2/models/small/infer", body=body)

    def samples(self) -> dict[str, float]:
        text = self.get("/metrics")[1].decode()
        return {
            " ".join([sample.name, *filter(None, map(sample.labels.get, LABELS))]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("operations")
    (folder / "models/small/1").mkdir(parents=True)
    image_engine().save(folder / "models/small/1/small.engine")
    for name, token in (("users", USER), ("admins", ADMIN)):
        (folder / name).write_text(token + "\n")
        (folder / name).chmod(0o600)
    command = [sys.executable, "-m", "twofour", "serve", str(folder / "models"), "--http", "0"]
    command += ["--grpc", "-1", "--cache", str(folder / "cache"), "--log", "json", "--log-requests"]
    command += ["--tokens", str(folder / "users"), "--control-tokens", str(folder / "admins")]
    command += ["--control", "explicit", "--load", "small", "--name", "ops"]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stderr=out, stdout=subprocess.DEVNULL)
    try:
        port = waited(lambda: re.search(r'"HTTP at 127\.0\.0\.1:(\d+)"', log.read_text()), log)[1]
        server = Process(f"http://127.0.0.1:{port}", log, process)
        waited(lambda: server.get("/v2/health/ready", token="")[0] == 200, log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            process.kill()


def waited(found: Callable[[], Any], log: Path) -> Any:
    """What `found` gives once that is something."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.1)
    raise AssertionError(f"it never came; the log: {log.read_text()}")


def test_metrics_count_what_was_asked(server: Process) -> None:
    before = server.samples()
    for rows in (1, 2, 4):
        status, body = server.infer([rows, 4, 6, 6])
        assert status == 200, body
    assert server.infer([1, 5, 6, 6])[0] == 400
    assert server.get("/v2", token="")[0] == 401
    assert server.get("/v2/models/nobody/infer", body=b'{"inputs": []}')[0] in (400, 404)
    after = server.samples()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("twofour_requests_total small 1 ok") == 3
    assert more("twofour_requests_total small 1 malformed") == 1
    assert more("twofour_request_compute_seconds_count small 1") == 3
    assert more("twofour_batch_rows_sum small 1") == 7
    assert more("twofour_refused_total unauthenticated") == 1
    assert after["twofour_model_ready small 1"] == 1
    assert after["twofour_ready"] == 1
    assert after["twofour_model_memory_bytes small 1"] > 0
    assert not any("nobody" in name for name in after)


def test_requests_are_in_the_log_with_their_ids_and_no_token(server: Process) -> None:
    server.infer([3, 4, 6, 6])

    def line() -> dict[str, Any] | None:
        lines = [json.loads(each) for each in server.log.read_text().splitlines()]
        found = [each for each in lines if each.get("rows") == 3]
        return found[0] if found else None

    found = waited(line, server.log)
    assert (found["request_id"], found["status"], found["model"]) == ("my-id", 200, "small")
    parts = sum(found[f"{name}_ms"] for name in ("queue", "assembly", "compute", "output"))
    assert parts == pytest.approx(found["total_ms"], abs=0.01)
    assert USER not in server.log.read_text()
    assert ADMIN not in server.log.read_text()


def test_control_takes_its_own_token_and_counters_go_on(server: Process) -> None:
    server.infer([1, 4, 6, 6])
    count = server.samples()["twofour_requests_total small 1 ok"]
    for way in ("unload", "load"):
        path = f"/v2/repository/models/small/{way}"
        assert server.get(path, body=b"{}", token="")[0] == 401
        assert server.get(path, body=b"{}")[0] == 403
        status, body = server.get(path, token=ADMIN, body=b"{}")
        assert status == 200, body
        assert server.samples()["twofour_requests_total small 1 ok"] == count
    server.infer([1, 4, 6, 6])
    assert server.samples()["twofour_requests_total small 1 ok"] == count + 1


def test_the_document_needs_a_token_and_the_page_does_not(server: Process) -> None:
    assert server.get("/v2/status", token="")[0] == 401
    document = json.loads(server.get("/v2/status?since=0")[1])
    (version,) = document["models"][0]["versions"]
    assert (document["server"]["name"], version["state"]) == ("ops", "READY")
    assert version["share"] == 1
    assert version["memory_bytes"] > 0
    assert server.get("/page/", token="")[0] == 200
    assert server.get("/page/../app.py", token="")[0] == 404


@needs_browser
def test_the_page_of_a_real_server(server: Process, browser: Browser) -> None:
    for _ in range(20):
        server.infer([1, 4, 6, 6])
    shown = Shown(browser, server.url + "/")
    page = shown.page
    assert page.url.startswith(server.url + "/page/")
    page.locator("#token").fill(USER)
    page.locator("#access button").click()
    page = shown.ready()
    expect(page.locator("h1")).to_have_text("ops")
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#detail h2")).to_have_text("small version 1")
    page.wait_for_selector("svg[aria-label='Compute'] rect", timeout=10_000)
    assert [text for text in shown.said if "401" not in text] == []
    assert all(asked.startswith(server.url) for asked in shown.asked)
    page.close()

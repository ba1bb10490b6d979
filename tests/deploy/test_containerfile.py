"""The container file, as far as it can be tried without a container engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "Containerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """INSTRUCTION, arguments; continued lines joined, comments left out."""
    lines = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined]


def arguments(name: str) -> list[str]:
    return [text for word, text in instructions() if word == name]


def test_only_known_instructions() -> None:
    known = "FROM WORKDIR COPY RUN USER ENV EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD".split()
    assert {word for word, _ in instructions()} == set(known)


def test_what_is_copied_is_there_and_makes_the_wheel() -> None:
    copied = {
        name
        for text in arguments("COPY")
        if not text.startswith("--from")
        for name in text.split()[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "twofour"} <= copied


def test_the_image_has_the_server_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [text for text in arguments("RUN") if "pip install" in text]
    assert len(installs) == 1
    assert re.findall(r"\[(\w+)\]", installs[0]) == ["serve"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    assert not [each for each in wanted if each.startswith(("torch", "openvino", "nncf"))]


def test_it_stops_as_the_server_wants_and_is_not_root() -> None:
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert arguments("USER")[-1].partition(":")[0] not in ("", "0", "root")
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["twofour", "serve"]  # PID 1 gets the signal


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers every GET with `status`: its port, and the paths it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, paths
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (400, False)])
def test_the_health_check(status: int, healthy: bool) -> None:
    (text,) = arguments("HEALTHCHECK")
    command = json.loads(text.partition(" CMD ")[2])
    port = json.loads(arguments("CMD")[0])[4]
    with answering(status) as (mine, paths):
        code = command[2].replace(f":{port}/", f":{mine}/")
        assert code != command[2]
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
    assert (done.returncode == 0) == healthy
    assert paths == ["/v2/health/ready"]

"""Servers that are measured, ours and others', as processes on free ports; and loads on them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.files import Served

START = Path(__file__).parents[1] / "serve_peers" / "start.py"
READY_S = 120.0


@dataclass(frozen=True)
class Running:
    """A server that is ready.

    Attributes:
        http: its URL.
        grpc: its URL; "" where it speaks none.
    """

    http: str
    grpc: str = ""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ours(models: Mapping[str, tuple[Served, dict[str, Any]]], folder: Path) -> Iterator[Running]:
    """`twofour serve` on engines.

    Args:
        models: name -> network and configuration.
        folder: for the repository; made anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, (served, config) in models.items():
        (folder / name / "1").mkdir(parents=True)
        os.link(served.engine, folder / name / "1" / served.engine.name)
        (folder / name / "config.yaml").write_text(json.dumps(config))
    http, grpc = free_port(), free_port()
    command = [sys.executable, "-m", "twofour", "serve", str(folder), "--log-level", "warning"]
    command += ["--http", str(http), "--grpc", str(grpc)]
    with _process(command, http):
        yield Running(f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}")


@contextmanager
def other(kind: str, model: Path, name: str, python: str) -> Iterator[Running]:
    """FastAPI, MLServer or Triton on an ONNX file.

    Args:
        kind: as `serve_peers/start.py` names it.
        model: the file.
        name: of the model.
        python: of an environment that has the server.
    """
    http, grpc = free_port(), free_port()
    command = [python, str(START), kind, str(model), "--name", name]
    command += ["--http", str(http), "--grpc", str(grpc)]
    with _process(command, http):
        speaks = "" if kind == "fastapi" else f"grpc://127.0.0.1:{grpc}"
        yield Running(f"http://127.0.0.1:{http}", speaks)


@contextmanager
def _process(command: Sequence[str], port: int) -> Iterator[None]:
    """A process that is ready, and is told to end at the end."""
    plain = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    ours_ = command[0] == sys.executable
    process = subprocess.Popen(
        command, env=None if ours_ else plain, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(process, port)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"a server did not become ready: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]


def load(targets: Sequence[tuple[str, str]], *options: str) -> list[dict[str, Any]]:
    """Results of `twofour bench --url`, the targets in turns.

    Args:
        targets: (URL, model) of each.
        options: of the command.
    """
    command = [sys.executable, "-m", "twofour", "bench", "--json", *options]
    for url, model in targets:
        command += ["--url", url, "--model", model]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return results

"""`twofour serve` as a process of its own, for tests: started, awaited, stopped, its log judged."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofour.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
STOP_S = 40.0


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        process: of the server.
        log_file: where its log goes.
        http, grpc: HOST:PORT.
    """

    process: subprocess.Popen[bytes]
    log_file: Path
    http: str
    grpc: str

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """All that it has logged so far."""
        return self.log_file.read_text()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a page."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=20) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()

    def wait_for_log(self, pattern: str, seconds: float = 20) -> None:
        wait_for(lambda: re.search(pattern, self.log) is not None, seconds, pattern)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


def wait_for(come: Callable[[], bool], seconds: float = 20, what: str = "") -> None:
    """Waits until something is so, and fails when it takes too long."""
    end = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what or come}"
        time.sleep(0.02)


def put(repository: Path, model: str, engines: Mapping[int, Engine], config: Any = None) -> Path:
    """Writes a model into a repository, its configuration last; JSON is YAML."""
    folder = repository / model
    for number, engine in engines.items():
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
        engine.save(folder / str(number) / "model.engine")
    if config is not None:
        (folder / "config.yaml").write_text(json.dumps(config))
    return folder


@contextmanager
def starting(
    repository: Path | str, folder: Path, *options: str, limits: str = ""
) -> Iterator[Served]:
    """A server that listens, its models perhaps not loaded yet; it is killed in the end.

    Args:
        repository: served.
        folder: for its log and its cache.
        options: of the command.
        limits: of the shell's `ulimit`, as "-n 64".
    """
    log_file = folder / "server.log"
    words = [sys.executable, "-m", "twofour", "serve", str(repository), "--http", "0"]
    words += ["--grpc", "0", "--cache", str(folder / "cache"), *options]
    if limits:
        words = ["sh", "-c", f'ulimit {limits}; exec "$0" "$@"', *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log_file.open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        wait_for(
            lambda: process.poll() is not None or "gRPC at" in log_file.read_text(),
            START_S,
            "the ports",
        )
        text = log_file.read_text()
        ports = [re.search(rf"{name} at (\S+:\d+)", text) for name in ("HTTP", "gRPC")]
        assert all(ports), text
        yield Served(process, log_file, *(found.group(1) for found in ports if found))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def serving(
    repository: Path | str, folder: Path, *options: str, limits: str = ""
) -> Iterator[Served]:
    """A server that is ready; in the end it stops in order, and its log shows no failure."""
    with starting(repository, folder, *options, limits=limits) as served:
        wait_for(lambda: served.process.poll() is not None or is_ready(served), START_S, "ready")
        assert served.process.poll() is None, served.log
        yield served
        assert served.process.poll() is None, f"the server ended by itself:\n{served.log}"
        assert served.stop() == 0, served.log
        assert "Traceback" not in served.log, served.log


def is_ready(served: Served) -> bool:
    """The log tells: so TLS and tokens do not matter."""
    return "all models that can be loaded are" in served.log

"""Engines built by the server: `twofour build` in a process of its own, the result kept.

The key of a result is all that it depends on: the ONNX file and what lies beside it, the arguments,
this machine's target and GPUs, and the version of this package. So a second start builds nothing,
and servers that share a cache build each engine once: the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from twofour.core.errors import Error, InputError
from twofour.core.gpus import read_gpus
from twofour.core.target import host_target
from twofour.core.version import __version__
from twofour.engine import Engine
from twofour.serve.repository.arguments import options
from twofour.serve.repository.cache import Cache, Stop, check_wanted
from twofour.serve.repository.config import Build
from twofour.serve.repository.layout import ONNX, VersionEntry
from twofour.serve.repository.store import sha256_of

_ENGINE, _LOG = "model.engine", "build.log"
_POLL_S = 0.1
_LOG_BYTES = 4000
_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Job:
    """An engine to build.

    Attributes:
        title: of the version, for messages.
        model: the ONNX file, absolute.
        options: of `twofour build`, checked.
        timeout_s: a build that takes longer is given up.
        key: of the result.
    """

    title: str
    model: Path
    options: tuple[str, ...]
    timeout_s: int
    key: str


class Builds:
    """Built engines in a cache folder, and the way to get one that is not there.

    Args:
        cache: folder; several servers may share it.
        most_cached_bytes: of the engines in it; what was not used for longest goes first.

    Raises:
        InputError: the folder cannot be made, or others may write to it.
    """

    def __init__(self, cache: Path, most_cached_bytes: int = 16 << 30) -> None:
        """Builds nothing yet."""
        self._cache = Cache(cache / "builds", most_cached_bytes)

    def has(self, job: Job) -> bool:
        """Whether the result is there already; whether it is whole is seen when it is read."""
        return (self._cache.folder / job.key / _ENGINE).is_file()

    def engine(self, job: Job, stop: Stop | None = None) -> Engine:
        """The engine, from the cache, or built now: that takes seconds to minutes.

        Args:
            job: what to build.
            stop: kills the process that builds.

        Raises:
            InputError: the command fails, with the end of what it printed; or takes too long.
            Error: `stop` was set.
        """
        wanted = stop or Stop()
        loaded: list[Engine] = []

        def is_whole(folder: Path) -> bool:
            try:
                loaded[:] = [Engine.load(folder / _ENGINE)]
            except Error:
                return False
            return True

        with self._cache.entry(job.key, is_whole, partial(_build, job, wanted), wanted):
            return loaded[0]


def job_of(version: VersionEntry, folder: Path, build: Build, stop: Stop) -> Job:
    """The job of building a version's engine; reads and hashes all that it is made of.

    Args:
        version: of a snapshot.
        folder: with its files.
        build: the section of the model's configuration.
        stop: ends reading.

    Raises:
        InputError: no ONNX file, or several; arguments that are not allowed.
        OSError: a file cannot be read.
        Error: `stop` was set.
    """
    folder = folder.resolve()
    model = folder / _onnx_of(version)
    checked = options(build.arguments, version.sources, folder)
    plain: dict[str, Any] = {
        "files": {name: sha256_of(folder / name, stop) for name in version.sources},
        "model": model.name,
        "arguments": build.arguments,
        "target": host_target().to_json(),
        "version": __version__,
    }
    if any("cuda" in word for word in build.arguments):
        plain["gpus"] = [asdict(gpu) for gpu in read_gpus()]
    key = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return Job(version.title, model, tuple(checked), build.timeout_s, key)


def _onnx_of(version: VersionEntry) -> str:
    """The one ONNX file, or model.onnx of several.

    Raises:
        InputError: none, or it is not clear which.
    """
    found = [name for name in version.sources if name.endswith(ONNX)]
    usual = f"model{ONNX}"
    if len(found) == 1 or usual in found:
        return found[0] if len(found) == 1 else usual
    reason = f"expected one {ONNX} file, got {', '.join(found) or 'none'}"
    fix = f"put the model's {ONNX} file into the version's folder; of several, call one {usual}"
    raise InputError(f"no engine of {version.title} can be built", [reason], fix)


def _build(job: Job, stop: Stop, folder: Path, lock: int) -> None:
    """Runs the command in an empty folder. It holds the lock too, so that nobody builds beside it.

    Raises:
        InputError: it failed or took too long.
        Error: `stop` was set.
    """
    output = folder.resolve() / _ENGINE
    words = ["build", *job.options, f"--output={output}", "--", os.fspath(job.model)]
    last = time.monotonic() + job.timeout_s
    with (folder / _LOG).open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", os.fspath(_CHILD), *words],
            cwd=folder,
            stdin=subprocess.PIPE,  # see child.py
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            process_group=0,
        )
    try:
        while child.poll() is None:
            check_wanted(stop, f"building {job.title}")
            if time.monotonic() > last:
                raise _failure(job, folder, f"twofour build took longer than {job.timeout_s} s")
            stop.wait(_POLL_S)
    finally:
        _end(child)
    if child.returncode or not output.is_file():
        raise _failure(job, folder, f"twofour build ended with code {child.returncode}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it started, and waits for it."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.stdin is not None:
        child.stdin.close()


def _failure(job: Job, folder: Path, reason: str) -> InputError:
    """With the end of what the command printed."""
    with (folder / _LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    words = ["twofour", "build", *job.options, "-o", "E.engine", "--", job.model.name]
    fix = f"see that this works: {shlex.join(words)}"
    printed = [line for line in lines if line.strip()]
    return InputError(f"no engine of {job.title} could be built", [reason, *printed], fix)

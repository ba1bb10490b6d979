"""Runs cases, each in a forked process that may crash, hang or ask for too much memory.

    python -m tests.fuzz.worker < lines of paths > lines of JSON

A line in is the path of a file; a line out says how the case ended:

    {"end": "passed" | "refused" | "bug" | "crash" | "hang", "stage": ..., "text": ...}

`refused` is an Error of ours that says something. All that is imported is imported before the first
fork, and nothing here starts a thread, so that a child is whole.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # noqa: F401 - read before the first fork

from twofour.compiler import profile
from twofour.compiler.build import build
from twofour.compiler.survey import survey
from twofour.core.errors import Error
from twofour.onnx_tools.inspect import inspect
from twofour.onnx_tools.load import load_model, save_model
from twofour.runtime.session import Session

MEMORY_BYTES = 6 << 30  # of addresses: a child begins with about 1.5 GB
CPU_S, WALL_S = 60, 240
_RUN_BYTES = 64 << 20  # larger inputs are not made up


def main() -> None:
    """One case a line until the input ends."""
    profile.LONGEST_S = 3.0
    for line in sys.stdin:
        print(json.dumps(judged(Path(line.strip()))), flush=True)


def judged(path: Path) -> dict[str, Any]:
    """Runs one case in a child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(path, writer)
    os.close(writer)
    said, ended = _read(reader, time.monotonic() + WALL_S)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    lines = said.decode().splitlines()
    stage = json.loads(lines[-1]).get("stage", "") if lines else ""
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if not ended or killed == signal.SIGXCPU:
        return {"end": "hang", "stage": stage, "text": f"more than {CPU_S} s of CPU, or {WALL_S} s"}
    if killed:
        return {"end": "crash", "stage": stage, "text": signal.Signals(killed).name}
    if not lines or "end" not in json.loads(lines[-1]):
        return {"end": "crash", "stage": stage, "text": f"status {status}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _read(reader: int, until: float) -> tuple[bytes, bool]:
    """What the child says, and whether it ended in time."""
    said = b""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return said, False
        part = os.read(reader, 1 << 16)
        if not part:
            return said, True
        said += part


def _child(path: Path, writer: int) -> None:
    """Never returns."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    stage = ["start"]

    def say(**parts: str) -> None:
        os.write(writer, json.dumps(parts).encode() + b"\n")

    try:
        _case(path, stage, say)
        say(end="passed", stage=stage[0], text="")
    except Error as error:
        end = "refused" if error.what.strip() and str(error).strip() else "bug"
        say(end=end, stage=stage[0], text=f"{type(error).__name__}: {error}"[:4000])
    except BaseException:  # noqa: BLE001 - each other exception is the finding
        say(end="bug", stage=stage[0], text=traceback.format_exc()[-6000:])
    finally:
        os._exit(0)


def _case(path: Path, stage: list[str], say: Any) -> None:
    """Load, look, save, build and run."""

    def enter(name: str) -> None:
        stage[0] = name
        say(stage=name)

    enter("load")
    model = load_model(path)
    enter("inspect")
    json.dumps(inspect(model).to_json())
    enter("survey")
    json.dumps(survey(model).to_json())
    enter("save")
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "copy.onnx")
    enter("build")
    engine = build(path, tuning_effort=0)
    enter("session")
    random = np.random.default_rng(0)
    with Session(engine) as session:
        sizes = [np.prod(t.usual_shape, dtype=float) * 8 for t in session.inputs]
        if sum(sizes) <= _RUN_BYTES:
            enter("run")
            feeds = {t.name: _values(t.dtype, t.usual_shape, random) for t in session.inputs}
            with session.within(3.0):  # a Loop may run for years, and be valid
                session.run(feeds)


def _values(dtype: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    values = random.normal(size=shape) * (3 if dtype.startswith(("int", "uint")) else 1)
    return np.asarray(np.abs(values) if dtype.startswith("uint") else values).astype(dtype)


if __name__ == "__main__":
    main()

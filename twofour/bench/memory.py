"""Peak resident memory of a process that does nothing but load an engine and run it.

    found = peak_memory("resnet20.engine")
    found.peak_bytes, found.before_bytes

A fresh process is started, since the memory of this one holds whatever was done before. It imports
the runtime, loads, and runs; the kernel keeps the most that it ever held (VmHWM). Its input counts,
too, as it does for everyone who runs a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twofour.bench.declared import random_feeds
from twofour.bench.timing import Feeds
from twofour.core.errors import UnsupportedError
from twofour.engine import TensorInfo, read_plan

_TIMEOUT_S, _RUNS = 600.0, 3
_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process.

    Attributes:
        peak_bytes: the most that it held: interpreter, runtime, engine, input and outputs.
        before_bytes: that it held before the engine was loaded: interpreter and runtime alone.
    """

    peak_bytes: int
    before_bytes: int

    @property
    def engine_bytes(self) -> int:
        """What loading and running the engine adds."""
        return self.peak_bytes - self.before_bytes


def peak_memory(
    engine: str | Path,
    feeds: Feeds | None = None,
    threads: int | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> Memory:
    """Measures.

    Args:
        engine: its file.
        feeds: the input; by default random, of the usual shapes.
        threads: by default as many as the engine was tuned for.
        timeout_s: the process is ended after so long.

    Raises:
        InputError, EngineError: there is no such engine, or it is none.
        UnsupportedError: the process could not run it; or the system does not tell its memory.
    """
    plan = read_plan(engine)
    if feeds is None:
        feeds = random_feeds(
            [TensorInfo(each.name, each.dtype, each.usual_shape) for each in plan.inputs]
        )
    with tempfile.TemporaryDirectory() as folder:
        for index, array in enumerate(feeds.values()):
            np.save(Path(folder) / f"{index}.npy", array, allow_pickle=False)
        request = {
            "engine": str(Path(engine).resolve()),
            "inputs": {name: f"{folder}/{index}.npy" for index, name in enumerate(feeds)},
            "threads": threads,
            "runs": _RUNS,
        }
        return _asked(request, str(engine), timeout_s)


def _asked(request: Mapping[str, object], engine: str, timeout_s: float) -> Memory:
    """Of the fresh process."""
    what, fix = f"cannot measure the memory of {engine}", "does twofour run of it work?"
    command = [sys.executable, "-P", "-m", "twofour.bench.memory_child", json.dumps(request)]
    path = os.pathsep.join([str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as e:
        raise UnsupportedError(what, [f"it did not end within {timeout_s:g} s"], fix) from e
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:] or ["it said nothing"]
        raise UnsupportedError(what, [f"its process ended with {done.returncode}", *last], fix)
    found = json.loads(done.stdout.splitlines()[-1])
    return Memory(found["peak_bytes"], found["before_bytes"])

"""Contestants in processes of their own, which take turns.

PyTorch and our engines never share a process: what goes wrong on a GPU ends the process that did
it. The parent says whose turn it is; the others have nothing under way meanwhile.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.cuda.machine import counters
from twofour.bench.energy import Energy, measure

Array = NDArray[Any]

WARM_S = 0.02
_LATENCIES = 50


@dataclass(frozen=True)
class Entry:
    """A contestant, inside its process.

    Attributes:
        name: as the table shows it.
        setting: how it was set up, in words.
        launch: starts one inference of inputs that are where they have to be.
        wait: until all that was started is done.
        outputs: of one inference, in the model's order.
        memory_bytes: weights, activations and what it works with; None where nobody counts.
        note: what else is to be said; "" for nothing.
    """

    name: str
    setting: str
    launch: Callable[[], object]
    wait: Callable[[], object]
    outputs: Callable[[], list[Array]]
    memory_bytes: int | None = None
    note: str = ""


class Side(Protocol):
    """What a process does."""

    def files(self, network: str) -> None:
        """Prepares what does not depend on the batch."""

    def open(self, network: str, batch: int, kind: str) -> list[Entry]:
        """Contestants of one kind, ready to be timed."""

    def close(self) -> None:
        """Forgets what was opened."""


@dataclass(frozen=True)
class Lost:
    """Why a request has no answer."""

    reason: str


class Process:
    """A side in a process of its own.

    Args:
        make: of the side, called there; can be pickled.
        name: for messages.
        log: what the process prints goes to its end.

    Attributes:
        starts: how often it was started: what was open before the last start is gone.
    """

    def __init__(self, make: Callable[[], Side], name: str, log: Path) -> None:
        """Starts it."""
        self.make, self.name, self.log = make, name, log
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.make, theirs, self.log))
        self.process.start()
        theirs.close()

    def send(self, *request: Any) -> None:
        """Asks; `receive` has the answer."""
        try:
            self.connection.send(request)
        except OSError:
            self._start()
            self.connection.send(request)

    def receive(self, timeout_s: float) -> Any:
        """The answer, or `Lost`; a process that takes longer is ended, and a new one started."""
        reason = f"not done within {timeout_s:.0f} s"
        try:
            if self.connection.poll(timeout_s):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"the process of {self.name} ended with code {self.process.exitcode}"
        self._say_where()
        self.end()
        self._start()
        return Lost(reason)

    def _say_where(self) -> None:
        """Lets the process print to its log what it is at."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
            self.process.join(0.5)

    def ask(self, *request: Any, timeout_s: float) -> Any:
        """Both."""
        self.send(*request)
        return self.receive(timeout_s)

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join(10)
        self.connection.close()


def _serve(make: Callable[[], Side], connection: Connection, log: Path) -> None:
    """Answers until the other end closes."""
    with log.open("a", buffering=1) as file:
        sys.stdout = sys.stderr = file
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        held = _Held(make())
        while True:
            try:
                request, *arguments = connection.recv()
            except (EOFError, OSError):
                return
            began = time.perf_counter()
            try:
                answer = getattr(held, request)(*arguments)
            except Exception as error:  # noqa: BLE001  # the table says what went wrong
                traceback.print_exc()
                lines = str(error).strip().splitlines()
                answer = Lost(f"{type(error).__name__}: {' '.join(lines[:3])[:400]}")
            print(request, *arguments, f"{time.perf_counter() - began:.1f} s", answer)
            connection.send(answer)


class _Held:
    """What is open in a process, and what can be asked of it."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.entries: dict[str, Entry] = {}

    def files(self, network: str) -> None:
        self.side.files(network)

    def open(self, network: str, batch: int, kind: str) -> list[dict[str, Any]]:
        began = time.perf_counter()
        made = self.side.open(network, batch, kind)
        self.entries |= {each.name: each for each in made}
        seconds = time.perf_counter() - began
        return [
            {
                "name": each.name,
                "setting": each.setting,
                "note": each.note,
                "memory_bytes": each.memory_bytes,
                "prepared_s": seconds,
            }
            for each in made
        ]

    def close(self) -> None:
        self.entries.clear()
        self.side.close()
        gc.collect()

    def turn(self, name: str, seconds: float) -> float:
        """Microseconds of one of many inferences that follow each other."""
        entry = self.entries[name]
        _run(entry, WARM_S)
        runs, taken = _run(entry, seconds)
        return 1e6 * taken / runs

    def latency(self, name: str) -> float:
        """Microseconds from the start of an inference to its end, each by itself; the median."""
        entry, times = self.entries[name], []
        _run(entry, WARM_S)
        for _ in range(_LATENCIES):
            before = time.perf_counter()
            entry.launch()
            entry.wait()
            times.append(time.perf_counter() - before)
            if sum(times) > 2:
                break
        return 1e6 * float(np.median(times))

    def energy(self, name: str, seconds: float) -> dict[str, float] | Lost:
        """Joules of one inference."""
        entry = self.entries[name]
        runs, taken = _run(entry, WARM_S)
        together = max(1, int(0.1 * runs / taken))

        def call() -> None:
            for _ in range(together):
                entry.launch()
            entry.wait()

        found = measure(call, seconds, counters=counters())
        if not isinstance(found, Energy):
            return Lost(str(found))
        return {"joules": found.joules / together, "watts": found.watts}

    def outputs(self, name: str, path: Path) -> None:
        """Writes them into a file."""
        arrays = [np.asarray(each, np.float32) for each in self.entries[name].outputs()]
        np.savez(path, *arrays)


def _run(entry: Entry, seconds: float) -> tuple[int, float]:
    """Runs for some time without waiting in between: how many, and how long they took."""
    runs, ahead = 0, 1
    entry.wait()
    begin = time.perf_counter()
    while True:
        for _ in range(ahead):
            entry.launch()
        entry.wait()
        runs += ahead
        taken = time.perf_counter() - begin
        if taken >= seconds:
            return runs, taken
        # Few waits: as many as fit the rest of the time, but never the whole of a first guess.
        ahead = max(1, min(4 * runs, int(runs * (seconds - taken) / taken)))

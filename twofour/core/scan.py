"""A function of many named items: its results kept on disk, in several processes, in order.

    start(setup) -> work                 once in each process: what is slow to prepare
    work(argument) -> {"figure": ...}    once for each item

Each result is appended to the cache as soon as it is there, one line of JSON. A scan that ended
early (Ctrl-C, kill, no memory) goes on where it stood when it is started again. A result is found
by its key, which has to name everything that it depends on; so files of other scans may be the
same file.

Processes are spawned: `start` is a function of a module, or `functools.partial` of one, and a
script that asks for several processes has to be importable (`if __name__ == "__main__":`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from twofour.core.errors import Error, InputError, UnsupportedError
from twofour.core.progress import Report, silent

_ENTRY = b'{"key": '

Result = dict[str, float | None]
"""Figures by name."""
Work = Callable[[Any], Result]
Start = Callable[[], Work]


@dataclass(frozen=True)
class Item:
    """One piece of work.

    Attributes:
        name: for messages.
        key: of everything that its result depends on; see `key_of`.
        argument: of the function.
    """

    name: str
    key: str
    argument: Any


def key_of(*parts: str | int | float | bool | None) -> str:
    """The key of a result that depends on these parts: SHA-256 of them as a JSON list."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class Cache:
    """Results in a file of JSON lines, by key.

    Attributes:
        path: of the file; None for memory only.
        names: figures that a result has to have, and no others.
        results: what is known.
        damaged: lines that could not be read, and are passed over.
    """

    path: Path | None = None
    names: frozenset[str] = frozenset()
    results: dict[str, Result] = field(default_factory=dict)
    damaged: int = 0

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, names: Sequence[str]) -> Cache:
        """Reads a file, or makes an empty one, so that a wrong path is found before the work.

        Args:
            path: of the file; None for memory only.
            names: figures that a result has.

        Raises:
            InputError: it cannot be read or written, or is a file of another kind.
        """
        if path is None:
            return cls(None, frozenset(names))
        cache = cls(Path(path), frozenset(names))
        try:
            with Path(path).open("a+b") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
                _require_entries(path, lines)
                if lines[-1]:  # a line that a killed scan did not finish
                    file.write(b"\n")
        except OSError as e:
            raise InputError(
                f"cannot write the cache {path}", [str(e)], "name a file in a folder of yours"
            ) from e
        for line in filter(None, lines):
            cache._read(line)
        return cache

    def add(self, item: Item, result: Result) -> None:
        """Keeps a result, on disk by one write of one whole line."""
        self.results[item.key] = result
        if self.path is not None:
            line = json.dumps({"key": item.key, "name": item.name, "result": result})
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(handle, f"{line}\n".encode())
            finally:
                os.close(handle)

    def notes(self) -> Iterator[str]:
        """What the user should know of the file."""
        if self.damaged:
            yield f"{self.path}: {self.damaged} damaged line(s) passed over"

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        found = entry if isinstance(entry, dict) else {}
        key, result = found.get("key"), found.get("result")
        if isinstance(key, str) and isinstance(result, dict) and self._is_result(result):
            self.results[key] = result
        else:
            self.damaged += 1

    def _is_result(self, found: dict[str, Any]) -> bool:
        numbers = all(v is None or type(v) in (int, float) for v in found.values())
        return numbers and found.keys() == self.names


def _require_entries(path: str | os.PathLike[str], lines: Sequence[bytes]) -> None:
    """Refuses to append to somebody's model or data. Raises InputError."""
    if any(lines) and not any(line.startswith(_ENTRY) for line in lines):
        raise InputError(
            f"{path} is no cache of results",
            [f"expected lines that begin with {_ENTRY.decode()}, and none does"],
            "name another file, or delete this one",
        )


def scan(
    items: Sequence[Item],
    start: Start,
    cache: Cache | None = None,
    jobs: int = 1,
    report: Report = silent,
) -> tuple[Result, ...]:
    """Computes what the cache does not have.

    Args:
        items: the work; equal keys are computed once.
        start: called in each process; returns the function of an item's argument.
        cache: of results; by default none are known, and none kept.
        jobs: processes; with 1 the work is done in this one.
        report: told the items done, and how long the others will take.

    Returns:
        The results, in the order of the items.

    Raises:
        InputError: fewer than 1 job, or `start` or an argument cannot be sent to a process.
        UnsupportedError: a process ended at an item.
        Error: whatever the function raised of these, its item named.
    """
    if jobs < 1:
        raise InputError(f"cannot work in {jobs} processes", ["expected at least 1"])
    cache = Cache() if cache is None else cache
    left = {item.key: item for item in items if item.key not in cache.results}
    total = len({item.key for item in items})
    pace = _Pace(total, total - len(left), report)
    pieces = list(left.values())
    jobs = min(jobs, len(pieces))
    found = _in_processes(pieces, start, jobs) if jobs > 1 else _here(pieces, start)
    for item, result in found:
        cache.add(item, result)
        pace.done(item.name)
    return tuple(cache.results[item.key] for item in items)


class _Pace:
    """Tells how far it is, and how long it will go on at the pace so far."""

    def __init__(self, total: int, done: int, report: Report) -> None:
        self._total, self._done, self._report = total, done, report
        self._began, self._first = time.monotonic(), done
        report(done, total, f"{done} known" if done else "")

    def done(self, name: str) -> None:
        self._done += 1
        each_s = (time.monotonic() - self._began) / (self._done - self._first)
        left = in_words(each_s * (self._total - self._done))
        self._report(self._done, self._total, f"{name}, about {left} left")


def in_words(seconds: float) -> str:
    """Some seconds, minutes or hours: `40 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _here(items: Sequence[Item], start: Start) -> Iterator[tuple[Item, Result]]:
    work = start() if items else None
    for item in items:
        assert work is not None
        with _named(item):
            result = work(item.argument)
        yield item, result


@contextmanager
def _named(item: Item) -> Iterator[None]:
    try:
        yield
    except Error as e:
        raise _at(item, e) from e


def _at(item: Item, error: Error) -> Error:
    """The error with its item."""
    return type(error)(f"{item.name}: {error.what}", error.reasons, error.fix)


@dataclass
class _Worker:
    """A process, our end of the pipe to it, and the item it is at."""

    process: SpawnProcess
    pipe: Connection
    item: Item | None = None


def _in_processes(items: Sequence[Item], start: Start, jobs: int) -> Iterator[tuple[Item, Result]]:
    """Results in the order they arrive; all processes have ended when this ends."""
    pickled((start, [item.argument for item in items]))
    waiting = list(reversed(items))
    workers = [_spawn(start) for _ in range(jobs)]
    try:
        for worker in workers:
            _next(worker, waiting)
        while busy := {each.pipe: each for each in workers if each.item}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                item, result = _received(worker)
                _next(worker, waiting)
                yield item, result
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _spawn(start: Start) -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, start), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _next(worker: _Worker, waiting: list[Item]) -> None:
    worker.item = waiting.pop() if waiting else None
    if worker.item is not None:
        try:
            worker.pipe.send(worker.item.argument)
        except OSError as e:
            raise _ended(worker) from e


def _received(worker: _Worker) -> tuple[Item, Result]:
    item = worker.item
    assert item is not None
    try:
        answer = worker.pipe.recv()
    except (EOFError, OSError) as e:
        raise _ended(worker) from e
    if isinstance(answer, Error):
        raise _at(item, answer)
    return item, answer


def _ended(worker: _Worker) -> UnsupportedError:
    worker.process.join()
    code = worker.process.exitcode or 0
    name = worker.item.name if worker.item else "its start"
    return UnsupportedError(
        f"a process ended at {name}",
        [f"killed by signal {-code}" if code < 0 else f"exit code {code}; its trace stands above"],
        "use fewer jobs if memory ran out; with one job the cause is seen best",
    )


def _serve(pipe: Connection, start: Start) -> None:
    """One process: prepares, then answers until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first one ends the rest
    work = _started(start)
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        try:
            answer: Result | Error = work(argument)
        except Error as e:
            answer = e
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def _started(start: Start) -> Work:
    """The function; if it cannot be made, one that says so at the first item."""
    try:
        return start()
    except Error as e:
        return functools.partial(_refuse, e)


def _refuse(error: Error, argument: object) -> Result:
    raise error


def pickled(work: object) -> bytes:
    """Work as it is sent to another process.

    Raises:
        InputError: it cannot be sent.
    """
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise InputError(
            "the work cannot be sent to other processes",
            [str(e)],
            "name functions of a module (no lambda, no closure) and data on disk; or use one job",
        ) from e

"""A function of many named items: its results kept on disk, in several processes, in order.

    start(setup) -> work                 once in each worker: what is slow to prepare
    work(argument) -> {"figure": ...}    once for each item

Each result is appended to the cache as soon as it is there, one line of JSON. A scan that ended
early (Ctrl-C, kill, no memory) goes on where it stood when it is started again. A result is found
by its key, which has to name everything that it depends on; so files of other scans may be the
same file.

Workers are what a `Spread` makes of them: processes of this machine (`Processes`), or of those of a
cluster (`twofour/cluster`). Processes are spawned: `start` is a function of a module, or
`functools.partial` of one, and a script that asks for several processes has to be importable
(`if __name__ == "__main__":`). `arrivals` is a scan without a cache, of results of any kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from twofour.core.errors import InputError
from twofour.core.machine import usable_cores
from twofour.core.processes import AnyStart, here, in_processes, named
from twofour.core.progress import Report, silent
from twofour.core.target import Target, check_runs_here

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
        target: that code is timed for: who works at it has to be able to run that, and does nothing
            else meanwhile. None: anybody may.
    """

    name: str
    key: str
    argument: Any
    target: Target | None = None


Arrivals = Generator[tuple[Item, Any], None, None]
"""Items with their results, in the order they are there."""


class Spread(Protocol):
    """Workers that share items."""

    @property
    def jobs(self) -> int:
        """Workers at once, at most."""

    @property
    def threads(self) -> int:
        """That each of them should use."""

    def results(self, items: Sequence[Item], start: AnyStart) -> Arrivals:
        """Works at all items; no worker is left when this ends, or is closed before.

        Args:
            items: of different keys.
            start: called by each worker once; returns the function of an item's argument.

        Raises:
            InputError: `start` or an argument cannot be sent to a worker.
            UnsupportedError: workers end at an item, or no worker can run an item's target.
            Error: whatever the function raised of these, its item named.
        """


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
    *,
    spread: Spread | None = None,
) -> tuple[Result, ...]:
    """Computes what the cache does not have.

    Args:
        items: the work; equal keys are computed once.
        start: called by each worker; returns the function of an item's argument.
        cache: of results; by default none are known, and none kept.
        jobs: processes; with 1 the work is done in this one.
        report: told the items done, and how long the others will take.
        spread: workers, instead of `jobs` processes.

    Returns:
        The results, in the order of the items.

    Raises:
        InputError: fewer than 1 job, or `start` or an argument cannot be sent to a worker.
        UnsupportedError: a worker ended at an item.
        Error: whatever the function raised of these, its item named.
    """
    spread = Processes(jobs) if spread is None else spread
    cache = Cache() if cache is None else cache
    left = {item.key: item for item in items if item.key not in cache.results}
    total = len({item.key for item in items})
    pace = _Pace(total, total - len(left), report)
    if left:
        with closing(spread.results(list(left.values()), start)) as found:
            for item, result in found:
                cache.add(item, result)
                pace.done(item.name)
    return tuple(cache.results[item.key] for item in items)


def arrivals(
    items: Sequence[Item],
    start: AnyStart,
    spread: Spread | None = None,
    report: Report = silent,
) -> Arrivals:
    """Works at items whose results are no figures, such as the bytes of engines.

    Args:
        items: of different keys.
        start: called by each worker; returns the function of an item's argument.
        spread: workers; by default this process.
        report: told the items done, and how long the others will take.

    Raises:
        InputError, UnsupportedError, Error: as `Spread.results`.
    """
    spread = Processes() if spread is None else spread
    pace = _Pace(len(items), 0, report)
    with closing(spread.results(items, start)) as found:
        for item, result in found:
            pace.done(item.name)
            yield item, result


@dataclass(frozen=True)
class Processes:
    """A `Spread` over processes of this machine.

    Attributes:
        jobs: processes; with 1 the work is done in this one. Items with a target are worked at one
            after another.
    """

    jobs: int = 1

    def __post_init__(self) -> None:
        """Refuses none. Raises InputError."""
        if self.jobs < 1:
            raise InputError(f"cannot work in {self.jobs} processes", ["expected at least 1"])

    @property
    def threads(self) -> int:
        """The cores that this process may use, shared out."""
        return max(1, usable_cores() // self.jobs)

    def results(self, items: Sequence[Item], start: AnyStart) -> Arrivals:
        """As `Spread.results`."""
        for item in items:
            if item.target is not None:
                with named(item.name):
                    check_runs_here(item.target)
        timed = any(item.target is not None for item in items)
        jobs = 1 if timed else min(self.jobs, len(items))
        pieces = [(item.name, item.argument) for item in items]
        found = in_processes(pieces, start, jobs) if jobs > 1 else here(pieces, start)
        with closing(found):
            for index, result in found:
                yield items[index], result


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

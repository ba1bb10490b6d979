"""Pieces of work in several processes: their results as they arrive, errors with the piece's name.

A piece is a name for messages and an argument. Each process calls `start` once, and what that
returns once for each piece that it is given.
"""

from __future__ import annotations

import functools
import pickle
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from twofour.core.errors import Error, InputError, UnsupportedError

Piece = tuple[str, Any]
AnyStart = Callable[[], Callable[[Any], Any]]
Numbered = Generator[tuple[int, Any], None, None]
"""Results with the index of their piece."""


def here(pieces: Sequence[Piece], start: AnyStart) -> Numbered:
    """Works at the pieces in this process.

    Raises:
        Error: whatever `start` or the function raised of these.
    """
    work = start() if pieces else None
    for index, (name, argument) in enumerate(pieces):
        assert work is not None
        with named(name):
            result = work(argument)
        yield index, result


@contextmanager
def named(piece: str) -> Iterator[None]:
    """Errors that are raised within name the piece. Raises Error."""
    try:
        yield
    except Error as e:
        raise located(piece, e) from e


def located(piece: str, error: Error) -> Error:
    """The error, of its class, with the name of its piece."""
    return type(error)(f"{piece}: {error.what}", error.reasons, error.fix)


@dataclass
class _Worker:
    """A process, our end of the pipe to it, and the piece it is at."""

    process: SpawnProcess
    pipe: Connection
    index: int | None = None


def in_processes(pieces: Sequence[Piece], start: AnyStart, jobs: int) -> Numbered:
    """Results in the order they arrive; all processes have ended when this ends.

    Raises:
        InputError: `start` or an argument cannot be sent to a process.
        UnsupportedError: a process ended.
        Error: whatever `start` or the function raised of these.
    """
    pickled((start, [argument for _, argument in pieces]))
    waiting = list(reversed(range(len(pieces))))
    workers = [_spawn(start) for _ in range(jobs)]
    try:
        for worker in workers:
            _next(worker, waiting, pieces)
        while busy := {each.pipe: each for each in workers if each.index is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                found = _received(worker, pieces)
                _next(worker, waiting, pieces)
                yield found
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _spawn(start: AnyStart) -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, start), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _next(worker: _Worker, waiting: list[int], pieces: Sequence[Piece]) -> None:
    worker.index = waiting.pop() if waiting else None
    if worker.index is not None:
        name, argument = pieces[worker.index]
        try:
            worker.pipe.send(argument)
        except OSError as e:
            raise _ended(worker, name) from e


def _received(worker: _Worker, pieces: Sequence[Piece]) -> tuple[int, Any]:
    assert worker.index is not None
    name, _ = pieces[worker.index]
    try:
        answer = worker.pipe.recv()
    except (EOFError, OSError) as e:
        raise _ended(worker, name) from e
    if isinstance(answer, Error):
        raise located(name, answer)
    return worker.index, answer


def _ended(worker: _Worker, name: str) -> UnsupportedError:
    worker.process.join()
    code = worker.process.exitcode or 0
    return UnsupportedError(
        f"a process ended at {name}",
        [f"killed by signal {-code}" if code < 0 else f"exit code {code}; its trace stands above"],
        "use fewer jobs if memory ran out; with one job the cause is seen best",
    )


def _serve(pipe: Connection, start: AnyStart) -> None:
    """One process: prepares, then answers until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first one ends the rest
    work = started(start)
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        try:
            answer = work(argument)
        except Error as e:
            answer = e
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def started(start: AnyStart) -> Callable[[Any], Any]:
    """The function; if it cannot be made, one that says so at the first piece."""
    try:
        return start()
    except Error as e:
        return functools.partial(_refuse, e)


def _refuse(error: Error, argument: object) -> Any:
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

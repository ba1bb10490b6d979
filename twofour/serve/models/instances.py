"""Who computes batches where there are several instances, or one that has cores of its own.

Each has a thread, and the loop's thread goes on reading requests while they compute. They take
batches from one queue under its lock, and hand each result to its job's `done`, in the loop's
thread. One instance without cores is a `Single`: see there.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import Error, InputError, UnsupportedError
from twofour.engine import Engine
from twofour.runtime.session import Session
from twofour.serve.errors import FailedError, MalformedError, ServeError
from twofour.serve.models.queue import Job, Outputs, Queue
from twofour.serve.models.rows import Layout
from twofour.serve.repository.config import Instance

Array = NDArray[Any]
Result = Outputs | Exception
Results = list[tuple[Job, Result]]
Finish = Callable[[Results], None]
clock_ns = time.perf_counter_ns
"""The clock of all spans; it never steps."""


class Runner:
    """One session and the way through it for a batch.

    Attributes:
        busy: it computes.
    """

    def __init__(self, engine: Engine, layout: Layout, instance: Instance) -> None:
        """Opens a session.

        Raises:
            UnsupportedError: this machine has not that many threads, or cannot run the engine, or
                the GPU has too little memory.
            InputError: there is no such GPU, or the engine is for none.
        """
        self._session: Session | None = Session(
            engine, instance.threads, gpu=instance.gpu, most_gpu_bytes=instance.most_gpu_bytes
        )
        self._layout = layout
        self.busy = False

    def run(self, jobs: Sequence[Job]) -> Results:
        """Computes a batch; where it fails, each of its requests by itself.

        So one request that the network refuses (an index outside a table) fails alone.
        """
        try:
            return self._run(jobs)
        except Error as e:
            if len(jobs) == 1:
                return [(jobs[0], _refused(e))]
            return [result for job in jobs for result in self.run([job])]
        except Exception as e:  # noqa: BLE001  a bug or a full memory: this batch fails, others go on
            failed = FailedError("the model failed on this request", [], "see the server's log")
            failed.__cause__ = e
            return [(job, failed) for job in jobs]

    def time_us(self, feeds: Mapping[str, Array], rounds: int) -> float:
        """Median time of a run of these inputs."""
        session = self._opened
        times = []
        for _ in range(max(rounds, 1)):
            start = clock_ns()
            session.run(feeds)
            times.append((clock_ns() - start) / 1e3)
        return float(np.median(times))

    def close(self) -> None:
        """Ends the session's threads, and gives its memory back at once."""
        self._opened.close()
        self._session = None  # whoever still holds this runner does not hold weights

    @property
    def _opened(self) -> Session:
        if self._session is None:
            raise RuntimeError("the runner is closed")
        return self._session

    def _run(self, jobs: Sequence[Job]) -> Results:
        rows = sum([job.rows for job in jobs])
        feeds = self._layout.join(jobs)
        self.busy = True
        begun = clock_ns()
        try:
            outputs = self._opened.run(feeds)
        finally:
            self.busy = False
        ended = clock_ns()
        for job in jobs:
            job.computing_ns, job.computed_ns, job.batch_rows = begun, ended, rows
        jobs[0].leads = True
        return list(zip(jobs, self._layout.split(outputs, jobs), strict=True))


class Threads:
    """A thread for each instance, with a session of its own, on its cores.

    Attributes:
        lock: to hold while the queue is used.
    """

    def __init__(self, queue: Queue, finish: Finish) -> None:
        """No instance yet."""
        self._queue, self._finish = queue, finish
        self._loop = asyncio.get_running_loop()
        self._changed = self.lock = threading.Condition()
        self._closing = False
        self._threads: list[threading.Thread] = []

    def put(self, job: Job) -> None:
        """Queues a request.

        Raises:
            BusyError: its level is full.
        """
        with self._changed:
            self._queue.put(job)
            self._changed.notify()

    def wake(self) -> None:
        """Looks at the queue again: what is due has changed."""
        with self._changed:
            self._changed.notify_all()

    def start(self, open_runner: Callable[[], Runner], cores: Sequence[int]) -> Future[Runner]:
        """Starts an instance in a thread of its own.

        Args:
            open_runner: called in that thread, so that the threads of its session stay on `cores`.
            cores: of the machine; none: any.

        Returns:
            The runner once it is open, or why it is not.
        """
        opened: Future[Runner] = Future()
        thread = threading.Thread(target=self._live, args=(open_runner, cores, opened), daemon=True)
        self._threads.append(thread)
        thread.start()
        return opened

    async def close(self) -> None:
        """Ends threads and sessions after the batches that they compute."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            await self._loop.run_in_executor(None, thread.join)

    def _live(
        self, open_runner: Callable[[], Runner], cores: Sequence[int], opened: Future[Runner]
    ) -> None:
        """The life of one thread."""
        opened.set_running_or_notify_cancel()  # who stops waiting does not keep it from its end
        try:
            if cores:
                _pin(cores)
            runner = open_runner()
        except Exception as e:  # noqa: BLE001  whatever it is, who waits for the runner gets it
            opened.set_exception(e)
            return
        opened.set_result(runner)
        while batch := self._next_batch():
            results = runner.run(batch)
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                self._loop.call_soon_threadsafe(self._finish, results)
        runner.close()

    def _next_batch(self) -> list[Job]:
        """Waits for a batch that is due; [] at the end."""
        with self._changed:
            while not self._closing:
                now = clock_ns()
                batch = self._queue.take(now)
                if batch:
                    for job in batch:
                        job.started_ns = now
                    return batch
                due = self._queue.due_ns()
                self._changed.wait(None if due is None else max(due - now, 0) / 1e9)
        return []


def _refused(error: Error) -> ServeError:
    """What a client is told: a network refuses what it got, or a GPU or an engine is broken."""
    told: ServeError
    if isinstance(error, InputError):
        told = MalformedError(error.what, error.reasons, error.fix)
    else:
        told = FailedError("the model failed on this request", [], "see the server's log")
    told.__cause__ = error
    return told


def _pin(cores: Sequence[int]) -> None:
    """Keeps the calling thread, and those that it starts, on these cores.

    Raises:
        UnsupportedError: this process may not use one of them.
    """
    allowed = os.sched_getaffinity(0)
    if missing := sorted(set(cores) - allowed):
        raise UnsupportedError(
            f"an instance cannot run on core {', '.join(map(str, missing))}",
            [f"this process may use {', '.join(map(str, sorted(allowed)))}"],
            "name cores that there are in `instances`",
        )
    os.sched_setaffinity(0, cores)

"""One instance: short batches are computed where requests are read, long ones in a thread.

A change of threads costs tens of microseconds twice: to hand a batch over, and to bring its results
back. A batch that takes less than a limit is not worth it, if nothing else is being computed; what
comes in meanwhile waits for a limit's time at most, and is the next batch. A longer one goes to the
thread, and requests are read meanwhile. The thread then takes what is due by itself until nothing
is: so under load it computes without a pause, and a lone request changes no thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from twofour.serve.models.instances import Finish, Runner, clock_ns
from twofour.serve.models.queue import Job, Queue


class Single:
    """One session, used by the loop's thread and by one of its own in turns.

    Attributes:
        lock: to hold while the queue is used.
    """

    def __init__(
        self, queue: Queue, runner: Runner, finish: Finish, is_short: Callable[[int], bool]
    ) -> None:
        """Starts the thread.

        Args:
            queue: of the version.
            runner: open, and warm.
            finish: is given results, in the loop's thread.
            is_short: whether a batch of so many rows is to be computed by the loop's thread.
        """
        self.lock = threading.Condition()
        self._queue, self._runner, self._finish = queue, runner, finish
        self._is_short = is_short
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.Handle | None = None
        self._at_ns = 0
        self._handed: list[Job] = []
        self._busy = False  # the thread has the session, and takes what is due by itself
        self._closing = False
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Queues a request.

        Raises:
            BusyError: its level is full.
        """
        with self.lock:
            self._queue.put(job)
            if self._busy:
                return
        if self._next is None or self._at_ns:
            self._soon()

    def wake(self) -> None:
        """Looks at the queue again: what is due has changed."""
        self._soon()

    async def close(self) -> None:
        """Ends thread and session after the batch that they compute; nothing may wait any more."""
        if self._next is not None:
            self._next.cancel()
        with self.lock:
            self._closing = True
            self.lock.notify()
        await self._loop.run_in_executor(None, self._thread.join)

    def _soon(self) -> None:
        """At the end of this turn of the loop, when all that has come in is read."""
        if self._next is not None:
            self._next.cancel()
        self._at_ns = 0
        self._next = self._loop.call_soon(self._step)

    def _step(self) -> None:
        """Computes a short batch that is due, or hands a long one over."""
        self._next = None
        with self.lock:
            if self._busy or self._closing:
                return
            batch = self._take()
            if batch and not self._is_short(sum([job.rows for job in batch])):
                self._busy, self._handed = True, batch
                self.lock.notify()
                return
        if batch:
            self._finish(self._runner.run(batch))
        self._plan()

    def _plan(self) -> None:
        """Comes back when something is due."""
        due = self._queue.due_ns()
        if due is None or self._next is not None:
            return
        now = clock_ns()
        if due <= now:
            self._soon()
        else:
            self._at_ns = due
            self._next = self._loop.call_later((due - now) / 1e9, self._step)

    def _take(self) -> list[Job]:
        now = clock_ns()
        batch = self._queue.take(now)
        for job in batch:
            job.started_ns = now
        return batch

    def _live(self) -> None:
        """The life of the thread."""
        while batch := self._next_handed():
            while batch:
                self._tell(self._finish, self._runner.run(batch))
                with self.lock:
                    batch = self._take()
                    self._busy = bool(batch)
            self._tell(self._soon)  # what waits for its time is the loop's again
        self._runner.close()

    def _next_handed(self) -> list[Job]:
        """Waits for a batch; [] at the end."""
        with self.lock:
            while not self._handed and not self._closing:
                self.lock.wait()
            batch, self._handed = self._handed, []
            return batch

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            self._loop.call_soon_threadsafe(what, *arguments)

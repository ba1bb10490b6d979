"""A model version that is loaded: its queue, its instances, and what happened to its requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.engine import Engine, Plan
from twofour.serve.errors import BusyError, MalformedError, TimedOutError
from twofour.serve.models.instances import Results, Runner, Threads, clock_ns
from twofour.serve.models.queue import Job, Outputs, Queue, Rules
from twofour.serve.models.rows import Layout
from twofour.serve.models.single import Single
from twofour.serve.models.tally import Tally
from twofour.serve.protocol.messages import TensorMetadata, datatype
from twofour.serve.repository.config import Instance, ModelConfig

log = logging.getLogger(__name__)
Array = NDArray[Any]
Done = Callable[[Outputs | Exception], None]
SHORT_US = 500.0
"""A batch that takes at most so long may be computed by the thread that reads requests."""


@dataclass(frozen=True)
class Ticket:
    """What a request asks of the queue beside its inputs.

    Attributes:
        arrived_ns: when its last byte was there, on `clock_ns`.
        level: of priority; 0: the usual one.
        timeout_us: of its wait; 0: the queue's.
        deadline_ns: when its client gives up; None: never.
    """

    arrived_ns: int
    level: int = 0
    timeout_us: int = 0
    deadline_ns: int | None = None


class Version:
    """One version of a model, able to answer once it was started.

    Everything but `start`'s opening of sessions happens in the loop's thread.

    Attributes:
        model: its name.
        number: of the version.
        config: of the model.
        plan: of its engine.
        layout: how its requests are joined.
        queue: of its requests.
        tally: what happened to them.
        memory_bytes: weights, code and activations, of all instances.
        run_us: median time of the usual run, measured at warm-up.
    """

    def __init__(self, model: str, number: int, config: ModelConfig, engine: Engine) -> None:
        """Plans its batches.

        Raises:
            InputError: the configuration does not fit the engine.
        """
        self.model, self.number, self.config = model, number, config
        self.plan: Plan = engine.plan
        self.layout = Layout(engine.plan, config.batching)
        self.queue = Queue(_rules(config, self.layout.most_rows))
        self.tally = Tally()
        copies = len(config.instances)
        self.memory_bytes = engine.size_bytes + copies * engine.plan.arena_bytes
        self.run_us = 0.0
        self._row_us = self._least_us = 0.0
        self._engine: Engine | None = engine
        self._loop = asyncio.get_running_loop()
        self._instances: Single | Threads = Threads(self.queue, self._finish)
        self._runners: list[Runner] = []
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._accepts = False

    @property
    def in_flight(self) -> int:
        """Requests that wait or run."""
        return self._open

    @property
    def busy(self) -> int:
        """Instances that compute."""
        return sum(runner.busy for runner in self._runners)

    async def start(self, warm: Mapping[str, Array] | None = None) -> None:
        """Opens all instances and warms them up; then requests are taken.

        Args:
            warm: inputs for warm-up beside zeros of all shapes that runs may have.

        Raises:
            Error: a session could not be opened, or an input of `warm` does not fit.
        """
        assert self._engine is not None, "started once"
        engine, self._engine = self._engine, None
        try:
            await self._open_instances(engine, warm)
        except BaseException:
            await self._instances.close()
            raise
        self._accepts = True

    async def _open_instances(self, engine: Engine, warm: Mapping[str, Array] | None) -> None:
        """One instance that changes no thread for short batches, or a thread for each."""
        threads = self._instances
        assert isinstance(threads, Threads)
        instances = self.config.instances
        openers = [partial(self._open_runner, engine, each, warm) for each in instances]
        if self.config.execution != "thread" and len(instances) == 1 and not instances[0].cores:
            runner = await self._loop.run_in_executor(None, openers[0])
            self._instances = Single(self.queue, runner, self._finish, self._is_short)
        else:
            starting = [
                asyncio.wrap_future(threads.start(opener, each.cores))
                for opener, each in zip(openers, instances, strict=True)
            ]
            done = await asyncio.gather(*starting, return_exceptions=True)
            failed = [each for each in done if isinstance(each, BaseException)]
            if failed:
                raise failed[0]

    def submit(self, inputs: Mapping[str, Array], ticket: Ticket, done: Done) -> Job:
        """Queues a request.

        Args:
            inputs: name -> array.
            ticket: what it asks of the queue.
            done: called once in the loop's thread, with the outputs (views that stay valid) or an
                error, unless the request is cancelled.

        Raises:
            MalformedError: the inputs do not fit the model, or there is no such priority.
            BusyError: the queue is full, or the version is being unloaded.
        """
        if not self._accepts:
            raise BusyError(f"model {self.model!r}, version {self.number}, is not ready")
        place = self.layout.place(inputs)
        queue = self.config.queue
        level = ticket.level or queue.usual_level
        if not 1 <= level <= queue.levels:
            expected = f"expected 1 to {queue.levels}, or 0 for the usual one"
            raise MalformedError("there is no such priority", [expected, f"got {level}"])
        now = clock_ns()
        deadline = self._deadline_ns(ticket, now)
        job = Job(inputs, place.rows, place.length, place.key, level, now, deadline, done)
        try:
            self._instances.put(job)
        except BusyError as e:
            e.retry_after_s = max(1.0, self.wait_s)
            raise
        self._open += 1
        self._idle.clear()
        if deadline is not None:
            self._watch(deadline, now)
        return job

    @property
    def wait_s(self) -> float:
        """About how long it takes to compute what waits."""
        runs = len(self.queue) / max(self.layout.most_rows, 1)
        return runs * self.run_us / 1e6 / len(self.config.instances)

    def cancel(self, job: Job) -> bool:
        """Takes a request back; False: it has begun, and `done` will be called."""
        with self._instances.lock:
            waited = self.queue.remove(job)
        if waited:
            self._close_one()
        return waited

    async def drain(self) -> None:
        """Takes no more requests, and waits until those that came are answered."""
        self._accepts = False
        with self._instances.lock:
            self.queue.hurry()
        self._instances.wake()
        await self._idle.wait()

    async def close(self) -> None:
        """Drains, then ends the instances."""
        await self.drain()
        if self._timer is not None:
            self._timer.cancel()
        await self._instances.close()

    def _open_runner(
        self, engine: Engine, instance: Instance, warm: Mapping[str, Array] | None
    ) -> Runner:
        """A runner, warm and measured."""
        runner = Runner(engine, self.layout, instance)
        rounds = self.config.warm_up.rounds
        try:
            if warm is not None:
                runner.time_us(warm, rounds)
            shapes = self.layout.shapes_to_warm()
            times = [runner.time_us(_zeros(self.plan, each), rounds) for each in shapes]
            self._tell_gain(runner, rounds)
        except BaseException:
            runner.close()
            raise
        self._runners.append(runner)
        self.run_us = times[min(1, len(times) - 1)]
        rows = [self.layout.rows_of(each) for each in shapes]
        self._least_us = min(times)
        self._row_us = max(us / n for us, n in zip(times, rows, strict=True))
        return runner

    def _is_short(self, rows: int) -> bool:
        """Whether a batch is computed by the loop's thread: by the longest rows there are."""
        inline = self.config.execution == "inline"
        return inline or max(self._least_us, rows * self._row_us) <= SHORT_US

    def _tell_gain(self, runner: Runner, rounds: int) -> None:
        """Logs what batches are good for: a network may take as long for each row in any batch."""
        rows = self.layout.most_rows
        one, all_ = (self.layout.shapes_of_rows(n) for n in (1, rows))
        if one is None or all_ is None or not rounds:
            return
        alone_us = runner.time_us(_zeros(self.plan, one), rounds)
        together_us = runner.time_us(_zeros(self.plan, all_), rounds)
        log.info(
            "model %s, version %d: a run of one row takes %.0f us, of %d rows %.1f times that",
            *(self.model, self.number, alone_us, rows, together_us / alone_us),
        )

    def _deadline_ns(self, ticket: Ticket, now: int) -> int | None:
        """The earliest of the client's, the request's and the queue's."""
        queue = self.config.queue
        ends = [ticket.deadline_ns] if ticket.deadline_ns is not None else []
        if ticket.timeout_us:
            ends.append(now + ticket.timeout_us * 1000)
        elif queue.timeout_ms is not None:
            ends.append(now + queue.timeout_ms * 1_000_000)
        if queue.max_timeout_ms is not None:
            ends.append(now + queue.max_timeout_ms * 1_000_000)
        return min(ends, default=None)

    def _watch(self, deadline_ns: int, now: int) -> None:
        """Sees to it that a request that waits too long gets to know."""
        at = self._loop.time() + (deadline_ns - now) / 1e9
        if self._timer is None or self._timer_at > at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_at(at, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = clock_ns()
        with self._instances.lock:
            late = self.queue.expired(now)
            following = self.queue.deadline_ns()
        if following is not None:
            self._watch(following, now)
        self._finish([(job, _too_late(job, now)) for job in late])

    def _finish(self, results: Results) -> None:
        """Hands results to those who wait for them."""
        for job, result in results:
            if job.leads:
                self.tally.ran(job)
            self._close_one()
            job.done(result)

    def _close_one(self) -> None:
        self._open -= 1
        if not self._open:
            self._idle.set()


def _rules(config: ModelConfig, most_rows: int) -> Rules:
    batching, queue = config.batching, config.queue
    preferred = tuple(n for n in batching.preferred_sizes if n <= most_rows)
    delay_ns = batching.max_delay_us * 1000
    return Rules(most_rows, preferred, delay_ns, queue.levels, queue.length)


def _zeros(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {info.name: np.zeros(shapes[info.name], info.dtype) for info in plan.inputs}


def _too_late(job: Job, now: int) -> TimedOutError:
    waited = f"waited {(now - job.queued_ns) / 1e6:.1f} ms"
    return TimedOutError("the request waited too long", [waited], "allow more, or send less")


def tensors(plan: Plan, *, rows: bool) -> tuple[list[TensorMetadata], list[TensorMetadata]]:
    """Inputs and outputs as the protocol shows them.

    Args:
        plan: of an engine.
        rows: requests may have any number of rows, up to the largest batch.
    """
    groups = []
    for of in ("inputs", "outputs"):
        group = []
        for index, info in enumerate(getattr(plan.profiles[0], of)):
            all_dims = [getattr(profile, of)[index].dims for profile in plan.profiles]
            shape = [
                dims[0] if len(set(dims)) == 1 and isinstance(dims[0], int) else -1
                for dims in zip(*all_dims, strict=True)
            ]
            if rows and shape:
                shape[0] = -1
            group.append(TensorMetadata(info.name, datatype(np.dtype(info.dtype)), tuple(shape)))
        groups.append(group)
    return groups[0], groups[1]

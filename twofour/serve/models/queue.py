"""Requests that wait, and which of them run together: no threads, no clock of its own.

Requests of one `key` may share a batch. Those of a key are a group; its window opens at its first
request. A group is due when its rows fill a batch (one of a preferred size, or the largest one), or
when its window has been open for the longest delay. Of several due groups the one with the highest
priority starts, then the one whose first request is oldest; within a batch likewise.

    now:    0 us           300 us          500 us
    group:  a (1 row)      a, b (3 rows)   delay over: a and b start together
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from twofour.serve.errors import BusyError

Array = NDArray[Any]
Outputs = Mapping[str, Array]
Shape = tuple[int, ...]
_MOST_OVER = 64


@dataclass(frozen=True)
class Key:
    """What requests have in common that fit together.

    Attributes:
        bucket: of their lengths; 0 where the model has none.
        shapes: of their inputs, `OPEN` where they may differ.
    """

    bucket: int
    shapes: tuple[Shape, ...]


@dataclass(slots=True, eq=False)
class Job:
    """One request in a queue or running.

    Attributes:
        inputs: checked: they fit the engine.
        rows: of a batch that it takes.
        length: of its sequences; 0 where the model has none.
        key: what it may share a batch with.
        level: its priority, 1 is the highest.
        queued_ns: when it was put.
        deadline_ns: it has to have begun by then; None: no matter.
        done: called once, with the outputs, or with what went wrong.
        waits: it lies in the queue.
        ends: its place in the queue's order of deadlines; None: it has none.
        started_ns, computing_ns, computed_ns: when its batch was taken, began to be computed, and
            was; 0 before that.
        batch_rows: of its run, all requests together.
        leads: it is the first request of its run.
    """

    inputs: Mapping[str, Array]
    rows: int
    length: int
    key: Key
    level: int
    queued_ns: int
    deadline_ns: int | None
    done: Callable[[Outputs | Exception], None]
    waits: bool = False
    ends: _Ends | None = None
    started_ns: int = 0
    computing_ns: int = 0
    computed_ns: int = 0
    batch_rows: int = 0
    leads: bool = False


@dataclass(slots=True)
class _Ends:
    """A deadline, which may be hours away: it lets go of its request when that waits no longer."""

    at_ns: int
    number: int
    job: Job | None

    def __lt__(self, other: _Ends) -> bool:
        return (self.at_ns, self.number) < (other.at_ns, other.number)


@dataclass(frozen=True)
class Rules:
    """When a batch starts.

    Attributes:
        most_rows: of a batch.
        preferred: rows that start at once, ascending.
        delay_ns: longest wait of the first request of a batch for others.
        levels: of priority.
        length: of each level, in requests.
    """

    most_rows: int = 1
    preferred: tuple[int, ...] = ()
    delay_ns: int = 0
    levels: int = 1
    length: int = 512


@dataclass(slots=True)
class _Group:
    """Waiting requests of one key.

    Attributes:
        levels: those that wait, oldest first; ordered sets.
        rows: of those that wait.
    """

    levels: list[OrderedDict[Job, None]] = field(default_factory=list)
    rows: int = 0

    def first(self) -> Job | None:
        """The one that has waited longest."""
        fronts = [next(iter(level)) for level in self.levels if level]
        return min(fronts, key=lambda job: job.queued_ns, default=None)

    def urgent(self) -> int:
        """The highest priority that waits."""
        return next(i for i, level in enumerate(self.levels) if level)

    def jobs(self) -> Iterable[Job]:
        """Those that wait, the most urgent first."""
        return itertools.chain.from_iterable(self.levels)


class Queue:
    """The requests of one model version that wait for an instance.

    Not safe for several threads: who uses it from several holds a lock.
    """

    def __init__(self, rules: Rules) -> None:
        """Nothing waits."""
        self.rules = rules
        self._groups: dict[Key, _Group] = {}
        self._waiting = [0] * rules.levels
        self._deadlines: list[_Ends] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(self._waiting)

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return sum(group.rows for group in self._groups.values())

    def put(self, job: Job) -> None:
        """Adds a request.

        Raises:
            BusyError: its level is full.
        """
        if self._waiting[job.level - 1] >= self.rules.length:
            full = f"{self.rules.length} requests wait already"
            raise BusyError("the queue is full", [full], "send less at once, or try again later")
        group = self._groups.get(job.key)
        if group is None:
            levels = [OrderedDict[Job, None]() for _ in range(self.rules.levels)]
            group = self._groups[job.key] = _Group(levels)
        group.levels[job.level - 1][job] = None
        group.rows += job.rows
        self._waiting[job.level - 1] += 1
        job.waits = True
        if job.deadline_ns is not None:
            job.ends = _Ends(job.deadline_ns, next(self._order), job)
            if len(self._deadlines) > 2 * len(self) + _MOST_OVER:
                self._deadlines = [each for each in self._deadlines if each.job is not None]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, job.ends)

    def remove(self, job: Job) -> bool:
        """Takes out a request that was cancelled; False: it does not wait any more."""
        if not job.waits:
            return False
        self._forget(job)
        return True

    def expired(self, now_ns: int) -> list[Job]:
        """Takes out the requests whose deadline has passed."""
        late = []
        while (first := self.deadline_ns()) is not None and first <= now_ns:
            job = heapq.heappop(self._deadlines).job
            assert job is not None  # deadline_ns looked
            self._forget(job)
            late.append(job)
        return late

    def take(self, now_ns: int) -> list[Job]:
        """Takes out the batch that starts now: requests of one key; [] where none is due."""
        best: tuple[int, int] | None = None
        chosen: _Group | None = None
        for group in self._groups.values():
            first = group.first()
            if first is None or not self._due(group, first, now_ns):
                continue
            rank = (group.urgent(), first.queued_ns)
            if best is None or rank < best:
                best, chosen = rank, group
        return [] if chosen is None else self._cut(chosen)

    def due_ns(self) -> int | None:
        """When `take` gives something though nothing is put; None: never."""
        times = [
            first.queued_ns + (0 if self._is_full(group) else self.rules.delay_ns)
            for group in self._groups.values()
            if (first := group.first()) is not None
        ]
        return min(times, default=None)

    def deadline_ns(self) -> int | None:
        """When `expired` gives something; None: never."""
        while self._deadlines and self._deadlines[0].job is None:
            heapq.heappop(self._deadlines)
        return self._deadlines[0].at_ns if self._deadlines else None

    def hurry(self) -> None:
        """From now on no request waits for others."""
        self.rules = replace(self.rules, delay_ns=0)

    def drain(self) -> list[Job]:
        """Takes out all that wait."""
        left = [job for group in self._groups.values() for job in group.jobs()]
        for job in left:
            self._forget(job)
        return left

    def _due(self, group: _Group, first: Job, now_ns: int) -> bool:
        return self._is_full(group) or first.queued_ns + self.rules.delay_ns <= now_ns

    def _is_full(self, group: _Group) -> bool:
        """It has the rows of a batch that starts at once."""
        rules = self.rules
        return group.rows >= (rules.preferred[0] if rules.preferred else rules.most_rows)

    def _cut(self, group: _Group) -> list[Job]:
        """As many requests as fit, the most urgent first, then the oldest."""
        fitting = [size for size in self.rules.preferred if size <= group.rows]
        room = fitting[-1] if fitting else self.rules.most_rows
        batch: list[Job] = []
        for job in group.jobs():
            if batch and job.rows > room:
                break
            room -= job.rows
            batch.append(job)
        for job in batch:
            self._forget(job)
        return batch

    def _forget(self, job: Job) -> None:
        job.waits = False
        if job.ends is not None:
            job.ends.job = None
            job.ends = None
        self._waiting[job.level - 1] -= 1
        group = self._groups[job.key]
        del group.levels[job.level - 1][job]
        group.rows -= job.rows
        if not group.rows:
            del self._groups[job.key]

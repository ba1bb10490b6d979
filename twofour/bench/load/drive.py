"""One turn of load on one server: callers who wait for their answers, or requests that are due.

Closed loop: so many callers, each sends again as soon as it has its answer. A slow server gets less
to do, so its latencies look better than its users have it.

Open loop: requests come when they are due, whatever became of those before. A latency counts from
the time at which its request was due, not from when it could be sent: what a stalled server keeps
waiting counts, too (coordinated omission; Tene 2013, How not to measure latency).
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from twofour.bench.load.client import UNREADABLE, Answer, Client, said
from twofour.bench.load.requests import Message
from twofour.bench.load.schedule import Arrivals
from twofour.bench.load.timer import Timer

_AFTER_ERROR_S = 0.01


@dataclass(frozen=True)
class Span:
    """The times of a turn.

    Attributes:
        warm_s: load that is not counted, before it.
        begin_s: where the turn lies among those of its target; 0 for the first.
        seconds: length.
    """

    warm_s: float
    begin_s: float
    seconds: float


@dataclass
class Record:
    """What one turn found.

    A closed loop counts what ended after the turn began; an open one what was due since.

    Attributes:
        latencies_ns: int64, of answers; those that came after the turn ended included.
        late_ns: int64, open loop: how much later than due requests were sent.
        errors: by name.
        words: what the server said to the first of each error.
        answered: within the turn's time.
        rows: in these.
        sent_bytes: of all requests with an answer.
        received_bytes: of their answers.
        wall_ns: length of the turn.
        cpu_ns: that this process computed in it.
    """

    latencies_ns: array[int] = field(default_factory=lambda: array("q"))
    late_ns: array[int] = field(default_factory=lambda: array("q"))
    errors: Counter[str] = field(default_factory=Counter)
    words: dict[str, str] = field(default_factory=dict)
    answered: int = 0
    rows: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    wall_ns: int = 0
    cpu_ns: int = 0


class _Turn:
    """Counts answers, and knows the time."""

    def __init__(self, client: Client, messages: Iterator[Message], span: Span) -> None:
        self.client, self.messages, self.record = client, messages, Record()
        self.start_ns = time.monotonic_ns()
        self.begin_ns = self.start_ns + int(span.warm_s * 1e9)
        self.end_ns = self.begin_ns + int(span.seconds * 1e9)
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def error_of(self, message: Message, answer: Answer) -> str:
        """Its own, or that it holds another amount than answers to this request do."""
        if answer.error or message.content is None:
            return answer.error
        return "" if self.client.holds(answer, message.content) else UNREADABLE

    def count(self, message: Message, began_ns: int, answer: Answer, error: str) -> None:
        """Notes an answer."""
        record = self.record
        if error:
            record.errors[error] += 1
            record.words.setdefault(error, said(answer.body))
            return
        record.latencies_ns.append(answer.ended_ns - began_ns)
        record.sent_bytes += len(message.data)
        record.received_bytes += len(answer.body)
        if answer.ended_ns < self.end_ns:
            record.answered += 1
            record.rows += message.rows

    async def run(self) -> Record:
        """Measures this process's CPU time, and ends when every request has."""
        await _until(self.begin_ns)
        wall_ns, cpu_ns = time.monotonic_ns(), time.process_time_ns()
        await _until(self.end_ns)
        self.record.wall_ns = time.monotonic_ns() - wall_ns
        self.record.cpu_ns = time.process_time_ns() - cpu_ns
        await self.finished
        return self.record


class _Callers(_Turn):
    """The closed loop."""

    def begin(self, callers: int) -> None:
        self._left = callers
        for _ in range(callers):
            self._send()

    def _send(self) -> None:
        message, now = next(self.messages), time.monotonic_ns()
        if now >= self.end_ns:
            self._end()
        else:
            self.client.send(message.data, partial(self._answered, message, now))

    def _answered(self, message: Message, began_ns: int, answer: Answer) -> None:
        error = self.error_of(message, answer)
        if answer.ended_ns >= self.begin_ns:
            self.count(message, began_ns, answer, error)
        if error:
            asyncio.get_running_loop().call_later(_AFTER_ERROR_S, self._send)
        else:
            self._send()

    def _end(self) -> None:
        self._left -= 1
        if not self._left:
            self.finished.set_result(None)


class _Due(_Turn):
    """The open loop."""

    def begin(self, due_ns: list[int]) -> None:
        self._due, self._next, self._left = due_ns, 0, len(due_ns)
        self._timer = Timer(self._send)
        if due_ns:
            self._timer.set(due_ns[0])
        else:
            self.finished.set_result(None)

    async def run(self) -> Record:
        try:
            return await super().run()
        finally:
            self._timer.close()

    def _send(self) -> None:
        """All that are due."""
        due, at, now = self._due, self._next, time.monotonic_ns()
        while at < len(due) and due[at] <= now:
            message, was_due = next(self.messages), due[at]
            at += 1
            self._next = at
            if was_due >= self.begin_ns:
                self.record.late_ns.append(now - was_due)
            self.client.send(message.data, partial(self._answered, message, was_due))
            now = time.monotonic_ns()
        if at < len(due):
            self._timer.set(due[at])

    def _answered(self, message: Message, due_ns: int, answer: Answer) -> None:
        if due_ns >= self.begin_ns:
            self.count(message, due_ns, answer, self.error_of(message, answer))
        self._left -= 1
        if not self._left:
            self.finished.set_result(None)


async def closed_turn(
    client: Client, messages: Iterator[Message], callers: int, span: Span
) -> Record:
    """So many callers, each with one request open."""
    turn = _Callers(client, messages, span)
    turn.begin(callers)
    return await turn.run()


async def open_turn(
    client: Client, messages: Iterator[Message], arrivals: Arrivals, span: Span
) -> Record:
    """Requests as they are due; while it warms up, they come evenly."""
    turn = _Due(client, messages, span)
    warm = Arrivals(arrivals.rate, "constant").between(0.0, span.warm_s)
    due = arrivals.between(span.begin_s, span.begin_s + span.seconds)
    turn.begin([*(warm + turn.start_ns).tolist(), *(due + turn.begin_ns).tolist()])
    return await turn.run()


async def _until(when_ns: int) -> None:
    await asyncio.sleep(max(0.0, (when_ns - time.monotonic_ns()) / 1e9))

"""The queue under any order of events: each request leaves it exactly once."""

from __future__ import annotations

import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from twofour.serve.errors import BusyError
from twofour.serve.models.queue import Job, Key, Queue, Rules

KEYS = [Key(0, ((-1, size),)) for size in range(3)]
US = 1000


def job(
    rows: int = 1, key: int = 0, level: int = 1, at: int = 0, deadline: int | None = None
) -> Job:
    return Job({}, rows, 0, KEYS[key], level, at, deadline, lambda _: None)


def queue(**rules: object) -> Queue:
    return Queue(Rules(**rules))  # type: ignore[arg-type]


def test_the_window_opens_at_the_first_request() -> None:
    waiting = queue(most_rows=8, delay_ns=500 * US)
    first, second = job(at=0), job(at=400 * US)
    waiting.put(first)
    waiting.put(second)
    assert waiting.take(499 * US) == []
    assert waiting.due_ns() == 500 * US
    assert waiting.take(500 * US) == [first, second]
    assert waiting.due_ns() is None


def test_a_full_batch_starts_at_once() -> None:
    waiting = queue(most_rows=4, delay_ns=500 * US)
    jobs = [job(rows=2, at=i) for i in range(3)]
    for each in jobs:
        waiting.put(each)
    assert waiting.take(3) == jobs[:2]
    assert waiting.take(3) == []


def test_a_full_batch_that_is_left_over_is_due_at_once() -> None:
    waiting = queue(most_rows=4, delay_ns=500 * US)
    for i in range(9):
        waiting.put(job(at=i))
    assert len(waiting.take(9)) == 4
    due = waiting.due_ns()
    assert due is not None
    assert due <= 9
    assert len(waiting.take(9)) == 4
    assert waiting.due_ns() == 500 * US + 8


def test_preferred_sizes_start_at_once_and_the_largest_that_fits_is_taken() -> None:
    waiting = queue(most_rows=16, preferred=(4, 8), delay_ns=500 * US)
    jobs = [job(at=i) for i in range(10)]
    for number, each in enumerate(jobs, 1):
        waiting.put(each)
        if number == 3:
            assert waiting.take(number) == []
    assert waiting.take(10) == jobs[:8]
    assert waiting.take(10) == []
    assert waiting.take(500 * US + 8) == jobs[8:]


def test_only_one_key_in_a_batch() -> None:
    waiting = queue(most_rows=8)
    one, other, third = job(at=0), job(key=1, at=1), job(at=2)
    for each in (one, other, third):
        waiting.put(each)
    assert waiting.take(5) == [one, third]
    assert waiting.take(5) == [other]


def test_the_urgent_go_first_and_then_the_old() -> None:
    waiting = queue(most_rows=2, levels=3)
    late, urgent, usual = job(level=3, at=0), job(level=1, at=5), job(level=2, at=3)
    for each in (late, urgent, usual):
        waiting.put(each)
    assert waiting.take(9) == [urgent, usual]
    assert waiting.take(9) == [late]


def test_a_level_that_is_full_refuses_and_others_do_not() -> None:
    waiting = queue(most_rows=1, levels=2, length=2)
    for _ in range(2):
        waiting.put(job(level=2))
    with pytest.raises(BusyError, match="2 requests wait"):
        waiting.put(job(level=2))
    waiting.put(job(level=1))
    assert len(waiting) == 3


def test_deadlines() -> None:
    waiting = queue(most_rows=1, delay_ns=10**12)
    soon, never, later = job(deadline=5), job(), job(deadline=9)
    for each in (later, soon, never):
        waiting.put(each)
    assert waiting.deadline_ns() == 5
    assert waiting.expired(4) == []
    assert waiting.expired(9) == [soon, later]
    assert waiting.deadline_ns() is None
    assert waiting.drain() == [never]


def test_a_large_request_is_not_passed_by_smaller_ones_behind_it() -> None:
    waiting = queue(most_rows=4)
    jobs = [job(rows=2, at=0), job(rows=3, at=1), job(rows=1, at=2)]
    for each in jobs:
        waiting.put(each)
    assert waiting.take(3) == jobs[:1]
    assert waiting.take(3) == jobs[1:]


class Life(RuleBasedStateMachine):
    """Puts, takes, cancels and lets requests expire, beside a plain list of what must be inside."""

    def __init__(self) -> None:
        super().__init__()
        self.rules = Rules(6, (2, 4), 50, 2, 5)
        self.queue = Queue(self.rules)
        self.now = 0
        self.inside: list[Job] = []

    @rule(
        rows=st.integers(1, 6),
        key=st.integers(0, 2),
        level=st.integers(1, 2),
        patience=st.none() | st.integers(0, 80),
    )
    def put(self, rows: int, key: int, level: int, patience: int | None) -> None:
        deadline = None if patience is None else self.now + patience
        new = job(rows, key, level, self.now, deadline)
        full = sum(each.level == level for each in self.inside) >= self.rules.length
        if full:
            with pytest.raises(BusyError):
                self.queue.put(new)
        else:
            self.queue.put(new)
            self.inside.append(new)

    @rule(step=st.integers(0, 60))
    def wait(self, step: int) -> None:
        self.now += step

    @rule()
    def take(self) -> None:
        batch = self.queue.take(self.now)
        due = self.queue.due_ns() if not batch else None
        if not batch:
            assert due is None or due > self.now, "what is due is taken"
            return
        assert len({each.key for each in batch}) == 1
        assert sum(each.rows for each in batch) <= self.rules.most_rows
        same = [each for each in self.inside if each.key == batch[0].key]
        order = sorted(same, key=lambda each: (each.level, each.queued_ns))
        urgent = [(each.level, each.queued_ns) for each in order[: len(batch)]]
        assert [(each.level, each.queued_ns) for each in batch] == urgent
        self._gone(batch)

    @rule()
    def expire(self) -> None:
        late = self.queue.expired(self.now)
        assert all(each.deadline_ns is not None and each.deadline_ns <= self.now for each in late)
        self._gone(late)
        assert not [
            each
            for each in self.inside
            if each.deadline_ns is not None and each.deadline_ns <= self.now
        ]

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.inside))
        assert self.queue.remove(one)
        assert not self.queue.remove(one)
        self._gone([one])

    @invariant()
    def counts(self) -> None:
        assert len(self.queue) == len(self.inside)
        assert self.queue.rows == sum(each.rows for each in self.inside)

    def teardown(self) -> None:
        self._gone(self.queue.drain())
        assert not self.inside, "all left the queue once"

    def _gone(self, jobs: list[Job]) -> None:
        for each in jobs:
            self.inside.remove(each)  # an error if it had left before


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=40), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_everything_is_taken_in_the_end(requests: list[tuple[int, int]], delay: int) -> None:
    waiting = queue(most_rows=4, preferred=(2, 3), delay_ns=delay, length=100)
    jobs = [job(rows, key, at=i) for i, (rows, key) in enumerate(requests)]
    for each in jobs:
        waiting.put(each)
    taken: list[Job] = []
    while (due := waiting.due_ns()) is not None:
        batch = waiting.take(max(due, len(jobs)))
        assert batch, "what is due is taken"
        taken += batch
    assert sorted(taken, key=lambda each: each.queued_ns) == jobs


def test_what_does_not_wait_is_let_go_of() -> None:
    """Deadlines may be hours away: neither they nor cancelled requests may pile up until then."""
    waiting = queue(most_rows=4, length=1 << 20, levels=2)
    starved = job(level=2, key=1)
    waiting.put(starved)
    gone = []
    for number in range(2000):
        for each in (job(at=number, deadline=10**18), job(at=number, deadline=10**18, level=2)):
            each.done = lambda _: None  # what the request holds
            gone.append(weakref.ref(each.done))
            waiting.put(each)
            if number % 2:
                assert waiting.remove(each)
            del each
        if not number % 2:
            assert len(waiting.take(10**9)) > 0
    while len(waiting):
        waiting.take(10**9)
    assert [ref() for ref in gone if ref() is not None] == []
    assert len(waiting._deadlines) < 1000

"""Percentiles as numpy has them, rates, ratios, and what the client says against itself."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.bench.load.client import parse_target
from twofour.bench.load.drive import Record
from twofour.bench.load.result import Found, Result, latency_of, summarize
from twofour.bench.load.statistics import Counters, split

TARGET = parse_target("http://127.0.0.1:8000", "m", {})


def record(us: list[float], *, cpu: float = 0.1, late_us: float | None = None) -> Record:
    """A turn of one second."""
    ns = array("q", (int(1000 * each) for each in us))
    late = array("q", [] if late_us is None else [int(1000 * late_us)] * len(us))
    errors = Counter[str]()
    return Record(ns, late, errors, {}, len(us), 2 * len(us), 0, 0, 10**9, int(cpu * 1e9))


def result(*turns: Record, first: Found | None = None, held: int = 0) -> Result:
    return summarize(found(*turns, held=held), first)


def found(*turns: Record, held: int = 0) -> Found:
    return Found(TARGET, "m", "fake 1", {}, turns, None, held)


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=200))
def test_percentiles_are_those_of_numpy(ns: list[int]) -> None:
    latency = latency_of(np.array(ns, np.int64))
    assert latency is not None
    for name, percent in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("p99_9", 99.9)):
        expected = np.percentile(np.array(ns, float), percent) / 1e3
        assert getattr(latency, f"{name}_us") == pytest.approx(expected)
    assert latency.max_us == max(ns) / 1e3
    assert latency.mean_us == pytest.approx(np.mean(ns) / 1e3)


def test_no_answers_have_no_latency() -> None:
    assert latency_of(np.zeros(0, np.int64)) is None
    assert result(record([])).latency is None


def test_rates_are_of_all_turns() -> None:
    row = result(record([100.0] * 30), record([200.0] * 10))
    assert (row.answered, row.rounds, row.seconds) == (40, 2, 2.0)
    assert (row.requests_per_s, row.rows_per_s) == (20.0, 40.0)
    assert row.client_cpu_us == pytest.approx(0.2e6 / 40)
    assert row.latency is not None
    assert row.latency.p50_us == 100.0


def test_the_first_is_compared_turn_by_turn() -> None:
    first = found(record([100.0] * 30), record([100.0] * 30), record([100.0] * 30))
    other = (record([300.0] * 10), record([200.0] * 15), record([400.0] * 10))
    against = result(*other, first=first).first_is
    assert against is not None
    assert (against.requests.median, against.requests.low) == pytest.approx((3.0, 2.5))
    assert (against.p50.median, against.p50.high) == pytest.approx((3.0, 3.5))
    assert result(*other[:2], record([]), first=first).first_is is None


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (result(record([1.0] * 9, cpu=0.95)), "the client itself was the limit"),
        (result(record([1.0] * 9, late_us=5000.0)), "the client could not keep the rate"),
        (result(record([1.0] * 9, late_us=1.0), held=3), "3 requests waited in the client"),
        (result(Record(late_ns=array("q", [1] * 9), wall_ns=10**9)), "9.0 were due"),
        (result(Record(errors=Counter(timeout=2), wall_ns=10**9)), "within --timeout"),
    ],
)
def test_what_makes_numbers_doubtful_is_said(row: Result, note: str) -> None:
    assert any(note in each for each in row.notes), row.notes


def test_nothing_is_said_of_a_quiet_run() -> None:
    assert result(record([100.0] * 9, late_us=20.0)).notes == ()
    assert result(record([100.0] * 9), held=5).notes == ()  # a closed loop has no due times


def test_busy_is_told_apart() -> None:
    turn = record([1.0])
    turn.errors.update({"503": 3, "UNAVAILABLE": 1, "500": 2})
    row = result(turn)
    assert (row.busy, row.errors) == (4, {"503": 3, "500": 2, "UNAVAILABLE": 1})


def test_a_servers_own_split() -> None:
    counted = Counters(10, 40, 5, 1_000_000, 20_000, 400_000, 30_000) - Counters()
    told = split(counted)
    assert told is not None
    assert (told.queue_us, told.input_us, told.infer_us, told.output_us) == (100, 2, 40, 3)
    assert told.rows_per_execution == 8
    assert split(Counters()) is None

"""Load on small servers that do what a test wants: each answer is counted once, as what it was."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from tests.bench.load.fake import FakeServer, Mood, fake_server
from tests.bench.load.fake_grpc import FakeGrpc, fake_grpc
from twofour.bench.load.client import parse_target
from twofour.bench.load.race import Load, measure
from twofour.bench.load.requests import Wanted
from twofour.bench.load.result import Result
from twofour.bench.load.schedule import Arrivals
from twofour.core.errors import InputError

PROBES = 8  # each request is asked once before the load


def load(seconds: float = 0.4, rate: float | None = None, callers: int = 4, **more: float) -> Load:
    arrivals = None if rate is None else Arrivals(rate, "constant")
    return Load(callers, arrivals, seconds, **{"warm_up_s": 0.0, "timeout_s": 2.0, **more})


def drive(url: str, how: Load, wanted: Wanted | None = None, **headers: str) -> Result:
    (row,) = measure([parse_target(url, "double", headers)], how, wanted or Wanted())
    return row


def mood(**changes: object) -> tuple[Result, FakeServer]:
    """A short closed load on such a server."""
    with fake_server(Mood(**changes)) as (url, fake):  # type: ignore[arg-type]
        return drive(url, load()), fake


def test_every_answer_is_counted() -> None:
    with fake_server() as (url, fake):
        row = drive(url, load(), Wanted(batch=3), authorization="Bearer t")
    assert row.errors == {}
    assert row.answered == fake.executed - PROBES
    assert row.rows_per_s == pytest.approx(3 * row.requests_per_s)
    assert set(fake.seen.shapes) == {(3, 4)}
    assert {each["authorization"] for each in fake.seen.headers} == {"Bearer t"}
    assert fake.seen.connections == 4
    assert row.latency is not None
    assert 0 < row.latency.p50_us <= row.latency.p99_us <= row.latency.max_us
    assert row.server == "fake 1"
    assert row.client_cpu_us > 0


@pytest.mark.parametrize("binary", [True, False])
def test_both_ways_send_the_same_numbers(binary: bool) -> None:
    x = np.array([[1.5, -2.0, 0.25, 4.0]], np.float32)
    with fake_server() as (url, fake):
        how = Load(1, None, 0.1, 0.0, 2.0, binary)
        row = drive(url, how, Wanted(arrays={"x": x}))
    assert row.errors == {}
    assert row.inputs == {"x": "1x4"}
    assert all((each == x).all() for each in fake.seen.values)


def test_the_servers_own_split_and_a_server_without() -> None:
    row, _ = mood()
    assert row.split is not None
    assert row.split.queue_us == pytest.approx(50.0)
    assert row.split.infer_us == pytest.approx(20.0)
    assert row.split.rows_per_execution == pytest.approx(3.0)
    assert mood(statistics=False)[0].split is None


def test_busy_answers_are_told_apart() -> None:
    row, fake = mood(status=lambda n: 503 if n >= PROBES and n % 2 else 200)
    assert row.busy == row.errors["503"] > 0
    assert row.words["503"] == "status 503, on purpose"
    assert row.answered + row.busy == next(fake.calls) - PROBES


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {
                "garbage": lambda n: (
                    b"no HTTP at all\r\n\r\n" if n >= PROBES and n % 3 == 0 else None
                )
            },
            "wrong",
        ),
        ({"garbage": lambda n: b"" if n >= PROBES and n % 3 == 0 else None}, "connection"),
        ({"truncated": lambda n: n >= PROBES and n % 3 == 0}, "wrong"),
        ({"status": lambda n: 500 if n >= PROBES and n % 3 == 0 else 200}, "500"),
    ],
)
def test_wrong_answers_and_hang_ups_are_errors(changes: dict[str, object], error: str) -> None:
    row, fake = mood(**changes)
    assert set(row.errors) == {error}
    assert row.answered > row.errors[error] > 0
    assert row.answered + row.errors[error] == next(fake.calls) - PROBES


def test_an_answer_cut_short_is_a_hang_up() -> None:
    half = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"
    row, _ = mood(garbage=lambda n: half if n == PROBES + 1 else None)
    assert row.errors == {"connection": 1}


def test_connections_that_the_server_closes_are_opened_anew() -> None:
    row, fake = mood(closes=True)
    assert row.errors == {}
    assert row.answered > 4
    assert fake.seen.connections >= row.answered


def test_no_answer_within_the_time() -> None:
    """The server stalls for longer than --timeout; then all is well again."""
    with fake_server(Mood(delay_s=lambda n: 0.5 if n == PROBES + 5 else 0.0)) as (url, _):
        row = drive(url, load(1.0, callers=2, timeout_s=0.2))
    assert 1 <= row.errors["timeout"] <= 4
    assert row.answered > 5
    assert any("--timeout" in note for note in row.notes)


def stalled(n: int) -> float:
    return 0.4 if n == PROBES + 20 else 0.0


def test_an_open_loop_shows_a_stall_and_a_closed_one_hides_it() -> None:
    """Of 200 requests due in a second, 80 are due while the server sleeps for 0.4 s."""
    with fake_server(Mood(delay_s=stalled)) as (url, _):
        open_ = drive(url, load(1.0, rate=200.0, callers=200))
    with fake_server(Mood(delay_s=stalled)) as (url, _):
        closed = drive(url, load(1.0, callers=1))
    assert open_.latency is not None
    assert closed.latency is not None
    assert open_.answered == 200
    assert open_.latency.p90_us > 150_000
    assert open_.latency.max_us > 350_000
    assert closed.latency.max_us > 350_000
    assert closed.latency.p90_us < 100_000


def test_waiting_in_the_client_counts_too() -> None:
    """One connection only: latencies still count from when requests were due, and it is told."""
    with fake_server(Mood(delay_s=stalled)) as (url, fake):
        row = drive(url, load(1.0, rate=200.0, callers=1))
    assert row.latency is not None
    assert row.latency.p90_us > 150_000
    assert fake.seen.connections == 1
    assert row.held >= 60
    assert any("waited in the client" in note for note in row.notes)


def test_a_client_that_stalls_says_so() -> None:
    """Its event loop is held up: latencies count from when requests were due, not sent."""
    stalls = iter([0.0, 0.3])
    with fake_server() as (url, _):
        target, how = parse_target(url, "double", {}), load(1.0, rate=100.0, callers=100)
        (row,) = measure([target], how, Wanted(), lambda *_: time.sleep(next(stalls, 0.0)))
    assert row.latency is not None
    assert row.late_p99_us is not None
    assert row.late_p99_us > 200_000
    assert row.latency.p90_us > 100_000
    assert any("could not keep the rate" in note for note in row.notes)


def test_requests_come_at_the_rate_asked_for() -> None:
    with fake_server() as (url, _):
        row = drive(url, load(1.0, rate=100.0, callers=64, warm_up_s=0.2))
    assert row.answered == 100
    assert row.late_p99_us is not None


def test_servers_take_turns() -> None:
    with fake_server() as (fast, one), fake_server(Mood(delay_s=lambda n: 0.01)) as (slow, other):
        targets = [parse_target(url, "double", {}) for url in (fast, slow)]
        first, second = measure(targets, load(1.2, callers=1), Wanted())
    assert first.first_is is None
    assert second.first_is is not None
    assert (first.rounds, second.rounds) == (3, 3)
    assert second.first_is.p50.median > 1.5
    assert second.first_is.requests.median > 1.5
    assert min(one.executed, other.executed) > PROBES
    assert (first.name, second.name) == (fast, slow)


def test_a_server_that_goes_away_is_told() -> None:
    with fake_server(Mood(closes=True)) as (url, fake):
        fake.mood.garbage = lambda n: b"" if n >= PROBES else None
        row = drive(url, load(0.3, callers=2))
    assert set(row.errors) == {"connection"}
    assert row.answered == 0
    assert row.latency is None
    assert row.errors["connection"] < 200  # a failing server is not flooded


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there(scheme: str) -> None:
    with pytest.raises(InputError, match="cannot connect"):
        drive(f"{scheme}://127.0.0.1:{free_port()}", load(timeout_s=0.5))


def test_an_unknown_model_and_a_refused_request() -> None:
    with fake_server(Mood(status=lambda n: 400)) as (url, _):
        with pytest.raises(InputError, match="no metadata of model 'none'"):
            measure([parse_target(url, "none", {})], load(), Wanted())
        with pytest.raises(InputError, match=r"refuses the request(.|\n)*on purpose"):
            drive(url, load())


def test_an_answer_that_cannot_be_read() -> None:
    with (
        fake_server(Mood(truncated=lambda n: True)) as (url, _),
        pytest.raises(InputError, match="cannot be read"),
    ):
        drive(url, load())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Load(duration_s=0),
        lambda: Load(timeout_s=-1),
        lambda: Load(warm_up_s=-1),
        lambda: Load(arrivals=Arrivals(0.0)),
        lambda: Load(arrivals=Arrivals(float("nan"))),
    ],
)
def test_impossible_loads_are_refused(make: Callable[[], Load]) -> None:
    with pytest.raises(InputError, match="cannot measure"):
        make()


def test_grpc() -> None:
    fake = FakeGrpc()
    with fake_grpc(fake) as url:
        row = drive(url, load(), Wanted(batch=2), authorization="Bearer t")
    assert row.errors == {}
    assert row.answered == next(fake.calls) - PROBES > 0
    assert row.rows_per_s == pytest.approx(2 * row.requests_per_s)
    assert (row.server, row.split) == ("fake 1", None)
    assert {each["authorization"] for each in fake.metadata} == {"Bearer t"}


def test_grpc_errors() -> None:
    busy = grpc.StatusCode.UNAVAILABLE
    with fake_grpc(
        FakeGrpc(lambda n: busy if n >= PROBES and n % 2 else grpc.StatusCode.OK)
    ) as url:
        row = drive(url, load())
        with pytest.raises(InputError, match="no model none"):
            measure([parse_target(url, "none", {})], load(), Wanted())
    assert row.busy == row.errors["UNAVAILABLE"] > 0
    assert row.words["UNAVAILABLE"] == "on purpose"


def test_grpc_without_an_answer_in_time() -> None:
    with fake_grpc(FakeGrpc(delay_s=lambda n: 0.3 if n >= PROBES else 0.0)) as url:
        row = drive(url, load(0.5, rate=20.0, callers=2, timeout_s=0.1))
    assert set(row.errors) == {"timeout"}
    assert row.answered + row.errors["timeout"] == 10
    assert row.held > 0

from __future__ import annotations

import bisect
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.sample_status import SampleServer, broken, several, version
from twofour.serve.models.tally import ROWS, SECONDS, Histogram, Tally
from twofour.serve.readings import ServerReading, VersionReading
from twofour.serve.status import Status
from twofour.serve.totals import Totals
from twofour.serve.window import COLUMNS, PHASES, POINTS, STEP, quantile_ms


class Server:
    def __init__(self, *versions: VersionReading) -> None:
        self.now = 1000.0
        self.set(*versions)
        self.status = Status(lambda: self.reading, Totals())

    def set(self, *versions: VersionReading) -> None:
        self.reading = ServerReading("s", "1", True, versions=versions, swaps={"m": 2})

    def tick(self, seconds: int = 1) -> None:
        for _ in range(seconds):
            self.status.tick(self.now)
            self.now += 1

    def version(self, since: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.document(since)["models"][0]["versions"][0]
        return found

    def document(self, since: int = 0) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(self.status.document(since))
        return plain


def answer(tally: Tally, count: int, ms: float = 4.0) -> None:
    for _ in range(count):
        for name in PHASES:
            getattr(tally, name).add(ms / 1e3)
        tally.rows.add(4)


def test_rates_and_times_are_those_of_the_last_minute() -> None:
    tally = Tally()
    server = Server(VersionReading("m", "1", tally))
    server.tick()
    answer(tally, 6000, ms=900)
    server.tick(70)
    assert server.version()["requests_per_s"] == 0
    assert server.version()["latency_ms"]["total"]["p99"] is None
    for _ in range(30):
        answer(tally, 20)
        tally.failures["BusyError"] += 1
        server.tick()
    found = server.version()
    assert found["requests_per_s"] == 10
    assert found["errors_per_s"] == 0.5
    assert found["failures"] == {"busy": 30}
    assert 2 < found["latency_ms"]["total"]["p50"] <= 5
    assert sum(found["phases"]["queue"]) == 600
    assert found["batch_rows"][ROWS.index(4)] == 600
    assert sum(found["batch_rows"]) == 600
    assert found["mean_rows"] == 4


def test_a_new_version_counts_from_its_first_second() -> None:
    tally = Tally()
    server = Server(VersionReading("m", "1", tally))
    answer(tally, 30)
    server.tick()
    assert server.version()["requests_per_s"] == 30


def test_readers_get_only_points_that_they_have_not() -> None:
    tally = Tally()
    server = Server(VersionReading("m", "1", tally, queue_length=3, instances=2, busy=1))
    for _ in range(20):
        answer(tally, 5)
        server.tick()
    document = server.document()
    assert document["point"] == 20 // STEP
    history = document["models"][0]["versions"][0]["history"]
    assert history["first"] == 1
    assert history["requests_per_s"] == [5] * 10
    assert history["queue_length"] == [3] * 10
    assert history["busy"] == [1] * 10
    assert all(2 < p99 <= 5 for p99 in history["p99_ms"])
    answer(tally, 7)
    server.tick(STEP)
    rest = server.version(since=10)["history"]
    assert rest["first"] == 11
    assert rest["requests_per_s"] == [3.5]
    none = server.version(since=11)["history"]
    assert none["first"] == 12
    assert all(none[name] == [] for name in COLUMNS)
    assert server.version(since=-5)["history"]["first"] == 1
    assert server.version(since=10**9)["history"]["requests_per_s"] == []


def test_the_longest_queue_between_two_points_is_shown() -> None:
    server = Server(VersionReading("m", "1", Tally(), queue_length=9))
    server.tick()
    server.set(replace(server.reading.versions[0], queue_length=0))
    server.tick()
    assert server.version()["history"]["queue_length"] == [9]


def test_memory_is_bounded() -> None:
    tally = Tally()
    server = Server(VersionReading("m", "1", tally))
    for _ in range(STEP * POINTS + 50):
        answer(tally, 1)
        server.tick()
    history = server.version()["history"]
    assert len(history["p50_ms"]) == POINTS
    assert history["first"] == 26
    (seen,) = server.status._seen.values()
    assert len(seen.window._ring) == 61
    server.set()
    server.tick(400)
    assert server.status._seen == {}
    assert server.document()["models"] == []


def test_a_reload_is_no_drop_of_the_rate() -> None:
    server = Server(VersionReading("m", "1", first := Tally()))
    for _ in range(10):
        answer(first, 8)
        server.tick()
    server.set(VersionReading("m", "1", second := Tally()))
    for _ in range(10):
        answer(second, 8)
        server.tick()
    assert server.version()["requests_per_s"] == 8
    assert set(server.version()["history"]["requests_per_s"]) == {8}


def test_versions_of_a_model_are_together_with_their_states() -> None:
    document = json.loads(several().status.document())
    assert [each["model"] for each in document["models"]] == sorted(
        each["model"] for each in document["models"]
    )
    (resnet,) = [each for each in document["models"] if each["model"] == "resnet50"]
    assert [each["version"] for each in resnet["versions"]] == ["3", "4", "5"]
    assert [each["state"] for each in resnet["versions"]] == ["READY", "READY", "UNAVAILABLE"]
    assert "no engine fits" in resnet["versions"][2]["reason"]
    assert resnet["swaps"] == 2
    assert document["server"]["refused"] == {"not_found": 12}
    assert document["server"]["ready"] is False
    assert document["row_bounds"] == list(ROWS)
    assert document["bounds_ms"][:6] == [0.01, 0.015, 0.02, 0.03, 0.05, 0.07]


def test_a_version_that_was_never_seen_has_empty_figures() -> None:
    server = SampleServer(seconds=3)
    server.reading = replace(
        server.reading, versions=[version("new", 1), broken("new", 2)], swaps={}
    )
    (model,) = json.loads(server.status.document())["models"]
    assert [each["requests_per_s"] for each in model["versions"]] == [0, 0]
    assert model["versions"][0]["history"]["p50_ms"] == []


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 29), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_lie_in_the_bucket_of_the_exact_one(values: list[float], q: float) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.add(value)
    found = quantile_ms(histogram.counts, q)
    at = next(n for n in range(1, len(values) + 1) if n >= q * len(values))
    bucket = bisect.bisect_left(SECONDS, sorted(values)[at - 1])
    low = SECONDS[bucket - 1] if bucket else 0.0
    assert found is not None
    assert low * 1e3 * 0.999 <= found <= SECONDS[bucket] * 1e3 * 1.001


def test_quantiles_of_nothing_and_beyond_the_last_bound() -> None:
    counts = [0] * (len(SECONDS) + 1)
    assert quantile_ms(counts, 0.5) is None
    counts[-1] = 3
    assert quantile_ms(counts, 0.5) == 30_000


@pytest.mark.parametrize("seconds", [1, 2, 5])
def test_points_come_in_equal_steps(seconds: int) -> None:
    server = Server(VersionReading("m", "1", Tally()))
    points = []
    for _ in range(12):
        server.tick(seconds)
        points.append(server.document()["point"])
    assert points == sorted(points)
    assert all(b - a <= (seconds + 1) // STEP + 1 for a, b in pairwise(points))
    assert points[-1] == 12 * seconds // STEP

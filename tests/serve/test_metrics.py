from __future__ import annotations

import asyncio

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from twofour.serve import errors
from twofour.serve.errors import BusyError, MalformedError, ServeError
from twofour.serve.metrics import HISTOGRAMS, Metrics
from twofour.serve.models.queue import Job, Key
from twofour.serve.models.tally import SECONDS, Tally
from twofour.serve.readings import REASONS, ServerReading, VersionReading
from twofour.serve.totals import SETTLED_S, SHOWN_S, Totals

MS = 1_000_000
ORDER = ("le", "model", "version", "result", "reason")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def job(queue_ms: float, compute_ms: float, batch_rows: int) -> Job:
    started = int(queue_ms * MS)
    one = Job({}, 1, 0, Key(0, ()), 1, 0, None, lambda _: None)
    one.started_ns, one.computing_ns = started, started + MS // 10
    one.computed_ns = one.computing_ns + int(compute_ms * MS)
    one.batch_rows = batch_rows
    return one


def served(count: int) -> Tally:
    tally = Tally()
    for _ in range(count):
        one = job(queue_ms=1.5, compute_ms=4, batch_rows=3)
        tally.answered(one, 0, one.computed_ns + MS)
        tally.ran(one)
    return tally


class Server:
    def __init__(self, *versions: VersionReading) -> None:
        self.reading = ServerReading("s", "0.1", True, versions=versions)
        self.metrics = Metrics(lambda: self.reading, Totals())

    def set(self, *versions: VersionReading) -> None:
        self.reading = ServerReading("s", "0.1", True, versions=versions)

    def page(self, accept: str = "") -> str:
        return asyncio.run(self.metrics.page(accept))[0].decode()

    def samples(self) -> dict[tuple[str, ...], float]:
        return {
            (
                sample.name,
                *(sample.labels[name] for name in ORDER if name in sample.labels),
            ): sample.value
            for family in parse_text(self.page())
            for sample in family.samples
        }


def test_histograms_and_counters_say_what_the_tally_has() -> None:
    tally = served(5)
    tally.failed(BusyError("full"), 0, MS)
    tally.failed(MalformedError("bad"), 0, MS)
    found = Server(
        VersionReading("m", "3", tally, queue_length=7, instances=2, busy=1, memory_bytes=1000)
    ).samples()
    assert found["twofour_request_queue_seconds_bucket", "0.001", "m", "3"] == 0
    assert found["twofour_request_queue_seconds_bucket", "0.002", "m", "3"] == 5
    assert found["twofour_request_queue_seconds_bucket", "+Inf", "m", "3"] == 5
    assert found["twofour_request_queue_seconds_sum", "m", "3"] == pytest.approx(5 * 0.0015)
    assert found["twofour_request_seconds_sum", "m", "3"] == pytest.approx(5 * 0.0066)
    assert found["twofour_request_seconds_count", "m", "3"] == 5
    assert found["twofour_batch_rows_bucket", "4.0", "m", "3"] == 5
    assert found["twofour_batch_rows_bucket", "2.0", "m", "3"] == 0
    assert found["twofour_requests_total", "m", "3", "ok"] == 5
    assert found["twofour_requests_total", "m", "3", "busy"] == 1
    assert found["twofour_requests_total", "m", "3", "malformed"] == 1
    assert found["twofour_refused_total", "m", "3", "busy"] == 1
    assert found["twofour_refused_total", "m", "3", "timed_out"] == 0
    assert ("twofour_refused_total", "m", "3", "malformed") not in found
    assert found["twofour_queue_length", "m", "3"] == 7
    assert found["twofour_instances_busy", "m", "3"] == 1
    assert found["twofour_model_ready", "m", "3"] == 1
    assert found["twofour_model_memory_bytes", "m", "3"] == 1000
    assert ("process_cpu_seconds_total",) in found


def test_every_metric_parses_in_both_formats_and_its_pieces_are_one_page() -> None:
    versions = [VersionReading(f"m{i}", "1", served(i)) for i in range(30)]
    server = Server(*versions)
    body, content_type = asyncio.run(server.metrics.page(OPENMETRICS))
    assert content_type.startswith("application/openmetrics-text")
    assert body.count(b"# EOF") == 1
    assert body.endswith(b"# EOF\n")
    open_metrics = {family.name: family for family in parse_openmetrics(body.decode())}
    text = {family.name: family for family in parse_text(server.page())}
    for name in HISTOGRAMS:
        buckets = len(SECONDS) if name != "twofour_batch_rows" else 11
        assert len(open_metrics[name].samples) == 30 * (buckets + 3)
        assert len(text[name].samples) == 30 * (buckets + 3)
    assert asyncio.run(server.metrics.page(""))[1].startswith("text/plain")


def test_the_loop_goes_on_while_a_large_page_is_made() -> None:
    server = Server(*(VersionReading(f"m{i}", "1", served(1)) for i in range(40)))

    async def turns() -> int:
        page = asyncio.create_task(server.metrics.page(""))
        count = 0
        while not page.done():
            count += 1
            await asyncio.sleep(0)
        return count

    assert asyncio.run(turns()) > 25


def test_counters_go_on_when_a_version_is_unloaded_and_loaded_again() -> None:
    old = served(5)
    server = Server(VersionReading("m", "1", old))
    key = ("twofour_requests_total", "m", "1", "ok")
    assert server.samples()[key] == 5
    server.set(VersionReading("m", "1", served(2)))
    assert server.samples()[key] == 7
    old.answered(job(1, 1, 1), 0, 9 * MS)  # it was on its way
    assert server.samples()[key] == 8
    server.set()
    gone = server.samples()
    assert gone[key] == 8
    assert ("twofour_model_ready", "m", "1") not in gone
    server.set(VersionReading("m", "1", served(1)))
    assert server.samples()[key] == 9


def test_what_is_gone_for_long_is_no_longer_shown_and_still_counted() -> None:
    totals = Totals()
    totals.update([VersionReading("m", "1", served(3))], 0)
    assert [each.tally().total.count for each in totals.update([], SHOWN_S - 1)] == [3]
    assert totals.update([], SHOWN_S + 1) == []
    (back,) = totals.update([VersionReading("m", "1", served(2))], SHOWN_S + SETTLED_S + 2)
    assert back.tally().total.count == 5
    assert back.leaving == []


def test_what_has_no_version_is_counted_under_a_known_reason() -> None:
    server = Server()
    refused = {"NotFoundError": 4, "SomeError": 1, "OtherError": 2}
    server.reading = ServerReading("s", "1", True, refused=refused, swaps={"m": 3})
    found = server.samples()
    assert found["twofour_refused_total", "", "", "not_found"] == 4
    assert found["twofour_refused_total", "", "", "other"] == 3
    assert found["twofour_swaps_total", "m"] == 3


def test_every_error_has_a_reason() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    names = {each.__name__ for each in classes if issubclass(each, ServeError)} - {"ServeError"}
    assert set(REASONS) == names


def test_hostile_names_stay_inside_their_labels() -> None:
    name = 'a"} 1\n# TYPE x counter\nx{y="\\'
    found = Server(VersionReading(name, "1", served(1))).samples()
    assert found["twofour_requests_total", name, "1", "ok"] == 1

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from twofour.serve.errors import BusyError, FailedError, ServeError
from twofour.serve.log_lines import MOST_CHARACTERS, Line, as_json, as_text, of_record, of_request
from twofour.serve.logs import LogOptions, Logs
from twofour.serve.readings import Finished

log = logging.getLogger("twofour.serve.test")
MS = 1_000_000


def finished(error: ServeError | None = None, id: str = "r1", model: str = "resnet") -> Finished:
    marks = (10 * MS, 12 * MS, 13 * MS, 20 * MS, 21 * MS)
    if error is not None:
        marks = (10 * MS, 0, 0, 0, 21 * MS)
    headers = {"authorization": "Bearer 0123456789abcdef-secret", "traceparent": "x"}
    return Finished(id, model, "3", "http", error, 1, 4, *marks, headers)


@contextmanager
def logging_to(stream: io.StringIO, **options: Any) -> Iterator[Logs]:
    logs = Logs(LogOptions(**options), stream)
    try:
        yield logs
    finally:
        logs.close()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_request_is_one_json_line_with_its_times() -> None:
    stream = io.StringIO()
    with logging_to(stream, format="json", requests=True) as logs:
        logs.request(finished())
        logs.request(finished(BusyError("the queue is full")))
    good, refused = lines(stream)
    assert good["request_id"] == "r1"
    assert (good["model"], good["version"], good["status"]) == ("resnet", "3", 200)
    assert (good["queue_ms"], good["assembly_ms"], good["compute_ms"]) == (2, 1, 7)
    assert (good["output_ms"], good["total_ms"], good["batch_rows"]) == (1, 11, 4)
    assert (refused["status"], refused["reason"]) == (503, "busy")
    assert "queue_ms" not in refused


def test_requests_are_logged_on_demand_alone_but_failures_of_the_server_always() -> None:
    stream = io.StringIO()
    with logging_to(stream, format="json") as logs:
        logs.request(finished())
        logs.request(finished(BusyError("full")))
        failed = FailedError("the model failed")
        failed.__cause__ = ZeroDivisionError("in the kernel")
        logs.request(finished(failed))
    (line,) = lines(stream)
    assert line["level"] == "error"
    assert "ZeroDivisionError: in the kernel" in line["trace"]


def test_records_of_ours_from_the_level_on_and_warnings_of_libraries() -> None:
    stream = io.StringIO()
    with logging_to(stream, format="json", level="info"):
        log.debug("no")
        log.info("loaded %s", "resnet", extra={"fields": {"model": "resnet"}})
        logging.getLogger("botocore").info("no")
        logging.getLogger("botocore").warning("retry")
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("broken")
    found = lines(stream)
    assert [line["message"] for line in found[:3]] == ["loaded resnet", "retry", "broken"]
    assert found[0]["model"] == "resnet"
    assert "ValueError: why" in found[2]["trace"]
    assert not any(isinstance(each, Logs) for each in logging.getLogger().handlers)


def test_a_message_that_does_not_fit_its_arguments_is_written_still() -> None:
    record = logging.LogRecord("a", logging.INFO, "f", 1, "%d of it", ("no number",), None)
    assert of_record(record).message.startswith("%d of it (its arguments do not fit")


HOSTILE = "x\n2026-01-01T00:00:00Z error  fake\r\x1b[2J\u2028\u202e\x00\x85 end"


@pytest.mark.parametrize("form", [as_json, as_text])
def test_no_text_begins_a_line(form: Any) -> None:
    error = FailedError(HOSTILE)
    error.__cause__ = ValueError(HOSTILE)
    request = of_request(finished(error, HOSTILE, HOSTILE), time.time())
    record = Line(time.time(), "info", "a", HOSTILE, {HOSTILE: HOSTILE, "n": 1}, HOSTILE)
    for line in (request, record):
        first, *rest = form(line).splitlines()
        assert first[0] in "{0123456789"
        assert all(each.startswith("  | ") for each in rest)
        written = form(line).replace("\n", "")
        assert written.isprintable()
        assert "\u202e" not in written
    if form is as_json:
        assert json.loads(form(record))["message"] == HOSTILE


def test_text_values_are_quoted_where_they_could_be_taken_for_others() -> None:
    line = as_text(
        Line(0.0, "info", "a", "hello", {"a": "b c=d", "q": 'x"y', "p": "plain", "e": ""})
    )
    assert line == '1970-01-01T00:00:00.000000Z info    hello a="b c=d" q="x\\"y" p=plain\n'


@pytest.mark.parametrize(
    "secret",
    [
        "Authorization: Bearer hunter2hunter2",
        "s3://user:hunter2hunter2@bucket/key",
        "https://x/y?X-Amz-Signature=hunter2hunter2&b=1",
        "{'token': 'hunter2hunter2'}",
        "aws_secret_access_key=hunter2hunter2",
        'password: "hunter2hunter2"',
    ],
)
@pytest.mark.parametrize("form", [as_json, as_text])
def test_secrets_are_masked(secret: str, form: Any) -> None:
    for line in (
        Line(0.0, "info", "a", secret, {}),
        Line(0.0, "info", "a", "m", {"why": secret}),
        Line(0.0, "info", "a", "m", {}, f"Trace\nKeyError: {secret}"),
    ):
        assert "hunter2" not in form(line)
        assert "***" in form(line)
    assert "hunter2" not in form(of_request(finished(FailedError(secret)), 0.0))


def test_headers_are_never_written() -> None:
    for form in (as_json, as_text):
        assert "0123456789abcdef" not in form(of_request(finished(FailedError("x")), 0.0))


def test_long_texts_are_cut_and_masked_in_little_time() -> None:
    begun = time.perf_counter()
    for piece in ("a-", "token ", "://", "bearer  ", "token=", "x" * 7 + "="):
        line = as_text(Line(0.0, "info", "a", piece * 100_000, {}))
        assert len(line) < MOST_CHARACTERS + 200
    assert time.perf_counter() - begun < 5


class Stuck(io.StringIO):
    """A stream that stands still until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.go.wait(20)
        return super().write(text)


def test_a_stream_that_stands_still_blocks_nobody_and_lines_are_counted() -> None:
    stream = Stuck()
    logs = Logs(LogOptions(format="json", waiting=10), stream)
    begun = time.perf_counter()
    for number in range(100):
        log.info("line %d", number)
    assert time.perf_counter() - begun < 2
    assert 88 <= logs.dropped <= 90
    dropped = logs.dropped
    stream.go.set()
    logs.close()
    told = [line for line in lines(stream) if "were dropped" in line["message"]]
    assert sum(int(line["message"].split()[0]) for line in told) == dropped
    assert len(lines(stream)) == 100 - dropped + len(told)


def test_closing_does_not_wait_for_a_stream_that_stands_still() -> None:
    stream = Stuck()
    logs = Logs(LogOptions(waiting=2), stream)
    for _ in range(5):
        log.warning("x")
    begun = time.perf_counter()
    logs.close(timeout_s=0.2)
    assert time.perf_counter() - begun < 2
    assert logs not in logging.getLogger().handlers
    stream.go.set()


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_costs_lines_and_not_the_server() -> None:
    logs = Logs(LogOptions(), Broken())
    log.warning("a")
    log.warning("b")
    logs.close()
    assert logs.dropped == 2

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from twofour.core.errors import InputError
from twofour.serve.errors import FailedError, MalformedError, ServeError
from twofour.serve.readings import Finished

pytest.importorskip("opentelemetry.sdk", reason="the extra `trace` is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)
from opentelemetry.trace import SpanKind, StatusCode

from twofour.serve.traces import MOST_CHARACTERS, Traces, otlp

MS = 1_000_000
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Sink(InMemorySpanExporter):
    """Keeps its spans when it is shut down."""

    def shutdown(self) -> None:
        pass


def finished(
    error: ServeError | None = None, headers: dict[str, str] | None = None, model: str = "resnet"
) -> Finished:
    ended = time.perf_counter_ns()
    marks = [ended - ms * MS for ms in (20, 15, 14, 3, 0)]
    if error is not None:
        marks[1:4] = [0, 0, 0]
    return Finished("r1", model, "3", "grpc", error, 2, 8, *marks, headers=headers or {})


def spans_of(*requests: Finished, share: float = 1.0) -> dict[str, ReadableSpan]:
    sink = Sink()
    traces = Traces(sink, "my-server", "0.1", share)
    for request in requests:
        traces.request(request)
    traces.close()
    return {span.name: span for span in sink.get_finished_spans()}


@pytest.fixture
def spans() -> dict[str, ReadableSpan]:
    return spans_of(finished())


def test_phases_lie_inside_the_request_one_after_the_other(spans: dict[str, ReadableSpan]) -> None:
    assert list(spans) == ["queue", "assembly", "compute", "output", "infer resnet"]
    whole = spans["infer resnet"]
    assert whole.kind is SpanKind.SERVER
    assert whole.start_time is not None
    assert whole.end_time is not None
    assert (whole.end_time - whole.start_time) / MS == 20
    assert abs(whole.end_time - time.time_ns()) < 60e9
    at = whole.start_time
    for name, length in (("queue", 5), ("assembly", 1), ("compute", 11), ("output", 3)):
        child = spans[name]
        assert child.parent is not None
        assert child.parent.span_id == whole.context.span_id
        assert child.start_time == at
        assert child.end_time == at + length * MS
        at = child.end_time
    assert at == whole.end_time
    assert whole.attributes is not None
    assert whole.attributes["twofour.version"] == "3"
    assert whole.attributes["twofour.batch_rows"] == 8
    assert whole.resource.attributes["service.name"] == "my-server"


def test_a_request_belongs_to_the_trace_that_it_names() -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    whole = spans_of(finished(headers=headers), share=0)["infer resnet"]
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == SPAN


def test_what_is_not_sampled_makes_no_spans() -> None:
    assert spans_of(finished(headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})) == {}
    assert spans_of(finished(), share=0) == {}


@pytest.mark.parametrize("parent", ["", "00", f"00-{'0' * 32}-{SPAN}-01", "x" * 100_000])
def test_a_malformed_parent_is_none(parent: str) -> None:
    assert spans_of(finished(headers={"traceparent": parent}))["infer resnet"].parent is None


def test_errors_of_the_server_are_marked_and_those_of_clients_are_not() -> None:
    failed = spans_of(finished(FailedError("secret inside")))["infer resnet"]
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes is not None
    assert failed.attributes["error.type"] == "failed"
    assert "secret" not in failed.to_json()
    bad = spans_of(finished(MalformedError("no")))
    assert list(bad) == ["infer resnet"]
    assert bad["infer resnet"].status.status_code is StatusCode.UNSET


def test_texts_of_clients_are_bounded() -> None:
    (whole,) = spans_of(finished(MalformedError("no"), model="x" * 100_000)).values()
    assert len(whole.name) < 2 * MOST_CHARACTERS
    assert len(whole.to_json()) < 10_000


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match="share"):
        Traces(Sink(), "s", "1", 1.5)
    with pytest.raises(InputError, match="endpoint"):
        otlp("localhost:4318")
    otlp("http://localhost:4318/v1/traces").shutdown()


def test_nothing_of_it_is_imported_where_traces_are_off() -> None:
    folder = Path(__file__).resolve().parents[2] / "twofour/serve"
    modules = [
        ".".join(path.relative_to(folder.parents[1]).with_suffix("").parts)
        for path in sorted(folder.glob("*.py"))
        if path.name not in ("traces.py", "__init__.py")
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

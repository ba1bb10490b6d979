"""Traces of requests for OpenTelemetry, made after the fact from the times that are noted anyway.

    POST resnet            the whole, child of the span that the header `traceparent` names
      queue                until its batch was taken
      assembly             joining the inputs
      compute              of the network
      output               until the answer

Only who turns traces on imports this file: it needs the extra `trace`.

Source: W3C Trace Context; OpenTelemetry's conventions for attributes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from twofour.core.errors import InputError
from twofour.serve.readings import Finished, reason_of

MOST_CHARACTERS = 256
"""Of an attribute: model names and ids come from clients."""


def otlp(endpoint: str) -> SpanExporter:
    """An exporter over HTTP.

    Args:
        endpoint: of a collector, as "http://localhost:4318/v1/traces".

    Raises:
        InputError: no such address.
    """
    if not endpoint.startswith(("http://", "https://")):
        fix = "name the collector as http://localhost:4318/v1/traces"
        raise InputError("the trace endpoint is no HTTP address", [f"got {endpoint!r}"], fix)
    return OTLPSpanExporter(endpoint=endpoint)


class Traces:
    """Hands spans of finished requests to an exporter, from a thread of its own."""

    def __init__(self, exporter: SpanExporter, service: str, version: str, share: float) -> None:
        """Starts the exporter's thread.

        Args:
            exporter: as `otlp` makes it.
            service: name of this server in traces.
            version: of the server.
            share: 0 to 1, of the requests that name no trace; those that do follow it.

        Raises:
            InputError: no such share.
        """
        if not 0 <= share <= 1:
            raise InputError(f"a share of {share} of requests", [], "name one from 0 to 1")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service, "service.version": version}),
            sampler=ParentBased(TraceIdRatioBased(share)),
            span_limits=SpanLimits(max_attribute_length=MOST_CHARACTERS),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("twofour.serve", version)
        self._propagator = TraceContextTextMapPropagator()

    def request(self, finished: Finished) -> None:
        """Makes the spans of one request."""
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        name = f"infer {finished.model[:MOST_CHARACTERS]}" if finished.version else "infer"
        span = self._tracer.start_span(
            name,
            self._parent(finished.headers),
            SpanKind.SERVER,
            start_time=epoch_ns + finished.arrived_ns,
        )
        if span.is_recording():
            span.set_attributes(_attributes(finished))
            if finished.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            inside = set_span_in_context(span)
            for phase, begin, end in finished.phases():
                child = self._tracer.start_span(phase, inside, start_time=epoch_ns + begin)
                child.end(epoch_ns + end)
        span.end(epoch_ns + finished.ended_ns)

    def close(self) -> None:
        """Sends what waits and ends the thread."""
        self._provider.shutdown()

    def _parent(self, headers: Mapping[str, str]) -> Context:
        """Of a request; an empty context where it names no trace, or none that is well formed."""
        return self._propagator.extract(headers, Context())


def _attributes(finished: Finished) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "twofour.request_id": finished.id,
        "twofour.model": finished.model,
        "twofour.version": finished.version,
        "twofour.rows": finished.rows,
        "twofour.batch_rows": finished.batch_rows,
        "rpc.system": "kserve-v2",
        "network.protocol.name": finished.protocol,
        "http.response.status_code": finished.status,
    }
    if finished.error is not None:
        attributes["error.type"] = reason_of(type(finished.error).__name__)
    return attributes

"""Metrics of the server for Prometheus, made from tallies when they are asked for.

Nothing is observed while requests are served: a scrape reads what is counted anyway. It is rendered
a few hundred lines at a time, and the loop goes on in between.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from twofour.serve.gpus import GpuWatch, gpu_metrics
from twofour.serve.models.tally import Histogram, Tally
from twofour.serve.readings import REFUSED, ServerReading, reason_of
from twofour.serve.totals import Series, Totals

LABELS = ("model", "version")
HISTOGRAMS = {
    "twofour_request_queue_seconds": ("queue", "From a request's arrival until its batch starts"),
    "twofour_request_assembly_seconds": ("assembly", "Joining the inputs of a batch"),
    "twofour_request_compute_seconds": ("compute", "The network, for the batch of a request"),
    "twofour_request_output_seconds": ("output", "From the network's end until the answer"),
    "twofour_request_seconds": ("total", "From a request's arrival until its answer"),
    "twofour_batch_rows": ("rows", "Rows of a batch, once for each run"),
}
"""Name -> field of `Tally`, and what it is."""
_AT_ONCE = 200
"""Samples that are rendered before the loop goes on: less than a millisecond."""


class Metrics(Collector):
    """All metrics of one server.

    Labels are models, versions and reasons that the server itself knows: no request adds one.
    """

    def __init__(
        self, read: Callable[[], ServerReading], totals: Totals, gpus: GpuWatch | None = None
    ) -> None:
        """Reads nothing yet.

        Args:
            read: the server as it is now; called in the thread that asks for metrics.
            totals: of the server; may be shared with its status page.
            gpus: of its machine; None: a page shows none.
        """
        self._read, self._totals, self._gpus = read, totals, gpus
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        """Every metric as it is now."""
        reading = self._read()
        series = self._totals.update(reading.versions, time.monotonic())
        tallies = [(each, each.tally()) for each in series]
        for name, (field, text) in HISTOGRAMS.items():
            yield _histogram(name, text, [(each, getattr(tally, field)) for each, tally in tallies])
        yield _requests(tallies)
        yield _refused(tallies, reading)
        yield from _gauges([each for each in series if each.reading is not None])
        yield from _server(reading)
        yield from self._process.collect()

    async def page(self, accept: str) -> tuple[bytes, str]:
        """What a scrape gets.

        Args:
            accept: its header Accept: chooses OpenMetrics or Prometheus' text.

        Returns:
            The body and its content type.
        """
        encode, content_type = choose_encoder(accept)
        end = encode(_registry([]))  # "# EOF" of OpenMetrics, which stands once
        parts = []
        gpus = await self._gpus.read() if self._gpus is not None else ()
        for metric in itertools.chain(self.collect(), gpu_metrics(gpus)):
            head = encode(_registry([_part(metric, [])])).removesuffix(end)
            parts.append(head)
            for at in range(0, len(metric.samples), _AT_ONCE):
                text = encode(_registry([_part(metric, metric.samples[at : at + _AT_ONCE])]))
                parts.append(text.removesuffix(end).removeprefix(head))
                await asyncio.sleep(0)
        return b"".join(parts) + end, content_type


class _Given(Collector):
    """Metrics that were collected before."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _part(metric: Metric, samples: list[Sample]) -> Metric:
    part = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    part.samples = samples
    return part


def _registry(metrics: Iterable[Metric]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Given(metrics))
    return registry


def _histogram(name: str, text: str, series: list[tuple[Series, Histogram]]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=LABELS)
    for each, histogram in series:
        bounds = [f"{float(f'{bound:.6g}')}" for bound in histogram.bounds] + ["+Inf"]
        counts = itertools.accumulate(histogram.counts)
        buckets = list(zip(bounds, map(float, counts), strict=True))
        family.add_metric([each.model, each.version], buckets, histogram.total)
    return family


def _requests(tallies: list[tuple[Series, Tally]]) -> Metric:
    text = "Requests that a version got, by how they ended: ok, or why not"
    family = CounterMetricFamily("twofour_requests", text, labels=[*LABELS, "result"])
    for each, tally in tallies:
        results = {"ok": tally.total.count, **_reasons(tally.failures)}
        for result, count in results.items():
            family.add_metric([each.model, each.version, result], count)
    return family


def _refused(tallies: list[tuple[Series, Tally]], reading: ServerReading) -> Metric:
    text = "Requests that were not computed; model and version are empty where none was found"
    family = CounterMetricFamily("twofour_refused", text, labels=[*LABELS, "reason"])
    for each, tally in tallies:
        counts = _reasons(tally.failures)
        for reason in REFUSED:
            family.add_metric([each.model, each.version, reason], counts.get(reason, 0))
    for reason, count in _reasons(reading.refused).items():
        family.add_metric(["", "", reason], count)
    return family


def _reasons(errors: Mapping[str, int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for error, count in errors.items():
        counts[reason_of(error)] = counts.get(reason_of(error), 0) + count
    return counts


def _gauges(series: list[Series]) -> Iterator[Metric]:
    queue = GaugeMetricFamily("twofour_queue_length", "Requests that wait", labels=LABELS)
    busy = GaugeMetricFamily("twofour_instances_busy", "Sessions that compute", labels=LABELS)
    instances = GaugeMetricFamily("twofour_instances", "Sessions there are", labels=LABELS)
    ready = GaugeMetricFamily("twofour_model_ready", "1: the version answers", labels=LABELS)
    text = "Weights and activations of a version"
    memory = GaugeMetricFamily("twofour_model_memory_bytes", text, labels=LABELS)
    text = "Share of the model's requests that name no version, 0 to 1"
    share = GaugeMetricFamily("twofour_traffic_share", text, labels=LABELS)
    for each in series:
        if (reading := each.reading) is None:
            continue
        labels = [each.model, each.version]
        queue.add_metric(labels, reading.queue_length)
        busy.add_metric(labels, reading.busy)
        instances.add_metric(labels, reading.instances)
        ready.add_metric(labels, reading.state == "READY")
        memory.add_metric(labels, reading.memory_bytes)
        share.add_metric(labels, reading.share)
    yield from (queue, busy, instances, ready, memory, share)


def _server(reading: ServerReading) -> Iterator[Metric]:
    text = "How often a model's traffic moved to other versions"
    swaps = CounterMetricFamily("twofour_swaps", text, labels=["model"])
    for model, count in reading.swaps.items():
        swaps.add_metric([model], count)
    yield swaps
    yield GaugeMetricFamily("twofour_ready", "1: the server is ready", float(reading.ready))
    yield GaugeMetricFamily("twofour_draining", "1: it takes no requests", float(reading.draining))
    text = "Lines that the log had no room for"
    yield CounterMetricFamily("twofour_log_lines_dropped", text, reading.dropped_log_lines)
    build = GaugeMetricFamily("twofour_build_info", "1; the version", labels=["version"])
    build.add_metric([reading.version], 1)
    yield build

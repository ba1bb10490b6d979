"""GPUs on the metrics page: what NVML tells, under the names that Triton's page has for it.

NVML can take long, and hang with its driver: it is read in a thread of its own, one reading at a
time, and a scrape that waited long enough goes on without.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.metrics_core import GaugeMetricFamily, Metric, UntypedMetricFamily

from twofour.core.nvml import THROTTLES, GpuState, Nvml

log = logging.getLogger(__name__)
LABELS = ("gpu_uuid",)
PATIENCE_S = 2.0
GAUGES: dict[str, tuple[str, Callable[[GpuState], float | None]]] = {
    "nv_gpu_utilization": (
        "Share of the last moment in which a kernel ran, 0 to 1",
        lambda gpu: gpu.utilization,
    ),
    "nv_gpu_memory_used_bytes": ("By all processes", lambda gpu: gpu.memory_used_bytes),
    "nv_gpu_memory_total_bytes": ("There are", lambda gpu: gpu.memory_total_bytes),
    "nv_gpu_power_usage": ("Watts now", lambda gpu: gpu.power_watts),
    "nv_gpu_power_limit": ("Watts at which it slows down", lambda gpu: gpu.power_limit_watts),
    "twofour_gpu_temperature_celsius": ("Of the chip", lambda gpu: gpu.temperature_celsius),
}
"""Name -> what it is, and its value; None: this GPU does not tell."""


class GpuWatch:
    """Reads the GPUs for scrapes."""

    def __init__(self, nvml: Nvml | None = None, patience_s: float = PATIENCE_S) -> None:
        """Reads nothing yet.

        Args:
            nvml: by default that of this machine.
            patience_s: a scrape waits for it so long.
        """
        self._nvml, self._patience_s = nvml or Nvml(), patience_s
        self._reading: asyncio.Future[tuple[GpuState, ...]] | None = None

    async def read(self) -> tuple[GpuState, ...]:
        """All GPUs and slices; none where there is no NVML, or it does not answer."""
        if self._nvml.library is None:
            return ()
        if self._reading is None:
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(None, self._nvml.states)
        done, _ = await asyncio.wait([self._reading], timeout=self._patience_s)
        if not done:
            log.warning("NVML does not answer: the metrics page is without GPUs")
            return ()
        reading, self._reading = self._reading, None
        return reading.result()


def gpu_metrics(gpus: Sequence[GpuState]) -> Iterator[Metric]:
    """What a page shows of GPUs; nothing without."""
    if not gpus:
        return
    for name, (text, value_of) in GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=LABELS)
        for gpu in gpus:
            if (value := value_of(gpu)) is not None:
                gauge.add_metric([gpu.uuid], value)
        yield gauge
    energy = UntypedMetricFamily(
        "nv_energy_consumption", "Joules since the driver was loaded", labels=LABELS
    )
    throttled = GaugeMetricFamily(
        "twofour_gpu_throttled", "1: clocks are lowered for this reason", labels=(*LABELS, "reason")
    )
    info = GaugeMetricFamily("twofour_gpu_info", "1; its name", labels=(*LABELS, "name"))
    for gpu in gpus:
        if gpu.energy_joules is not None:
            energy.add_metric([gpu.uuid], gpu.energy_joules)
        for reason in THROTTLES if gpu.throttles is not None else ():
            throttled.add_metric([gpu.uuid, reason], reason in (gpu.throttles or ()))
        info.add_metric([gpu.uuid, gpu.name], 1)
    yield from (energy, throttled, info)

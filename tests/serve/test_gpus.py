"""GPUs on the metrics page, and instances pinned to one; NVML and the driver are made up."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.cuda_engines import COUNT, W, cuda_engine
from tests.fake_cuda import H200, FakeDriver, plant_driver
from tests.fake_nvml import SLICE, UUID, FakeNvml
from tests.sample_engines import sample_engine
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.nvml import Nvml
from twofour.serve.describe import model_config
from twofour.serve.errors import FailedError
from twofour.serve.gpus import GpuWatch
from twofour.serve.metrics import Metrics
from twofour.serve.models.instances import clock_ns
from twofour.serve.models.queue import Outputs
from twofour.serve.models.version import Ticket, Version
from twofour.serve.readings import ServerReading
from twofour.serve.repository.config import config_of
from twofour.serve.totals import Totals
from twofour.serve.triton.config import as_text, python_config

VALUES = np.linspace(-1, 1, COUNT, dtype=np.float32)
SECOND = "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f"


def page(watch: GpuWatch | None) -> str:
    metrics = Metrics(lambda: ServerReading("s", "0.1", True), Totals(), watch)
    return asyncio.run(metrics.page(""))[0].decode()


def samples(text: str) -> dict[tuple[str, str, str], float]:
    return {
        (sample.name, sample.labels["gpu_uuid"], sample.labels.get("reason", "")): sample.value
        for family in parse_text(text)
        for sample in family.samples
        if "gpu_uuid" in sample.labels
    }


def test_a_page_shows_gpus_under_the_names_of_triton() -> None:
    text = page(GpuWatch(Nvml(FakeNvml())))
    found = samples(text)
    assert found["nv_gpu_utilization", UUID, ""] == 0.75
    assert found["nv_gpu_memory_used_bytes", UUID, ""] == 1 << 30
    assert found["nv_gpu_memory_total_bytes", UUID, ""] == 4 << 30
    assert found["nv_gpu_power_usage", UUID, ""] == 350.5
    assert found["nv_gpu_power_limit", UUID, ""] == 700
    assert found["nv_energy_consumption", UUID, ""] == 5
    assert found["twofour_gpu_temperature_celsius", UUID, ""] == 61
    assert found["twofour_gpu_throttled", UUID, "hw_thermal"] == 1
    assert found["twofour_gpu_throttled", UUID, "sw_thermal"] == 0
    assert found["nv_gpu_memory_used_bytes", SLICE, ""] == 1 << 30
    assert ("nv_gpu_utilization", SLICE, "") not in found, "what a slice does not tell"
    assert f'twofour_gpu_info{{gpu_uuid="{UUID}",name="A GPU"}} 1.0' in text
    assert "twofour_ready" in text


@pytest.mark.parametrize("watch", [None, GpuWatch(Nvml(None))])
def test_a_page_without_nvml_has_no_gpus(watch: GpuWatch | None) -> None:
    text = page(watch)
    assert "gpu" not in text
    assert "twofour_ready" in text


def test_a_driver_that_hangs_delays_a_page_and_stops_nothing() -> None:
    library, answers = FakeNvml(), threading.Event()
    library.nvmlDeviceGetCount = lambda: answers.wait() and 2  # type: ignore[method-assign]

    async def scrapes() -> tuple[list[int], int]:
        watch = GpuWatch(Nvml(library), patience_s=0.05)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        counts = [len(await watch.read()) for _ in range(2)]
        during = ticks
        answers.set()
        counts.append(len(await watch.read()))
        ticking.cancel()
        return counts, during

    counts, during = asyncio.run(scrapes())
    assert counts == [0, 0, 3]
    assert during > 2, "the loop goes on"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return plant_driver(monkeypatch, (H200, H200))


def config(*instances: dict[str, Any]) -> Any:
    return config_of({"instances": list(instances), "warm_up": {"rounds": 1}}, "config.yaml")


async def answer(version: Version) -> Outputs | Exception:
    """What one request gets."""
    got: asyncio.Future[Outputs | Exception] = asyncio.get_running_loop().create_future()
    version.submit({"x": VALUES}, Ticket(clock_ns()), got.set_result)
    return await got


def test_instances_run_on_the_gpus_that_they_name(fake: FakeDriver) -> None:
    async def serve() -> None:
        engine = cuda_engine()
        places = ({"gpu": 0}, {"gpu": 0}, {"gpu": SECOND, "gpu_memory_mb": 1})
        version = Version("m", 1, config(*places), engine)
        await version.start()
        try:
            assert len(fake.memory) == 2 + 3, "weights on two GPUs, and three arenas"
            outputs = await answer(version)
            assert isinstance(outputs, dict), outputs
            assert (outputs["y"] == 2 * VALUES + W).all()
        finally:
            await version.close()
        assert not fake.memory

    asyncio.run(serve())


@pytest.mark.parametrize(
    ("instance", "error", "message"),
    [
        ({"gpu": 5}, InputError, "no GPU is 5"),
        ({"gpu": "MIG-12345678"}, InputError, "no GPU is 'MIG-12345678'"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_at_load(
    fake: FakeDriver, instance: dict[str, Any], error: type[Exception], message: str
) -> None:
    async def serve() -> None:
        with pytest.raises(error, match=message):
            await Version("m", 1, config(instance), cuda_engine()).start()

    asyncio.run(serve())
    assert not fake.memory


def test_a_model_larger_than_its_budget_is_refused_at_load(fake: FakeDriver) -> None:
    async def serve() -> None:
        version = Version("m", 1, config({"gpu": 0, "gpu_memory_mb": 1}), cuda_engine())
        version.plan.profiles[0].__dict__["arena_bytes"] = 2 << 20
        with pytest.raises(UnsupportedError, match="than it may have") as caught:
            await version.start()
        assert "arena 2.0 MiB, allowed are 1.0 MiB" in str(caught.value)

    asyncio.run(serve())
    assert not fake.memory


def test_a_model_for_the_cpu_is_not_pinned_to_a_gpu() -> None:
    async def serve() -> None:
        with pytest.raises(InputError, match="is told a GPU"):
            await Version("m", 1, config({"gpu": 0}), sample_engine()).start()

    asyncio.run(serve())


def test_a_gpu_that_breaks_is_no_fault_of_the_request(fake: FakeDriver) -> None:
    async def serve() -> None:
        version = Version("m", 1, config({}), cuda_engine())
        await version.start()
        try:
            fake.fails["cuGraphLaunch"] = 700
            failed = await answer(version)
            assert isinstance(failed, FailedError)
            assert "ILLEGAL_ADDRESS" in str(failed.__cause__)
            fake.fails.clear()
            assert isinstance(await answer(version), dict)
        finally:
            await version.close()

    asyncio.run(serve())


@pytest.mark.parametrize(
    "instance",
    [
        {"gpu": -1},
        {"gpu": 1.5},
        {"gpu": True},
        {"gpu": "H200"},
        {"gpu": "GPU-"},
        {"gpu": "GPU-00/../../x"},
        {"gpu_memory_mb": 0},
        {"gpus": [0]},
    ],
)
def test_a_place_that_is_none_is_refused(instance: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"instances\.0\.gpu"):
        config(instance)


def test_triton_is_told_in_its_words(fake: FakeDriver) -> None:
    async def plain() -> Any:
        made = config({"gpu": 1}, {"gpu": 1}, {"gpu": SECOND}, {})
        version = Version("m", 1, made, cuda_engine(shape=(1, COUNT)))
        own = model_config("m", version.plan, version.layout, made)["instance_group"]
        return own, python_config("m", version.plan, made)

    own, triton = asyncio.run(plain())
    assert [each["kind"] for each in own] == ["KIND_GPU"] * 4
    assert [each["gpus"] for each in own] == [[1], [1], [], []]
    groups = triton["instance_group"]
    assert [(each["count"], each["kind"]) for each in groups] == [
        (2, "KIND_GPU"),
        (1, "KIND_CPU"),
        (1, "KIND_GPU"),
    ]
    assert "kind: KIND_GPU\n  gpus: 1\n" in as_text(triton)

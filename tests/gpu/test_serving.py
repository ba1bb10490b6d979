"""Serving and what NVML tells, on a real GPU."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from tests.cuda_engines import W, mixed_engine
from tests.gpu.served import VALUES, served
from tests.sample_models import conv_model
from twofour.core.gpus import read_capabilities
from twofour.core.nvml import Nvml, energy_counter
from twofour.engine import Engine
from twofour.runtime.cuda.copies import copy
from twofour.runtime.cuda.device import open_device
from twofour.runtime.cuda.ranges import ranges
from twofour.runtime.session import Session

gpu_only = pytest.mark.skipif(not read_capabilities(), reason="no NVIDIA GPU here")
pytestmark = [pytest.mark.gpu, gpu_only]


@pytest.fixture(scope="module")
def engine() -> Engine:
    kernels = pytest.importorskip("tests.gpu.cuda_kernels")
    made: Engine = kernels.gpu_engine(open_device(0).capability)
    return made


def test_nvml_tells_of_the_gpu() -> None:
    pytest.importorskip("pynvml")
    nvml = Nvml()
    start = time.perf_counter()
    states = nvml.states()
    print(f"read in {(time.perf_counter() - start) * 1e3:.1f} ms:", nvml.why_not(), states)
    found = next(each for each in states if each.uuid == open_device(0).gpu.uuid)
    assert found.memory_total_bytes is not None
    assert found.memory_used_bytes is not None
    assert 0 < found.memory_used_bytes <= found.memory_total_bytes
    assert found.power_watts is not None
    assert 10 < found.power_watts < 2000
    assert found.temperature_celsius is not None
    assert 10 < found.temperature_celsius < 110
    assert found.utilization is not None
    assert 0 <= found.utilization <= 1
    counter = energy_counter(open_device(0).gpu.uuid)
    before = counter.read_uj()
    time.sleep(0.3)
    print(f"{(counter.read_uj() - before) / 0.3e6:.0f} W by the energy counter, idle")


def test_nvml_tells_of_a_gpu_at_work() -> None:
    """Large products for three seconds; at the limit of its power the GPU says that it is there."""
    pytest.importorskip("pynvml")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch has no GPU here")
    nvml, uuid, found = Nvml(), open_device(0).gpu.uuid, []
    x = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    end = time.monotonic() + 3
    while time.monotonic() < end:
        for _ in range(50):
            torch.mm(x, x)
        found.append(next(each for each in nvml.states() if each.uuid == uuid))
        torch.cuda.synchronize()
    limit = max(each.power_limit_watts or 0 for each in found)
    power = max(each.power_watts or 0 for each in found)
    reasons = {reason for each in found for reason in each.throttles or ()}
    print(f"{power:.0f} of {limit:.0f} W, clocks lowered for {sorted(reasons) or 'nothing'}")
    assert max(each.utilization or 0 for each in found) > 0.5
    if limit and power > 0.99 * limit:
        assert any("power" in reason for reason in reasons)


def test_instances_serve_from_the_gpu_that_they_name(engine: Engine) -> None:
    place = {"gpu": open_device(0).gpu.uuid, "gpu_memory_mb": 1}
    for factor, answer in enumerate(served(engine, {"instances": [place, place, {"gpu": 0}]}, 30)):
        assert isinstance(answer, dict), answer
        np.testing.assert_array_equal(answer["y"], 2 * (VALUES * np.float32(factor)) + W)


def test_the_metrics_page_shows_the_gpu() -> None:
    pytest.importorskip("pynvml")
    pytest.importorskip("prometheus_client")
    metrics = pytest.importorskip("twofour.serve.metrics")
    gpus = pytest.importorskip("twofour.serve.gpus")
    reading = pytest.importorskip("twofour.serve.readings").ServerReading("s", "0", True)
    totals = pytest.importorskip("twofour.serve.totals").Totals()
    page = metrics.Metrics(lambda: reading, totals, gpus.GpuWatch()).page("")
    text = asyncio.run(page)[0].decode()
    print("\n".join(line for line in text.splitlines() if "gpu" in line or "nv_" in line))
    assert f'nv_gpu_memory_used_bytes{{gpu_uuid="{open_device(0).gpu.uuid}"}}' in text


def test_steps_on_onnx_runtime_stand_between(engine: Engine) -> None:
    pytest.importorskip("onnxruntime")
    mixed = mixed_engine()
    made = replace(
        mixed, plan=replace(mixed.plan, target=engine.plan.target), code=dict(engine.code)
    )
    with Session(made) as session:
        np.testing.assert_array_equal(session.run({"x": VALUES})["y"], -4 * VALUES)
        (tap,) = session.walk({"x": VALUES})
        np.testing.assert_array_equal(tap.value, -2 * VALUES)
        print("steps, us:", session.step_times_us({"x": VALUES}, 20))


def test_a_server_builds_for_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    opening = pytest.importorskip("twofour.serve.repository.opening")
    store_module = pytest.importorskip("twofour.serve.repository.store")
    made = pytest.importorskip("twofour.serve.repository.config").Build
    builds = pytest.importorskip("twofour.serve.repository.rebuild").Builds(tmp_path / "cache")
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    onnx = conv_model(tmp_path / "models" / "m" / "1" / "m.onnx")
    store = store_module.Store(str(tmp_path / "models"), tmp_path / "cache")
    version = store.snapshot().models["m"].versions[1]
    arguments = ("--target", "cuda", "--tuning-effort", "0", "--shapes", "x:2x4x8x8")
    build = made(arguments=arguments)
    assert opening.needs_build(store, version, build, builds)
    opened = opening.open_engine(store, version, build, builds)
    assert not opening.needs_build(store, version, build, builds)
    x = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    (wanted,) = ReferenceEvaluator(str(onnx)).run(None, {"x": x})
    (profile,) = opened.engine.plan.profiles
    assert {step.kind for step in profile.steps} == {"cuda"}
    with Session(opened.engine) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], wanted, rtol=1e-3, atol=1e-3)


def test_ranges_are_pushed_where_there_is_a_library(engine: Engine) -> None:
    found = ranges()
    print("ranges by", found.by if found is not None else "nothing")
    with Session(engine) as session:
        assert session.layer_times_us({"x": VALUES}, 1).keys() == {0, 1}


def test_how_fast_inputs_reach_the_gpu() -> None:
    """No bound: these are figures for the log."""
    device, size = open_device(0), 128 << 20
    source, pinned, at = np.ones(size, np.uint8), device.pinned(size), device.take(size)
    stream = device.stream()

    def timed(work: Any) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return size / median(times[2:]) / 1e9

    def there() -> None:
        device.to_gpu(at, pinned, stream)
        device.wait(stream)

    one = timed(lambda: np.copyto(pinned, source))
    print(f"GB/s: numpy {one:.1f}, copies {timed(lambda: copy(pinned, source)):.1f}", end=", ")
    print(f"pinned to GPU {timed(there):.1f}")
    assert (pinned == 1).all()
    device.drop_stream(stream)
    device.give_back(at)
    device.unpin(pinned)

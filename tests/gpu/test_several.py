"""Several GPUs in one machine: an engine's sessions on each of them at the same time."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.cuda_engines import W
from tests.gpu.served import VALUES, served
from twofour.core.errors import Error
from twofour.core.gpus import read_capabilities
from twofour.engine import Engine
from twofour.runtime.cuda.device import Device, open_device
from twofour.runtime.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(read_capabilities()) < 2, reason="there are no two NVIDIA GPUs here"),
]


@pytest.fixture
def devices() -> list[Device]:
    try:
        return [open_device(0), open_device(1)]
    except Error as error:
        pytest.skip(f"this process does not see two GPUs: {error}")


@pytest.fixture
def engine(devices: list[Device]) -> Engine:
    kernels = pytest.importorskip("tests.gpu.cuda_kernels")
    made: Engine = kernels.gpu_engine(devices[1].capability)
    return made


def test_each_has_its_own_memory(devices: list[Device]) -> None:
    before = [each.memory()[0] for each in devices]
    at = devices[1].take(1 << 30)
    during = [each.memory()[0] for each in devices]
    devices[1].give_back(at)
    assert during[0] == before[0]
    assert during[1] <= before[1] - (1 << 30)


def test_sessions_run_on_both_at_the_same_time(devices: list[Device], engine: Engine) -> None:
    wrong: list[tuple[int | str, float]] = []

    def work(gpu: int | str, factor: float) -> None:
        values = VALUES * np.float32(factor)
        with Session(engine, gpu=gpu) as session:
            for _ in range(300):
                if not np.array_equal(session.run({"x": values})["y"], 2 * values + W):
                    wrong.append((gpu, factor))

    gpus: list[int | str] = [0, 1, devices[0].gpu.uuid, devices[1].gpu.uuid]
    threads = [threading.Thread(target=work, args=(gpu, i + 1)) for i, gpu in enumerate(gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_instances_of_a_model_stand_on_both(devices: list[Device], engine: Engine) -> None:
    places = [{"gpu": each.gpu.uuid, "gpu_memory_mb": 1} for each in devices]
    for factor, answer in enumerate(served(engine, {"instances": places}, 40)):
        assert isinstance(answer, dict), answer
        np.testing.assert_array_equal(answer["y"], 2 * (VALUES * np.float32(factor)) + W)

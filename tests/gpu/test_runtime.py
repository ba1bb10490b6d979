"""The runtime on a real GPU: memory, kernels, graphs, sessions side by side."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from tests.cuda_engines import COUNT, MIDDLE, W, X, Y, launch, sample_program
from twofour.core.cuda import Cuda
from twofour.core.cuda_program import Place
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.core.gpus import read_capabilities
from twofour.core.target import Target
from twofour.engine import Engine, Strided, TensorInfo, Write
from twofour.runtime.cuda import network
from twofour.runtime.cuda.device import Device, open_device
from twofour.runtime.cuda.driver import OutOfMemoryError
from twofour.runtime.cuda.prepared import Objects, Prepared, time_us
from twofour.runtime.session import Session

gpu_only = pytest.mark.skipif(not read_capabilities(), reason="no NVIDIA GPU here")
pytestmark = [pytest.mark.gpu, gpu_only]
VALUES = np.linspace(-1, 1, COUNT, dtype=np.float32)


@pytest.fixture
def device() -> Device:
    return open_device(0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    kernels = pytest.importorskip("tests.gpu.cuda_kernels")
    made: Engine = kernels.gpu_engine(open_device(0).capability)
    return made


@pytest.fixture
def stream(device: Device) -> Iterator[int]:
    made = device.stream()
    yield made
    device.drop_stream(made)


def test_the_gpu_is_the_one_that_nvidia_smi_shows(device: Device) -> None:
    gpu = device.gpu
    print(gpu, "driver for CUDA", device.driver.version, "memory", device.memory())
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    print(listed.stdout)
    assert gpu.uuid in listed.stdout
    assert gpu.capability == read_capabilities()[0]
    assert open_device(gpu.uuid) is device
    assert 0 < device.memory()[0] <= device.memory()[1]
    with pytest.raises(InputError, match="this process sees"):
        open_device("GPU-ffffffff")


def test_memory_goes_there_and_back(device: Device, stream: int) -> None:
    at, sent, got = device.take(1 << 20), np.arange(1 << 18, dtype=np.int32), np.zeros(9, np.int32)
    device.to_gpu(at, sent, stream)
    device.fill(at + 8, 255, 4, stream)
    device.from_gpu(got, at, stream)
    device.wait(stream)
    assert got.tolist() == [0, 1, -1, 3, 4, 5, 6, 7, 8]
    assert at % 256 == 0
    device.give_back(at)


def test_memory_is_given_back(device: Device) -> None:
    before, _ = device.memory()
    at = device.take(1 << 30)
    during, _ = device.memory()
    device.give_back(at)
    after, _ = device.memory()
    assert before - during >= 1 << 30
    assert after - during >= 1 << 30


def test_a_full_gpu_says_so_and_goes_on(device: Device) -> None:
    with pytest.raises(OutOfMemoryError, match="no room for everything") as caught:
        device.take(1 << 45, "everything")
    print(caught.value)
    assert "asked for 33,554,432.0 MiB, free are" in str(caught.value)
    device.give_back(device.take(16))


def test_what_is_no_code_is_refused(device: Device) -> None:
    with pytest.raises(EngineError, match="refuses an object of 9 bytes") as caught:
        device.load(np.frombuffer(b"no cubin!", np.uint8))
    print(caught.value)


def test_a_kernel_is_started_and_recorded(device: Device, stream: int, engine: Engine) -> None:
    module = device.load(engine.code["double"])
    kernel = device.kernel(module, "double_kernel", 100_000)
    x, y, pinned = device.take(256), device.take(256), device.pinned(256)
    held = pinned[:256].view(np.float32)

    def work() -> None:
        device.to_gpu(x, held, stream)
        device.launch(kernel, (2, 1, 1), 32, 100_000, (x, y, 0, 0), stream)
        device.from_gpu(held, y, stream)

    held[:] = VALUES
    work()
    device.wait(stream)
    assert (held == 2 * VALUES).all()
    graph = device.capture(stream, work)
    device.replay(graph, stream)
    device.replay(graph, stream)
    device.wait(stream)
    assert (held == 8 * VALUES).all()
    with pytest.raises(EngineError, match="'no_such_kernel'") as caught:
        device.kernel(module, "no_such_kernel", 0)
    print(caught.value)
    with pytest.raises(EngineError, match="10000000 bytes of shared memory") as caught:
        device.kernel(module, "double_kernel", 10_000_000)
    print(caught.value)
    device.drop_graph(graph)
    device.unload(module)
    device.unpin(pinned)
    for address in (x, y):
        device.give_back(address)


def test_an_error_within_a_recording_leaves_the_stream_usable(device: Device, stream: int) -> None:
    at = device.take(16)

    def broken() -> None:
        device.fill(at, 1, 16, stream)
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        device.capture(stream, broken)
    got = np.zeros(16, np.uint8)
    device.fill(at, 7, 16, stream)
    device.from_gpu(got, at, stream)
    device.wait(stream)
    assert (got == 7).all()
    device.give_back(at)


def test_an_engine_runs(engine: Engine, tmp_path) -> None:
    loaded = Engine.load(engine.save(tmp_path / "e.engine"))
    with Session(loaded) as session:
        for factor in (1, -3):
            got = session.run({"x": np.float32(factor) * VALUES})["y"]
            np.testing.assert_array_equal(got, 2 * np.float32(factor) * VALUES + W)
        times = []
        for _ in range(500):
            start = time.perf_counter_ns()
            session.run({"x": VALUES})
            times.append((time.perf_counter_ns() - start) / 1e3)
        print(f"a run of two tiny kernels: median {median(times):.1f} us, least {min(times):.1f}")


def test_large_inputs_go_in_parts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LARGE_BYTES", 1)
    with Session(engine) as session:
        for factor in (1, -3):
            got = session.run({"x": np.float32(factor) * VALUES})["y"]
            np.testing.assert_array_equal(got, 2 * np.float32(factor) * VALUES + W)


def test_sessions_run_side_by_side(engine: Engine) -> None:
    wrong: list[float] = []

    def work(factor: float) -> None:
        values = VALUES * np.float32(factor)
        with Session(engine) as session:
            for _ in range(200):
                if not np.array_equal(session.run({"x": values})["y"], 2 * values + W):
                    wrong.append(factor)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_session_is_used_by_several_threads(engine: Engine) -> None:
    wrong: list[float] = []
    with Session(engine) as session:

        def work(factor: float) -> None:
            values = VALUES * np.float32(factor)
            for _ in range(200):
                if not np.array_equal(session.run({"x": values})["y"], 2 * values + W):
                    wrong.append(factor)

        threads = [threading.Thread(target=work, args=(factor,)) for factor in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_layers_are_timed_and_walked(engine: Engine) -> None:
    at = Strided(MIDDLE.offset, 4 * COUNT, 0, 0)
    writes = (Write(TensorInfo("middle", "float32", (COUNT,)), "source", at),)
    first, second = engine.plan.layers
    layers = (replace(first, writes=writes), second)
    tapped = replace(engine, plan=replace(engine.plan, layers=layers))
    with Session(tapped) as session:
        (tap,) = session.walk({"x": VALUES})
        np.testing.assert_array_equal(tap.value, 2 * VALUES)
        times = session.layer_times_us({"x": VALUES}, 5)
        print("layers in a graph, us:", times)
        assert times.keys() == {0, 1}
        assert all(0.2 < time < 100 for time in times.values())
        np.testing.assert_array_equal(session.run({"x": VALUES})["y"], 2 * VALUES + W)


def test_a_timeline_has_every_layer(engine: Engine) -> None:
    with Session(engine) as session:
        runs = [session.timeline({"x": VALUES}) for _ in range(20)]
        for run in runs:
            (step,) = run.steps
            first, second = run.layers
            assert step.begin_ns <= first.begin_ns <= first.end_ns == second.begin_ns
            assert second.end_ns <= step.end_ns
        print("us of a run:", [round(run.run_us, 1) for run in runs])
        print("us of its layers:", [round(run.layers_us, 1) for run in runs])
        np.testing.assert_array_equal(session.run({"x": VALUES})["y"], 2 * VALUES + W)


def test_a_program_is_timed(device: Device, engine: Engine) -> None:
    blocks = {"arena": device.take(768), "weights": device.take(256)}
    objects = Objects(device, engine.code)
    ready = Prepared(device, sample_program(), objects, blocks)
    found = [time_us(device, ready.enqueue, 5) for _ in range(3)]
    print("two tiny kernels in a graph, us:", found)
    assert all(0.5 < time < 100 for time in found)
    ready.close()
    objects.close()
    for address in blocks.values():
        device.give_back(address)


def test_an_engine_for_another_gpu_is_refused(engine: Engine) -> None:
    target = Target("cuda", engine.plan.target.arch, "", cuda=Cuda("sm70"))
    with pytest.raises(UnsupportedError, match="GPU for sm70") as caught:
        Session(replace(engine, plan=replace(engine.plan, target=target)))
    print(caught.value)


def test_a_budget_holds(engine: Engine) -> None:
    with pytest.raises(UnsupportedError, match="than it may have") as caught:
        Session(engine, most_gpu_bytes=1000)
    print(caught.value)


def test_a_place_outside_is_refused_before_the_gpu_sees_it(engine: Engine) -> None:
    lies = replace(
        sample_program(),
        launches=(
            launch("double", 0, X, Place("arena", 1 << 30, 256)),
            launch("add", 1, X, X, Y),
        ),
    )
    held = {"net": np.frombuffer(lies.to_bytes(), np.uint8)}
    with pytest.raises(EngineError, match="lies outside arena"):
        Session(Engine(engine.plan, engine.weights, engine.code, held))

"""A GPU by its driver, which is made up here."""

from __future__ import annotations

import importlib
import threading

import numpy as np
import pytest

from tests.fake_cuda import TOTAL_BYTES, FakeDriver, plant_driver
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.runtime.cuda import driver as driver_module
from twofour.runtime.cuda.device import Device, open_device
from twofour.runtime.cuda.driver import Driver, OutOfMemoryError, uuid_text

A, B = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f", "MIG-10111213-1415-1617-1819-1a1b1c1d1e1f"
TWO = (("A GPU", (9, 0)), ("A GPU MIG 1g.18gb", (9, 0)))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return plant_driver(monkeypatch, TWO)


@pytest.fixture
def device(fake: FakeDriver) -> Device:
    return open_device(0)


@pytest.mark.parametrize("which", [1, B, B.lower(), B[:12], "10111213-1415"])
def test_a_gpu_is_opened_by_its_number_or_uuid(fake: FakeDriver, which: int | str) -> None:
    found = open_device(which)
    assert found is open_device(1)
    assert (found.gpu.uuid, found.gpu.name, found.capability) == (B, "A GPU MIG 1g.18gb", 90)
    assert open_device(A).gpu.index == 0
    assert found.driver.version == "13.2"


@pytest.mark.parametrize("which", [2, -1, "GPU-ff", "", "MIG-", "H200"])
def test_a_gpu_that_is_not_there_is_named_beside_those_that_are(
    fake: FakeDriver, which: int | str
) -> None:
    with pytest.raises(InputError, match="no GPU is") as caught:
        open_device(which)
    assert A in str(caught.value)
    assert B in str(caught.value)
    assert "CUDA_VISIBLE_DEVICES" in caught.value.fix


def test_a_uuid_is_written_as_nvidia_smi_does() -> None:
    assert uuid_text(bytes(range(16)), False) == A
    assert uuid_text(bytes(range(16, 32)), True) == B


def test_memory_goes_there_and_back(fake: FakeDriver, device: Device) -> None:
    stream, sent, got = device.stream(), np.arange(8, dtype=np.int64), np.zeros(8, np.int64)
    at = device.take(64)
    assert at % 256 == 0
    assert device.memory() == (TOTAL_BYTES - 64, TOTAL_BYTES)
    device.to_gpu(at, sent, stream)
    device.fill(at + 8, 255, 8, stream)
    device.from_gpu(got, at, stream)
    assert not got.any(), "nothing is there before the stream was waited for"
    device.wait(stream)
    assert got.tolist() == [0, -1, 2, 3, 4, 5, 6, 7]
    device.give_back(at)
    device.drop_stream(stream)
    assert not fake.memory
    assert not fake.streams
    assert not fake.stack, "what was current before is so again"


def test_pinned_memory_is_plain_memory(fake: FakeDriver, device: Device) -> None:
    held = device.pinned(16)
    held[:] = 7
    assert held.shape == (16,)
    device.unpin(held)
    assert not fake.pinned


def test_a_full_gpu_says_how_much_was_asked_and_is_free(device: Device) -> None:
    kept = device.take(TOTAL_BYTES // 2)
    with pytest.raises(OutOfMemoryError, match="no room for the arena on A GPU") as caught:
        device.take(TOTAL_BYTES, "the arena")
    assert "asked for 1.0 MiB, free are 0.5 MiB of 1.0 MiB" in str(caught.value)
    assert "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory" in str(caught.value)
    device.give_back(kept)


def test_an_error_names_call_error_and_text(fake: FakeDriver, device: Device) -> None:
    fake.fails["cuStreamCreate"] = 1
    with pytest.raises(UnsupportedError, match="CUDA refuses cuStreamCreate") as caught:
        device.stream()
    assert "CUDA_ERROR_INVALID_VALUE (1): invalid argument" in str(caught.value)
    fake.fails["cuStreamCreate"] = 12345
    with pytest.raises(UnsupportedError, match=r"error \(12345\): no text"):
        device.stream()
    fake.fails["cuStreamCreate"] = 700
    with pytest.raises(UnsupportedError, match="start the process again"):
        device.stream()
    assert not fake.stack


def test_code_is_loaded_and_started(fake: FakeDriver, device: Device) -> None:
    stream = device.stream()
    module = device.load(np.frombuffer(b"double", np.uint8))
    kernel = device.kernel(module, "double_kernel", 100_000)
    assert fake.shared == {kernel: 100_000}
    x, y = device.take(256), device.take(256)
    threes = np.full(64, 3, np.float32)
    device.to_gpu(x, threes, stream)
    device.launch(kernel, (2, 1, 1), 32, 100_000, (x, y, 0, 0), stream)
    got = np.zeros(64, np.float32)
    device.from_gpu(got, y, stream)
    device.wait(stream)
    assert (got == 6).all()
    device.unload(module)
    assert not fake.modules


def test_little_shared_memory_is_not_asked_for(fake: FakeDriver, device: Device) -> None:
    module = device.load(np.frombuffer(b"double", np.uint8))
    device.kernel(module, "double_kernel", 48 << 10)
    assert fake.shared == {}


def test_code_that_does_not_fit_is_refused(device: Device) -> None:
    with pytest.raises(EngineError, match=r"A GPU \(sm90\) refuses an object of 6 bytes") as caught:
        device.load(np.frombuffer(b"broken", np.uint8))
    assert "CUDA_ERROR_INVALID_IMAGE" in str(caught.value)
    module = device.load(np.frombuffer(b"add", np.uint8))
    with pytest.raises(EngineError, match="the kernel 'other'"):
        device.kernel(module, "other", 0)
    with pytest.raises(EngineError, match="1000000 bytes of shared memory"):
        device.kernel(module, "add_kernel", 1_000_000)


def test_a_graph_does_again_what_was_recorded(device: Device) -> None:
    stream, held, at = device.stream(), device.pinned(4), device.take(4)
    graph = device.capture(stream, lambda: device.to_gpu(at, held, stream))
    got = np.zeros(4, np.uint8)
    for value in (1, 2):
        held[:] = value
        device.replay(graph, stream)
        device.from_gpu(got, at, stream)
        device.wait(stream)
        assert (got == value).all()
    device.drop_graph(graph)


def test_an_error_within_a_recording_ends_it(fake: FakeDriver, device: Device) -> None:
    stream = device.stream()

    def broken() -> None:
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        device.capture(stream, broken)
    assert not fake.capturing
    assert not fake.stack


def test_events_tell_the_time_between_them(device: Device) -> None:
    stream, at = device.stream(), device.take(4)
    marks = [device.event(), device.event()]
    device.record(marks[0], stream)
    device.fill(at, 0, 4, stream)
    device.record(marks[1], stream)
    device.wait(stream)
    assert device.elapsed_us(*marks) == pytest.approx(2, abs=1e-6)
    for mark in marks:
        device.drop_event(mark)


def test_every_thread_may_use_it(fake: FakeDriver, device: Device) -> None:
    found: list[float] = []

    def work() -> None:
        stream, at, got = device.stream(), device.take(4), np.zeros(4, np.uint8)
        device.fill(at, 9, 4, stream)
        device.from_gpu(got, at, stream)
        device.wait(stream)
        found.append(got.mean())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [9] * 4


def test_without_cuda_bindings_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UnsupportedError, match="cuda-bindings is not installed") as caught:
        open_device(0)
    assert caught.value.fix == "pip install 'twofour[cuda]'"


def test_without_a_driver_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver((), 0)

    def missing(flags: int) -> tuple[int]:
        raise RuntimeError("libcuda.so.1\nnot found")

    monkeypatch.setattr(fake, "cuInit", missing)
    monkeypatch.setattr(driver_module, "_bindings", lambda: fake)
    with pytest.raises(UnsupportedError, match="its driver is not installed") as caught:
        Driver()
    assert "libcuda.so.1 not found" in str(caught.value)


def test_each_driver_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that lies where another one lay before."""
    for _ in range(20):
        fake, starts = FakeDriver((), 0), []

        def start(flags: int, starts: list[int] = starts) -> tuple[int]:
            starts.append(flags)
            return (0,)

        with monkeypatch.context() as patch:
            patch.setattr(fake, "cuInit", start)
            patch.setattr(driver_module, "_bindings", lambda fake=fake: fake)
            Driver()
            Driver()
        assert starts == [0]


def test_a_driver_without_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_driver(monkeypatch, ())
    with pytest.raises(InputError, match="this process sees none"):
        open_device(0)


def test_the_functions_are_those_of_cuda_bindings() -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    names = [name for name in vars(FakeDriver) if name.startswith("cu")]
    assert len(names) > 30
    assert [name for name in names if not hasattr(real, name)] == []
    fake = FakeDriver((), 0)
    for enum in (
        "CUdevice_attribute",
        "CUstreamCaptureMode",
        "CUfunction_attribute",
        "CUevent_record_flags",
    ):
        members = getattr(fake, enum).__members__
        assert members.keys() <= getattr(real, enum).__members__.keys()

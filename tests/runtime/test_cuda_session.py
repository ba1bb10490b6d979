"""Sessions on engines for a GPU, by a driver that is made up: no GPU is here."""

from __future__ import annotations

import functools
import gc
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.cuda_engines import (
    COUNT,
    KEPT,
    MIDDLE,
    W,
    X,
    Y,
    cuda_engine,
    launch,
    mixed_engine,
    sample_program,
)
from tests.fake_cuda import H200, KERNELS, FakeDriver, plant_driver
from twofour.core.cuda_program import CudaProgram, LibraryCall, Place, Transfer
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.engine import Engine, Layer, Plan, Profile, Step, Strided, TensorInfo, Write
from twofour.runtime.cuda import copies, prepared, ranges
from twofour.runtime.cuda import network as network_module
from twofour.runtime.cuda.device import open_device
from twofour.runtime.cuda.network import CudaNetwork
from twofour.runtime.cuda.prepared import Objects, Prepared, time_us
from twofour.runtime.session import Session

VALUES = np.linspace(-1, 1, COUNT, dtype=np.float32)
B = "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return plant_driver(monkeypatch, (H200, H200))


def nothing_left(fake: FakeDriver) -> None:
    assert not fake.memory
    assert not fake.pinned
    assert not fake.streams
    assert not fake.graphs
    assert not fake.events
    assert not fake.modules
    assert not fake.stack


def test_a_run_is_one_graph(fake: FakeDriver) -> None:
    with Session(cuda_engine()) as session:
        assert len(fake.graphs) == 1
        for factor in (1, 3):
            fake.calls.clear()
            got = session.run({"x": factor * VALUES})["y"]
            assert (got == 2 * factor * VALUES + W).all()
            work = [name for name in fake.calls if not name.startswith("cuCtx")]
            assert work == ["cuGraphLaunch", "cuStreamSynchronize"]
    nothing_left(fake)
    with pytest.raises(InputError, match="closed"):
        session.run({"x": VALUES})


def test_large_inputs_go_in_parts_before_the_graph(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "LARGE_BYTES", 1)
    monkeypatch.setattr(copies, "_PARTS", 2)
    monkeypatch.setattr(copies, "_ALIGNMENT", 1)
    with Session(cuda_engine()) as session:
        for factor in (1, 3):
            fake.calls.clear()
            got = session.run({"x": factor * VALUES})["y"]
            assert (got == 2 * factor * VALUES + W).all()
            work = [name for name in fake.calls if not name.startswith("cuCtx")]
            assert work[:3] == ["cuMemcpyHtoDAsync", "cuMemcpyHtoDAsync", "cuGraphLaunch"]
        assert session.layer_times_us({"x": VALUES}, 1).keys() == {0, 1}
        assert len(session.timeline({"x": VALUES}).layers) == 2
        assert (session.run({"x": VALUES})["y"] == 2 * VALUES + W).all()
    nothing_left(fake)


def test_results_are_the_callers_own(fake: FakeDriver) -> None:
    with Session(cuda_engine()) as session:
        first = session.run({"x": VALUES})["y"]
        session.run({"x": 5 * VALUES})
        assert (first == 2 * VALUES + W).all()


def test_sessions_share_weights_and_code_and_nothing_else(fake: FakeDriver) -> None:
    engine = cuda_engine()
    with Session(engine) as first:
        blocks, modules = set(fake.memory), set(fake.modules)
        with Session(engine) as second:
            assert len(fake.memory) == len(blocks) + 1, "one arena more"
            assert set(fake.modules) == modules
            assert len(fake.streams) == 2
            assert (second.run({"x": VALUES})["y"] == 2 * VALUES + W).all()
        assert set(fake.memory) == blocks
        assert (first.run({"x": VALUES})["y"] == 2 * VALUES + W).all()
    nothing_left(fake)


def test_sessions_run_side_by_side(fake: FakeDriver) -> None:
    engine, wrong = cuda_engine(), []

    def work(factor: float) -> None:
        with Session(engine) as session:
            for _ in range(20):
                got = session.run({"x": VALUES * np.float32(factor)})["y"]
                if not np.array_equal(got, 2 * (VALUES * np.float32(factor)) + W):
                    wrong.append(factor)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    nothing_left(fake)


def test_another_gpu_has_weights_of_its_own(fake: FakeDriver) -> None:
    engine = cuda_engine()
    with Session(engine, gpu=0), Session(engine, gpu=B) as session:
        assert len(fake.memory) == 4
        assert (session.run({"x": VALUES})["y"] == 2 * VALUES + W).all()
    nothing_left(fake)


def test_a_session_that_nobody_closed_is_freed_with_its_object(fake: FakeDriver) -> None:
    session = Session(cuda_engine())
    session.run({"x": VALUES})
    del session
    gc.collect()
    nothing_left(fake)


@pytest.mark.parametrize(
    "name",
    [
        "cuMemAlloc",
        "cuMemHostAlloc",
        "cuStreamCreate",
        "cuModuleLoadData",
        "cuGraphInstantiate",
        "cuLaunchKernel",
        "cuMemcpyHtoDAsync",
        "cuStreamSynchronize",
    ],
)
def test_what_fails_at_the_start_leaves_nothing(fake: FakeDriver, name: str) -> None:
    open_device(0)
    fake.fails[name] = 1
    with pytest.raises((UnsupportedError, EngineError), match=name):
        Session(cuda_engine())
    del fake.fails[name]
    gc.collect()
    assert not fake.memory
    assert not fake.pinned
    assert not fake.graphs
    with Session(cuda_engine()) as session:
        assert (session.run({"x": VALUES})["y"] == 2 * VALUES + W).all()


def test_the_last_failing_stream_does_not_hide_the_reason(fake: FakeDriver) -> None:
    with Session(cuda_engine()) as session:
        fake.fails["cuGraphLaunch"] = 700
        with pytest.raises(UnsupportedError, match="ILLEGAL_ADDRESS"):
            session.run({"x": VALUES})
        fake.fails.clear()
        assert (session.run({"x": VALUES})["y"] == 2 * VALUES + W).all()


def test_a_gpu_for_which_it_was_not_built_is_refused(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = plant_driver(monkeypatch, (("Old GPU", (8, 0)), H200))
    with Session(cuda_engine()) as session:
        assert session._gpu is not None
        assert session._gpu.device.gpu.index == 1, "the one that it fits"
    with pytest.raises(UnsupportedError, match="built for a GPU of sm90") as caught:
        Session(cuda_engine(), gpu=0)
    assert "found sm80 (Old GPU)" in str(caught.value)
    assert "cuMemAlloc" not in other.calls[-5:]
    with pytest.raises(UnsupportedError, match=r"missing: GPU for sm89 \(here is sm80, sm90"):
        Session(cuda_engine(gpu="sm89"))
    with pytest.raises(InputError, match="no GPU is 7"):
        Session(cuda_engine(), gpu=7)


def test_more_memory_than_allowed_is_refused_before_it_is_taken(fake: FakeDriver) -> None:
    engine = cuda_engine()
    needed = engine.weights.nbytes + engine.plan.arena_bytes
    with Session(engine, most_gpu_bytes=needed):
        pass
    with pytest.raises(UnsupportedError, match="more of the memory of A GPU than it may have"):
        Session(engine, most_gpu_bytes=needed - 1)
    nothing_left(fake)


def test_a_full_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = plant_driver(monkeypatch, total=512)
    with pytest.raises(UnsupportedError, match="more memory than is free on A GPU") as caught:
        Session(cuda_engine())
    assert "free are 0.0 MiB of 0.0 MiB" in str(caught.value)
    assert "cuMemAlloc" not in fake.calls
    nothing_left(fake)
    engine = cuda_engine()
    fake = plant_driver(monkeypatch, total=2 * 768 + 256)
    with Session(engine), Session(engine):
        with pytest.raises(UnsupportedError, match="the weights are there already"):
            Session(engine)
    nothing_left(fake)


def test_a_program_that_lies_is_refused_before_anything_is_launched(fake: FakeDriver) -> None:
    far = launch("double", 0, X, Place("arena", 1 << 20, 256))
    lies = CudaProgram.of([far], (Transfer("x", X),), (Transfer("y", Y),))
    with pytest.raises(EngineError, match="the program of step 'net' lies"):
        Session(cuda_engine(lies))
    assert "cuLaunchKernel" not in fake.calls
    nothing_left(fake)


def test_code_that_is_none_is_refused(fake: FakeDriver) -> None:
    engine = cuda_engine()
    engine.code["add"] = np.frombuffer(b"broken", np.uint8)
    with pytest.raises(EngineError, match="refuses an object of 6 bytes"):
        Session(engine)
    nothing_left(fake)


class FakeProduct:
    """y = x + w by a library."""

    closed = 0

    def __init__(self, fake: FakeDriver, needed: int = 4 * COUNT) -> None:
        self.fake, self.runs = fake, 0
        self.sizes = (needed,) * 3

    def run(self, stream: int, addresses: tuple[int, ...]) -> None:
        self.runs += 1
        self.fake._put(stream, lambda: KERNELS["add"][1](self.fake.view, *addresses))

    def close(self) -> None:
        FakeProduct.closed += 1


def test_library_calls_are_recorded_in_their_turn(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []

    def prepare(settings: str, capability: int, index: int) -> FakeProduct:
        assert fake.stack, "libraries use the current GPU"
        asked.append((settings, capability, index))
        return FakeProduct(fake)

    monkeypatch.setitem(prepared.LIBRARIES, "cublaslt", prepare)
    turns = [launch("double", 0, X, MIDDLE), LibraryCall("cublaslt", "how", (MIDDLE, KEPT, Y), 1)]
    program = CudaProgram.of(turns, (Transfer("x", X),), (Transfer("y", Y),))
    FakeProduct.closed = 0
    with Session(cuda_engine(program)) as session:
        assert (session.run({"x": VALUES})["y"] == 2 * VALUES + W).all()
    assert asked == [("how", 90, 0)]
    assert FakeProduct.closed == 1
    nothing_left(fake)


def test_a_library_call_has_room_for_its_operands(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = functools.partial(FakeProduct, fake, 4 * COUNT + 1)
    monkeypatch.setitem(prepared.LIBRARIES, "cublaslt", lambda *_: make())
    turns: list[Any] = [
        launch("double", 0, X, MIDDLE),
        LibraryCall("cublaslt", "", (X, KEPT, Y), 1),
    ]
    program = CudaProgram.of(turns, (Transfer("x", X),), (Transfer("y", Y),))
    FakeProduct.closed = 0
    with pytest.raises(EngineError, match="other places than its operands"):
        Session(cuda_engine(program))
    assert FakeProduct.closed == 1
    nothing_left(fake)


def test_steps_on_the_gpu_and_on_onnx_runtime_follow_each_other(fake: FakeDriver) -> None:
    with Session(mixed_engine()) as session:
        assert (session.run({"x": VALUES})["y"] == -4 * VALUES).all()
        assert len(session.step_times_us({"x": VALUES}, 2)) == 3
        (tap,) = session.walk({"x": VALUES})
        assert (tap.name, tap.layer) == ("b", 1)
        assert (tap.value == -2 * VALUES).all()
        assert session.layer_times_us({"x": VALUES}, 2).keys() == {0, 2}
    nothing_left(fake)


def two_profiles() -> Engine:
    """The sample for 64 numbers, and y = 2 x for 32."""
    engine = cuda_engine()
    half = [TensorInfo(name, "float32", (32,)) for name in "xy"]
    place, other = Place("arena", 0, 128), Place("arena", 256, 128)
    program = CudaProgram.of(
        [launch("half", 2, place, other)], (Transfer("x", place),), (Transfer("y", other),)
    )
    step = Step("cuda", "half", ("x",), ("y",), (2,))
    profile = Profile((half[0],), (half[1],), (), (step,), 512, ())
    plan: Plan = replace(
        engine.plan,
        profiles=(*engine.plan.profiles, profile),
        layers=(*engine.plan.layers, Layer("third", "Mul", "walk")),
        code=(*engine.plan.code, "half"),
    )
    code = engine.code | {"half": np.frombuffer(b"half", np.uint8)}
    held = engine.subgraphs | {"half": np.frombuffer(program.to_bytes(), np.uint8)}
    return Engine(plan, engine.weights, code, held)


def test_each_profile_has_a_graph_of_its_own(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(view: Any, x: int, y: int) -> None:
        view(y, 32)[:] = 2 * view(x, 32)

    monkeypatch.setitem(KERNELS, "half", (2, half))
    with Session(two_profiles()) as session:
        assert len(fake.graphs) == 2
        for _ in range(2):
            assert (session.run({"x": VALUES})["y"] == 2 * VALUES + W).all()
            assert (session.run({"x": VALUES[:32]})["y"] == 2 * VALUES[:32]).all()
    nothing_left(fake)


def tapped_engine() -> Engine:
    """The sample, whose first layer says where it writes; the second wrote the output."""
    engine = cuda_engine()
    at = Strided(MIDDLE.offset, 4 * COUNT, 0, 0)
    writes = (Write(TensorInfo("middle", "float32", (COUNT,)), "source", at),)
    last = (Write(TensorInfo("y", "float32", (COUNT,)), "y"),)
    layers = tuple(
        replace(layer, writes=each)
        for layer, each in zip(engine.plan.layers, (writes, last), strict=True)
    )
    return replace(engine, plan=replace(engine.plan, layers=layers))


def test_a_walk_reads_what_each_layer_wrote(fake: FakeDriver) -> None:
    with Session(tapped_engine()) as session:
        before = set(fake.memory)
        first, second = session.walk({"x": VALUES})
        assert (first.name, first.source, first.layer) == ("middle", "source", 0)
        assert (first.value == 2 * VALUES).all()
        assert (second.name, second.layer) == ("y", 1)
        assert (second.value == 2 * VALUES + W).all()
        assert set(fake.memory) == before
    with pytest.raises(InputError, match="closed"):
        list(session.walk({"x": VALUES}))
    nothing_left(fake)


def test_layers_are_timed_in_ranges_of_their_names(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    shown = ranges.Ranges(seen.append, lambda: seen.append("end"), "a test")
    monkeypatch.setattr(ranges, "ranges", lambda: shown)
    with Session(cuda_engine()) as session:
        times = session.layer_times_us({"x": VALUES}, 3)
        assert times == {0: pytest.approx(1.0, rel=0.1), 1: pytest.approx(1.0, rel=0.1)}
        assert seen[2:6] == ["first", "end", "second", "end"]
        assert (session.run({"x": VALUES})["y"] == 2 * VALUES + W).all()
        with pytest.raises(InputError, match="got y"):
            session.layer_times_us({"y": VALUES}, 3)
    nothing_left(fake)


def test_a_timeline_has_every_layer_in_its_place(fake: FakeDriver) -> None:
    with Session(cuda_engine()) as session:
        for _ in range(2):
            found = session.timeline({"x": VALUES})
            (step,) = found.steps
            assert [span.layers for span in found.layers] == [(0,), (1,)]
            first, second = found.layers
            assert step.begin_ns <= first.begin_ns
            assert first.end_ns == second.begin_ns
            assert second.end_ns - first.begin_ns == pytest.approx(4000, rel=0.01), "us of a mark"
        assert len(fake.graphs) == 2, "the one with marks is made once"
    nothing_left(fake)
    with Session(mixed_engine()) as session:
        found = session.timeline({"x": VALUES})
        assert [span.layers for span in found.layers] == [(0,), (1,), (2,)]
        assert found.run_us >= found.layers_us > 0
    nothing_left(fake)


def test_a_program_is_timed_as_one_of_many_in_a_graph(fake: FakeDriver) -> None:
    device = open_device(0)
    blocks = {"arena": device.take(768), "weights": device.take(256)}
    objects = Objects(device, cuda_engine().code)
    ready = Prepared(device, sample_program(), objects, blocks)
    fake.calls.clear()
    assert time_us(device, ready.enqueue, 5) == pytest.approx(2.0, rel=0.1), "two launches of 1 us"
    assert fake.calls.count("cuGraphInstantiate") == 2
    assert fake.calls.count("cuLaunchKernel") > 100
    ready.close()
    objects.close()
    for address in blocks.values():
        device.give_back(address)
    nothing_left(fake)


def test_a_cpu_engine_takes_no_gpu() -> None:
    from tests.sample_engines import sample_engine

    with pytest.raises(InputError, match="is told a GPU"):
        Session(sample_engine(), gpu=0)


def test_a_network_is_closed_once(fake: FakeDriver) -> None:
    network = CudaNetwork(cuda_engine())
    network.close()
    network.close()
    nothing_left(fake)

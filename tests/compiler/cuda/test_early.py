"""Kernels started before those in front of them have ended: which, and whether it pays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda_engines import COUNT, KEPT, MIDDLE, W, X, Y, cuda_engine, launch, sample_program
from tests.fake_cuda import H200, FakeDriver, plant_driver
from tests.fake_cuda import Kernel as Start
from tests.kernels.cuda.test_conv_sparse import GROUPS, problem_of
from twofour.compiler.cuda.early import even_shared_bytes, started_early
from twofour.core.cuda_program import CudaProgram, LibraryCall, Transfer
from twofour.engine import Engine
from twofour.kernels.cuda.conv_sparse import sources
from twofour.kernels.cuda.kernel import WAIT, Compiled, Kernel, compile_kernel
from twofour.kernels.cuda.norm import recipes as norms
from twofour.kernels.cuda.nvrtc import compile_source
from twofour.kernels.cuda.problem import NormProblem
from twofour.runtime.cuda.device import Room, open_device
from twofour.runtime.session import Session

VALUES = np.linspace(-1, 1, COUNT, dtype=np.float32)
MULTIPROCESSOR = Room(132, 233472, 1024)
"""Of an H200."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return plant_driver(monkeypatch, (H200,))


def quick(kernel: Start) -> float:
    """What starts early takes half as long."""
    return 0.5e-3 if kernel.early else 1e-3


def tried() -> tuple[Engine, bool, str]:
    """The small engine, whether its second kernel starts early now, and the note."""
    engine = started_early(cuda_engine(), open_device(), {"add"}, 3)
    program = CudaProgram.from_bytes(engine.subgraphs["net"].tobytes())
    assert not program.launches[0].early
    (note,) = engine.plan.notes
    with Session(engine) as session:
        np.testing.assert_array_equal(session.run({"x": VALUES})["y"], 2 * VALUES + W)
    return engine, program.launches[1].early, note


def test_what_pays_is_taken(fake: FakeDriver) -> None:
    fake.takes = quick
    engine, early, note = tried()
    assert early
    assert note.startswith("net: 1 kernels started early take 1.5 us instead of 2.0 us")
    assert set(engine.subgraphs) == {"net"}
    assert not fake.memory
    assert not fake.graphs


def test_blocks_that_crowd_get_an_even_share(fake: FakeDriver) -> None:
    def takes(kernel: Start) -> float:
        crowd = kernel.shared_bytes < 115_000
        return 1e-3 if not kernel.early else 2e-3 if crowd else 0.5e-3

    fake.takes = takes
    engine, early, note = tried()
    assert early
    assert note == "net: 1 kernels started early take 1.5 us instead of 2.0 us"
    program = CudaProgram.from_bytes(engine.subgraphs["net"].tobytes())
    assert program.launches[1].shared_bytes == even_shared_bytes(
        launch("add", 1), Room(4, 233472, 1024)
    )


@pytest.mark.parametrize("slow", ["add", "double"])
def test_only_kernels_that_gain_start_early(fake: FakeDriver, slow: str) -> None:
    """All of them lose together, and each is tried by itself."""
    fake.takes = lambda each: (9e-3 if each.name == slow else 0.5e-3) if each.early else 1e-3
    turns = [launch("double", 0, X, MIDDLE), launch("add", 1, MIDDLE, KEPT, Y)]
    turns += [launch("double", 0, Y, MIDDLE), launch("add", 1, MIDDLE, KEPT, Y)]
    program = CudaProgram.of(turns, (Transfer("x", X),), (Transfer("y", Y),))
    made = started_early(cuda_engine(program), open_device(), {"add", "double"}, 3, 10.0)
    launches = CudaProgram.from_bytes(made.subgraphs["net"].tobytes()).launches
    assert [each.early for each in launches] == [
        False,
        *(each.code != slow for each in launches[1:]),
    ]
    with Session(made) as session:
        wanted = 2 * (2 * VALUES + W) + W
        np.testing.assert_array_equal(session.run({"x": VALUES})["y"], wanted)


@given(st.integers(1, 5000), st.integers(0, 232448))
def test_an_even_share_leaves_room_for_no_more(blocks: int, own: int) -> None:
    asked = replace(launch("add", 0, shared_bytes=own), grid=(blocks, 1, 1))
    shared, share = even_shared_bytes(asked, MULTIPROCESSOR), -(-blocks // 132)
    assert own <= shared <= 232448
    if shared > own:
        fit = MULTIPROCESSOR.shared_bytes // (shared + MULTIPROCESSOR.reserved_bytes)
        assert fit == share


def test_what_does_not_pay_is_not(fake: FakeDriver) -> None:
    _, early, note = tried()
    assert not early
    assert note == "net: 1 kernels started early would take 2.0 us instead of 2.0 us, and are not"


def test_what_gives_other_results_is_not_taken_and_told(fake: FakeDriver) -> None:
    fake.takes, fake.races = quick, True
    engine = started_early(cuda_engine(), open_device(), {"add"}, 3)
    assert not CudaProgram.from_bytes(engine.subgraphs["net"].tobytes()).launches[1].early
    assert "give other results, and do not: a defect" in engine.plan.notes[0]


def test_what_the_driver_refuses_is_told(fake: FakeDriver) -> None:
    fake.fails["cuLaunchKernelEx"] = 1
    _, early, note = tried()
    assert not early
    assert "early are refused: CUDA refuses cuLaunchKernelEx; CUDA_ERROR_INVALID_VALUE" in note


def test_what_has_no_room_for_its_even_share_starts_without(fake: FakeDriver) -> None:
    """A driver that gives kernels no more shared memory than 112 KiB: that ends no trial."""
    fake.takes, fake.most_shared = quick, 112 << 10
    _, early, note = tried()
    assert early
    assert note.startswith("net: 1 kernels started early take 1.5 us instead of 2.0 us (1 ways to ")
    assert "are refused: the kernel 'add_kernel' with 115840 bytes of shared memory" in note


def test_a_driver_that_cannot_starts_one_after_the_other(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.takes = quick
    engine, early, _ = tried()
    assert early
    assert "cuLaunchKernelEx" in fake.calls
    old = plant_driver(monkeypatch, (H200,))
    old.version = 12020
    with Session(engine) as session:
        np.testing.assert_array_equal(session.run({"x": VALUES})["y"], 2 * VALUES + W)
    assert "cuLaunchKernel" in old.calls
    assert "cuLaunchKernelEx" not in old.calls


def test_with_such_a_driver_nothing_is_tried(fake: FakeDriver) -> None:
    fake.version = 12020
    engine = cuda_engine()
    assert started_early(engine, open_device(), {"add"}, 3) is engine


def test_where_there_is_no_room_for_all_it_is_told(fake: FakeDriver) -> None:
    fake.total = 512
    engine = started_early(cuda_engine(), open_device(), {"add"}, 3)
    assert engine.subgraphs.keys() == {"net"}
    assert "kernels were not started early to try it: the engine needs more" in engine.plan.notes[0]


def test_without_kernels_that_wait_nothing_is_tried(fake: FakeDriver) -> None:
    engine = cuda_engine()
    assert started_early(engine, open_device(), {"double"}, 3) is engine
    assert not fake.calls.count("cuMemAlloc")


def test_only_what_waits_and_stands_behind_a_kernel_starts_early() -> None:
    call = LibraryCall("cublaslt", "{}", (X, KEPT, MIDDLE), 0)
    turns = [launch("add", 0, X, KEPT, Y), launch("add", 0, X, KEPT, Y), call]
    turns += [launch("add", 0, X, KEPT, Y), launch("double", 1, X, Y), launch("add", 1, X, KEPT, Y)]
    program = CudaProgram.of(turns, (), ()).early({"add"})
    assert [each.early for each in program.launches] == [False, True, False, False, True]
    assert not list(program.wrong({"arena": 768, "weights": 256}, 2))
    assert CudaProgram.from_bytes(program.to_bytes()) == program


def test_a_program_may_not_start_early_behind_nothing() -> None:
    first, *rest = sample_program().launches
    program = replace(sample_program(), launches=(replace(first, early=True), *rest))
    (reason,) = program.wrong({"arena": 768, "weights": 256}, 2)
    assert "double_kernel is to begin early, but not behind a kernel" in reason


def test_marks_between_layers_have_whole_kernels(fake: FakeDriver) -> None:
    """A mark is no kernel: what stands behind one cannot start early."""
    fake.takes = quick
    engine, early, _ = tried()
    assert early
    with Session(engine) as session:
        session.timeline({"x": VALUES})
        times = session.layer_times_us({"x": VALUES}, 3)
        assert len(list(session.walk({"x": VALUES}))) == 0
    assert times == pytest.approx({0: 1.0, 1: 1.0}, rel=0.02)


@pytest.mark.parametrize(("capability", "waits"), [(80, False), (90, True)])
def test_kernels_of_hopper_wait(capability: int, waits: bool) -> None:
    problem = NormProblem(8, 64, 1e-5, ("float16", 64), ("float16", 64))
    constants = {role: np.ones(64, np.float32) for role in ("gamma", "beta")}
    kernel = norms(problem, constants, capability)[0].calls[0]
    assert isinstance(kernel, Kernel)
    assert compile_kernel(kernel, capability).waits == waits
    call = sources(problem_of(), GROUPS, biased=True)[0][0]
    assert WAIT in call.text
    if capability == 90:
        made = compile_source(call, capability)
        assert isinstance(made, Compiled)
        assert made.waits

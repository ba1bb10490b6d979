"""Programs on threads: each kernel sees all that the one before wrote, however the threads fall.

The kernel here reads its neighbour's cell, so a piece done too early or twice changes the result.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.harness import targets
from twofour.core.abi import ARENA, BINDINGS, MAX_THREADS, SYNC, WEIGHTS
from twofour.core.errors import EngineError, UnsupportedError
from twofour.kernels.cpu.llvm import Function, Source, compile_object, module_text
from twofour.kernels.cpu.program import Call, Operand, program_text, threads_text
from twofour.runtime.cpu import Code, Workers, address, allocate

TARGETS = targets()
CELLS = 60
SECOND = 4096  # the other buffer of the arena
STEPS = 7


def neighbour(name: str, by: str) -> Function:
    """y[i] = 2 x[(i + 1) % CELLS] + i, for the cells of its range of pieces ("t") or panels."""
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )

    def cell(i, _):
        after = f.int_op("urem", f.int_op("add", i, 1), CELLS)
        value = f.load("i32", f.at("%x", f.int_op("mul", after, 4)), 0, 4)
        index = f.let(f"trunc i64 {i} to i32")
        value = f.int_op("add", f.int_op("mul", value, 2, "i32"), index, "i32")
        f.store("i32", value, f.at("%y", f.int_op("mul", i, 4)), 0, 4)
        return []

    f.loop(f"%{by}0", f"%{by}1", [], cell)
    return f


def waits(name: str) -> Function:
    """Turns until x[0] is set, at most some seconds; y[0] becomes what it saw."""
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )

    def turn(_, carried):
        f.call("void", "llvm.donothing")
        seen = f.let("load atomic i32, ptr %x seq_cst, align 4")
        return [f.int_op("or", carried[0], seen, "i32")]

    def rows(_, __):
        end = f.loop(0, 1 << 16, [("i32", "0")], until)
        f.store("i32", end[0], "%y", 0, 4)
        return []

    def until(_, carried):
        # Once seen, the inner loop has nothing to do.
        done = f.let(f"icmp ne i32 {carried[0]}, 0")
        turns = f.let(f"select i1 {done}, i64 0, i64 200000")
        return f.loop(0, turns, [("i32", carried[0])], turn)

    f.loop("%t0", "%t1", [], rows)
    return f


def calls() -> list[Call]:
    """STEPS kernels to and fro between two buffers, by pieces and by panels in turn."""
    found = []
    for step in range(STEPS):
        by = "tp"[step % 2]
        x, y = Operand(ARENA, SECOND * (step % 2)), Operand(ARENA, SECOND * ((step + 1) % 2))
        x = Operand(BINDINGS) if step == 0 else x
        y = Operand(BINDINGS + 1) if step == STEPS - 1 else y
        sizes = (CELLS, 1) if by == "t" else (1, CELLS)
        found.append(Call(f"by_{by}", x, Operand(WEIGHTS), y, y, *sizes))
    return found


def expected(x: np.ndarray) -> np.ndarray:
    for _ in range(STEPS):
        x = 2 * np.roll(x, -1) + np.arange(CELLS, dtype=np.int32)
    return x


BUFFERS = 3


def calls_in_waves() -> list[Call]:
    """As `calls` in BUFFERS pairs of buffers: those of a step do not depend on each other."""
    found = []
    for step in range(STEPS):
        for lane in range(BUFFERS):
            by, here = "tp"[(step + lane) % 2], 2 * SECOND * lane
            places = [Operand(ARENA, here + SECOND * (i % 2)) for i in (step, step + 1)]
            places[0] = Operand(BINDINGS) if step == 0 else places[0]
            places[1] = Operand(BINDINGS + 1, 4 * CELLS * lane) if step == STEPS - 1 else places[1]
            sizes = (CELLS, 1) if by == "t" else (1, CELLS)
            x, y = places
            meets = lane == BUFFERS - 1
            found.append(Call(f"by_{by}", x, Operand(WEIGHTS), y, y, *sizes, meets=meets))
    return found


class Program:
    """One set of threads with memory of its own."""

    def __init__(self, code: Code, threads: int, symbol: str = "program"):
        self.arena, self.weights = allocate(1 << 15), allocate(64)
        self.workers = Workers(code, threads)
        self.symbol = code.address(symbol)

    def run(self, x: np.ndarray) -> np.ndarray:
        y = np.full(CELLS, -1, np.int32)
        args = self.args(x, y)
        self.workers.run(self.symbol, address(args))
        return y

    def args(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        blocks = (self.arena, self.weights, self.workers.sync, x, y)
        return np.array([address(block) for block in blocks], np.int64)

    def check(self, seed: int) -> None:
        x = np.random.default_rng(seed).integers(-1000, 1000, CELLS).astype(np.int32)
        assert (self.run(x) == expected(x)).all()


def compile_programs(target) -> Code:
    once = [Call("waits", Operand(BINDINGS), Operand(WEIGHTS), *[Operand(BINDINGS + 1)] * 2, 1, 1)]
    texts = [
        threads_text(TARGETS[0].arch),
        module_text([neighbour("by_t", "t"), neighbour("by_p", "p"), waits("waits")]),
        program_text("program", calls(), 2),
        program_text("waiting", once, 1),
        program_text("waves", calls_in_waves(), 2),
    ]
    return Code([compile_object([Source(t) for t in texts], target)])


@pytest.fixture(scope="module")
def code() -> Code:
    return compile_programs(TARGETS[0])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_any_number_of_threads_computes_the_same(target, threads) -> None:
    """Also with more threads than cores."""
    program = Program(compile_programs(target), threads)
    for seed in range(20):
        program.check(seed)
    program.workers.close()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_meet_behind_waves(code, threads) -> None:
    """Whole runs, runs of some calls that end within a wave, and timed ones are all the same."""
    program = Program(code, threads, "waves")
    count, stamps = STEPS * BUFFERS, program.workers.stamps(STEPS * BUFFERS)
    for seed in range(200):
        x = np.random.default_rng(seed).integers(-1000, 1000, CELLS).astype(np.int32)
        y = np.full((BUFFERS, CELLS), -1, np.int32)
        args = program.args(x, y)
        if seed % 3 == 0:
            program.workers.run(program.symbol, address(args))
        elif seed % 3 == 1:
            for begin, end in ((0, 4), (4, 5), (5, count)):
                program.workers.run_calls(program.symbol, address(args), range(begin, end), None)
        else:
            program.workers.run_calls(program.symbol, address(args), range(count), stamps)
            met = stamps[:, 0, 2]
            assert (stamps[:, :, 1] <= met[:, None]).all(), "met before all had ended"
        assert (y == expected(x)).all()


@pytest.mark.parametrize(("threads", "runs"), [(1, 5000), (2, 3000), (3, 100)])
def test_thousands_of_runs(code, threads, runs) -> None:
    program = Program(code, threads)
    x = np.arange(CELLS, dtype=np.int32)
    want = expected(x)
    for _ in range(runs):
        assert (program.run(x) == want).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_some_calls_at_a_time(code, threads) -> None:
    """All in pieces are what all at once are; no call before or behind the piece is done."""
    program, x = Program(code, threads), np.arange(CELLS, dtype=np.int32)
    y = np.full(CELLS, -1, np.int32)
    args = program.args(x, y)
    for begin, end in ((0, 1), (1, 4), (4, 6)):
        program.workers.run_calls(program.symbol, address(args), range(begin, end), None)
    assert (y == -1).all(), "the last call was done too"
    cells = program.arena[: 4 * CELLS].view(np.int32)
    cells[:] = np.arange(CELLS)[::-1]
    program.workers.run_calls(program.symbol, address(args), range(6, 7), None)
    assert (y == 2 * np.roll(cells, -1) + np.arange(CELLS)).all(), "an earlier call was done again"
    assert (program.run(x) == expected(x)).all(), "a whole run is no longer one"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_times_of_calls(code, threads) -> None:
    """Begin, end, met, call after call; only thread 0 knows when all had met."""
    program, x = Program(code, threads), np.arange(CELLS, dtype=np.int32)
    y = np.empty(CELLS, np.int32)
    stamps = program.workers.stamps(STEPS + 1)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    args = program.args(x, y)
    program.workers.run_calls(program.symbol, address(args), range(1, STEPS), stamps)
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert not stamps[0].any()
    assert not stamps[STEPS].any()
    assert not stamps[:, :, 3:].any()
    assert not stamps[:, 1:, 2].any()
    for thread in range(threads):
        taken = stamps[1:STEPS, thread, : 2 + (thread == 0)].reshape(-1)
        assert before <= taken[0]
        assert taken[-1] <= after
        assert (np.diff(taken) >= 0).all()
    met = stamps[1:STEPS, 0, 2]
    assert (stamps[1:STEPS, :, 1] <= met[:, None]).all(), "met before all had ended"
    assert (stamps[2:STEPS, :, 0] >= stamps[1 : STEPS - 1, :, 1].max(1)[:, None]).all()
    program.run(x)
    assert (stamps[1:STEPS, 0, 2] == met).all(), "a plain run writes times"


def test_more_threads_than_work(code) -> None:
    program = Program(code, MAX_THREADS)
    program.check(0)
    program.check(1)
    program.workers.close()


def test_workers_sleep_when_idle_and_wake_for_work(code) -> None:
    program = Program(code, 3)
    flags = program.workers.sync.view(np.int32)[(SYNC["sleeping"] + 64) // 4 :: 16][:2]
    for pause_s in (0, 1e-4, 5e-4, 1e-3, 1e-2, 0.3, 1.0):
        time.sleep(pause_s)
        program.check(int(pause_s * 1e4))
    before, start = time.process_time(), time.monotonic()
    while not flags.all() and time.monotonic() - start < 30:
        time.sleep(0.01)
    assert flags.all(), "a worker did not go to sleep"
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1, "idle threads use the processor"
    program.check(7)


def test_work_that_comes_just_as_a_worker_falls_asleep(code) -> None:
    """Aimed at the moment at which a worker raises its flag."""
    program, chance = Program(code, 2), random.Random(0)
    flag = program.workers.sync.view(np.int32)[(SYNC["sleeping"] + 64) // 4 :][:1]

    def wait(until: float) -> float:
        while not flag[0] and time.perf_counter() < until:
            pass
        return time.perf_counter()

    awake = []
    for seed in range(21):
        program.check(seed)
        start = time.perf_counter()
        awake.append(wait(start + 1) - start)
    aim = sorted(awake)[len(awake) // 2]
    x = np.arange(CELLS, dtype=np.int32)
    want, end = expected(x), time.perf_counter() + 1
    while (now := time.perf_counter()) < end:
        until = now + aim + chance.uniform(-5e-6, 3e-6)
        while time.perf_counter() < until:
            pass
        assert (program.run(x) == want).all()


def test_an_interrupted_wait_is_taken_up_again(code) -> None:
    """As a signal handler in a worker interrupts it: sem_wait then returns -1."""
    program, real, calls = Program(code, 2), ctypes.CDLL(None).sem_wait, []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def interrupted(semaphore):
        calls.append(1)
        return -1 if len(calls) % 3 else real(ctypes.c_void_p(semaphore))

    words = program.workers.sync.view(np.int64)
    words[SYNC["sem_wait"] // 8] = ctypes.cast(interrupted, ctypes.c_void_p).value
    time.sleep(0.01)
    for seed in range(5):
        program.check(seed)
        time.sleep(0.01)
    program.workers.close()
    assert len(calls) > 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_signals_do_not_wake_workers_too_early(code) -> None:
    caught = []
    before = signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        program = Program(code, 3)
        for seed in range(40):
            time.sleep(0.002)
            program.check(seed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_sets_of_threads_end_and_leave_nothing(code) -> None:
    """Closed, forgotten, used or not."""
    before = len(os.listdir("/proc/self/task"))
    for index in range(200):
        program = Program(code, 2 + index % 2)
        if index % 3 == 0:
            program.check(index)
        if index % 2:
            program.workers.close()
            program.workers.close()  # twice does nothing
        del program
    gc.collect()
    # Fewer, where a thread of another test ended meanwhile.
    assert len(os.listdir("/proc/self/task")) <= before


def test_sets_of_threads_side_by_side(code) -> None:
    programs = [Program(code, threads) for threads in (1, 2, 3)]

    def work(program: Program) -> None:
        for seed in range(30):
            program.check(seed)

    with ThreadPoolExecutor(len(programs)) as pool:
        for done in [pool.submit(work, program) for program in programs]:
            done.result()


def test_python_runs_while_a_program_does(code) -> None:
    """The program waits for what another Python thread writes: it would never see it otherwise."""
    program = Program(code, 1, "waiting")
    x = np.zeros(CELLS, np.int32)
    timer = threading.Timer(0.05, lambda: x.fill(1))
    timer.start()
    assert program.run(x)[0] == 1
    timer.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_works_alone_on_memory_of_its_own(code) -> None:
    program = Program(code, 3)
    program.check(0)
    program.arena[:] = 1
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            program.arena[:] = 2
            program.check(1)
            program.workers.close()
            failed = 0
        finally:
            os._exit(failed)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert (program.arena == 1).all()
    program.check(2)


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1])
def test_thread_counts_that_cannot_be(code, threads) -> None:
    with pytest.raises(UnsupportedError, match=f"1 to {MAX_THREADS}"):
        Workers(code, threads)


def test_threads_share_what_divides_more_evenly() -> None:
    """Of 3 pieces and 4 panels, 2 threads take the panels and 3 the pieces."""
    one = Operand(ARENA)
    call = Call("k", one, one, one, one, 3, 4)
    assert call.split_panels(2)
    assert not call.split_panels(3)
    assert not Call("k", one, one, one, one, 4, 4).split_panels(2)
    assert Call("k", one, one, one, one, 4, 4, by_panels=True).split_panels(2)
    assert not Call("k", one, one, one, one, 3, 4, by_panels=False).split_panels(2)


def test_code_that_is_none_is_refused() -> None:
    whole = compile_object([Source(threads_text(TARGETS[0].arch))], TARGETS[0])
    for data in (b"", b"\x7fELF" + bytes(100), b"not an object" * 10, whole[:-200], whole[:70]):
        with pytest.raises(EngineError, match="cannot be loaded"):
            Code([data])
    Code([whole])


def test_a_missing_function_is_refused(code) -> None:
    with pytest.raises(EngineError, match="no function 'nothing'"):
        code.address("nothing")


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else True,
    reason="needs two cores that a thread can be bound to",
)
def test_workers_keep_off_the_core_of_their_caller(code) -> None:
    """However the caller moves: two threads on one core would wait for each other's time slices."""
    allowed = os.sched_getaffinity(0)
    before = {int(path.name) for path in Path("/proc/self/task").iterdir()}
    program = Program(code, 2)
    (worker,) = {int(path.name) for path in Path("/proc/self/task").iterdir()} - before
    try:
        for core in sorted(allowed)[:2] * 2:
            os.sched_setaffinity(0, {core})
            os.sched_setaffinity(0, allowed)
            program.check(core)
            assert len(os.sched_getaffinity(worker)) == len(allowed) - 1
        os.sched_setaffinity(0, {min(allowed)})
        program.check(7)  # one core for both: slow, right, and the caller's wish
    finally:
        os.sched_setaffinity(0, allowed)
        program.workers.close()

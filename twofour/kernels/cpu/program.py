"""A network as one native call: kernels in order, shared by threads, a barrier between waves.

`void program(ptr args, i64 tid, i64 threads)` is run by every thread. `args` is a table of
pointers:

    0 arena   1 weights   2 sync   3... plain tensors (the step's inputs, then its outputs)

Threads meet in the sync block (core/abi.py). Workers wait for the next run spinning for a short
while, then in a semaphore: a sleeping thread needs 50-120 us to wake, so close requests find them
awake, and an idle session costs nothing.

Calls that do not depend on each other are a wave (compiler/waves.py): threads do not meet between
them. Their shares are dealt out from either end in turn, so that what does not divide evenly is not
always done by the same threads.

A run may be of some of the calls only, and leave the time of each (core/abi.py): that is how a
session looks at what every layer wrote, and when. Then threads meet behind each call. Whoever does
neither pays a compare a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from twofour.core.abi import ARENA, STAMP_BYTES, STAMPS, SYNC, SYNC_INDEX
from twofour.core.sizes import Count, usual
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.sizes import emit_size

SPINS = 8000  # turns of about 30 ns: 0.2 ms
_SIGNATURE = "ptr, ptr, ptr, ptr, i64, i64, i64, i64"


@dataclass(frozen=True)
class Operand:
    """Where a pointer argument lies: `index` into the table of pointers, plus an offset."""

    index: int
    offset: int = 0


@dataclass(frozen=True)
class Call:
    """One kernel of a program.

    Attributes:
        symbol: the kernel.
        x: input.
        w: packed weights and constants.
        y: output.
        r: residual; `y` where there is none.
        pieces: row pieces of the kernel; the symbols of a size lie at the start of the arena.
        panels: panels of the kernel.
        table: where it has entries, the kernel gets the address of a table with their pointers in
            the place of `x`: operands of any number, wherever they lie.
        by_panels: whether threads share the panels; None where that was not measured.
        meets: whether threads meet behind it: it is the last of its wave.
    """

    symbol: str
    x: Operand
    w: Operand
    y: Operand
    r: Operand
    pieces: Count
    panels: int
    table: tuple[Operand, ...] = ()
    by_panels: bool | None = None
    meets: bool = True

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Everything whose address is needed."""
        return (self.x, self.w, self.y, self.r, *self.table)

    def split_panels(self, threads: int) -> bool:
        """Whether threads share the panels, not the row pieces: as measured, or more evenly."""
        if self.by_panels is not None:
            return self.by_panels
        return waiting(self.panels, threads) < waiting(usual(self.pieces), threads)


def imbalance(pieces: int, panels: int, threads: int) -> float:
    """How much longer a kernel takes than its even share of the work; 1 is perfect."""
    return min(waiting(pieces, threads), waiting(panels, threads))


def waiting(count: int, threads: int) -> float:
    """`imbalance` if `count` units are shared: the largest share over the mean."""
    return -(-count // threads) * threads / count


def program_text(name: str, calls: Sequence[Call], threads: int) -> str:
    """The program as an LLVM module; the kernels are external.

    Args:
        name: its symbol.
        calls: in order.
        threads: the thread count to balance for; any other number gives the same result.
    """
    f = Function(name, [("ptr", "args"), ("i64", "tid"), ("i64", "threads")])
    base = {
        i: f.load("ptr", "%args", 8 * i, 8)
        for i in sorted({ARENA, SYNC_INDEX, *(o.index for c in calls for o in c.operands)})
    }
    counts = {c.pieces: emit_size(f, base[ARENA], c.pieces) for c in calls}
    turned = f.int_op("sub", f.int_op("sub", "%threads", "%tid"), 1)
    shares = [(who, f.int_op("add", who, 1)) for who in ("%tid", turned)]
    table = f.let(f"alloca [{max((len(c.table) for c in calls), default=0)} x ptr]")
    window = _Window.of(f, base[SYNC_INDEX], len(calls))

    def emit(call: Call, place: int) -> None:
        pointers = [f.at(base[o.index], o.offset) for o in (call.x, call.w, call.y, call.r)]
        if call.table:
            pointers[0] = table
            for place, o in enumerate(call.table):
                f.store("ptr", f.at(base[o.index], o.offset), table, 8 * place, 8)
        pieces = counts[call.pieces]
        count = call.panels if call.split_panels(threads) else pieces
        share = [
            f.int_op("udiv", f.int_op("mul", who, count), "%threads") for who in shares[place % 2]
        ]
        whole = ["0", str(pieces if call.split_panels(threads) else call.panels)]
        ranges = whole + share if call.split_panels(threads) else share + whole
        arguments = [f"ptr {p}" for p in pointers] + [f"i64 {v}" for v in ranges]
        f.do(f"call void @{call.symbol}({', '.join(arguments)})")
        f.declares.add(f"declare void @{call.symbol}({_SIGNATURE})")

    place = 0
    for index, call in enumerate(calls):
        window.run(index, partial(emit, call, place), meets=call.meets)
        place = 0 if call.meets else place + 1
    return module_text([f])


@dataclass(frozen=True)
class _Window:
    """Which calls of a program run, and where their times go; read once, at its beginning.

    A worker may still be in a program that thread 0 has left: what it finds in the sync block after
    the last barrier may belong to another run.

    Attributes:
        f: the program.
        sync: the sync block.
        first: the first call to run.
        count: how many are run.
        stamps: where this thread's times go.
        timed: whether they are taken.
        first_timed: whether they are, and this is thread 0.
        each: whether threads meet behind each call: times are taken, or not all calls are run.
    """

    f: Function
    sync: Value
    first: Value
    count: Value
    stamps: Value
    timed: Value
    first_timed: Value
    each: Value

    @staticmethod
    def of(f: Function, sync: Value, calls: int) -> _Window:
        """Emits the loads; the program has so many `calls`."""
        first, last = (f.load("i64", sync, SYNC[key], 8) for key in ("first", "last"))
        stamps = f.load("ptr", sync, SYNC["stamps"], 8)
        timed = f.let(f"icmp ne ptr {stamps}, null")
        first_timed = f.let(f"and i1 {timed}, {f.let('icmp eq i64 %tid, 0')}")
        mine = f.at(stamps, f.int_op("mul", "%tid", STAMP_BYTES))
        count = f.int_op("sub", last, first)
        each = f.let(f"or i1 {timed}, {f.let(f'icmp ult i64 {count}, {calls}')}")
        return _Window(f, sync, first, count, mine, timed, first_timed, each)

    def run(self, index: int, call: Callable[[], None], *, meets: bool) -> None:
        """Emits one call, the barrier behind it, and the clocks around both."""
        f = self.f

        def meet() -> None:
            f.call("void", "barrier", ("ptr", self.sync), ("i64", "%threads"))

        def both() -> None:
            f.when(self.timed, partial(self._stamp, index, "begin"))
            call()
            f.when(self.timed, partial(self._stamp, index, "end"))
            if meets:
                meet()
            else:
                f.when(self.each, meet)
            f.when(self.first_timed, partial(self._stamp, index, "met"))

        ahead = f.int_op("sub", index, self.first)
        f.when(f.let(f"icmp ult i64 {ahead}, {self.count}"), both)

    def _stamp(self, index: int, what: str) -> None:
        f = self.f
        begin = f.int_op("mul", "%threads", index * STAMP_BYTES)
        place = f.at(self.stamps, f.int_op("add", begin, STAMPS[what]))
        f.call("void", "stamp", ("ptr", self.sync), ("ptr", place))


def threads_text(arch: str) -> str:
    """barrier, stamp, worker, run and repeat as an LLVM module: all that is not a kernel.

    Args:
        arch: of the machine that is to run it.
    """
    return module_text([_barrier(arch), _stamp(), _worker(arch), _run(), _repeat()])


def _atomic_load(f: Function, pointer: Value, offset: int | Value) -> Value:
    return f.let(f"load atomic i32, ptr {f.at(pointer, offset)} seq_cst, align 4")


def _atomic_store(f: Function, value: Value | int, pointer: Value, offset: int | Value) -> None:
    f.do(f"store atomic i32 {value}, ptr {f.at(pointer, offset)} seq_cst, align 4")


def _pause(f: Function, arch: str) -> None:
    """Tells the core that this is a spin loop, where it has a word for it."""
    if arch == "x86_64":
        f.call("void", "llvm.x86.sse2.pause")
    elif arch == "aarch64":  # `yield` does nothing on cores with one thread; this waits a moment
        f.call("void", "llvm.aarch64.isb", ("i32", "15"))


def _spin_while_equal(
    f: Function, at: tuple[Value, int], value: Value, arch: str, limit: int | None = None
) -> Value:
    """Loads the i32 at (pointer, offset) until it differs from `value`.

    Yields the core now and then, and gives up after `limit` turns. Returns the last value loaded.
    """
    pointer, offset = at
    names = ("enter", "spin", "again", "breathe", "turn", "spun")
    before, head, again, breathe, turn, done = (f.label(name) for name in names)
    f.do(f"br label %{before}")
    f.block(before)
    f.do(f"br label %{head}")
    f.block(head)
    count, following = f.label("%n"), f.label("%m")
    f.do(f"{count} = phi i64 [ 0, %{before} ], [ {following}, %{turn} ]")
    now = _atomic_load(f, pointer, offset)
    same = f.let(f"icmp eq i32 {now}, {value}")
    if limit is not None:
        same = f.let(f"and i1 {same}, {f.let(f'icmp ult i64 {count}, {limit}')}")
    f.do(f"br i1 {same}, label %{again}, label %{done}")
    f.block(again)
    _pause(f, arch)
    f.do(f"{following} = add i64 {count}, 1")
    # Where threads outnumber cores the one we wait for may need ours.
    tired = f.let(f"icmp eq i64 {f.int_op('and', following, 2047)}, 0")
    f.do(f"br i1 {tired}, label %{breathe}, label %{turn}")
    f.block(breathe)
    f.let(f"call i32 {f.load('ptr', pointer, SYNC['sched_yield'], 8)}()")
    f.do(f"br label %{turn}")
    f.block(turn)
    f.do(f"br label %{head}")
    f.block(done)
    return now


def _barrier(arch: str) -> Function:
    """Waits until all threads have come; nothing to do for one."""
    f = Function("barrier", [("ptr", "sync"), ("i64", "threads")])

    def meet() -> None:
        generation = _atomic_load(f, "%sync", SYNC["generation"])
        before = f.let(f"atomicrmw add ptr {f.at('%sync', SYNC['arrived'])}, i32 1 seq_cst")
        last = f.let(
            f"icmp eq i32 {f.int_op('add', before, 1, 'i32')}, {f.let('trunc i64 %threads to i32')}"
        )

        def release() -> None:
            _atomic_store(f, 0, "%sync", SYNC["arrived"])
            _atomic_store(f, f.int_op("add", generation, 1, "i32"), "%sync", SYNC["generation"])

        def wait() -> None:
            _spin_while_equal(f, ("%sync", SYNC["generation"]), generation, arch)

        f.when(last, release, wait)

    f.when(f.let("icmp sgt i64 %threads, 1"), meet)
    return f


def _stamp() -> Function:
    """stamp(sync, place): the clock in nanoseconds, by the C library's clock_gettime."""
    f = Function("stamp", [("ptr", "sync"), ("ptr", "place")])
    time = f.let("alloca [2 x i64], align 8")  # a timespec: seconds, nanoseconds
    clock = f.load("i32", "%sync", SYNC["clock"], 8)
    f.let(f"call i32 {f.load('ptr', '%sync', SYNC['clock_gettime'], 8)}(i32 {clock}, ptr {time})")
    seconds, rest = f.load("i64", time, 0, 8), f.load("i64", time, 8, 8)
    f.store("i64", f.int_op("add", f.int_op("mul", seconds, 10**9), rest), "%place", 0, 8)
    return f


def _run() -> Function:
    """run(sync, program, args, threads): publishes work, wakes sleepers, takes part as thread 0."""
    f = Function("run", [("ptr", "sync"), ("ptr", "program"), ("ptr", "args"), ("i64", "threads")])
    f.store("ptr", "%program", "%sync", SYNC["program"], 8)
    f.store("ptr", "%args", "%sync", SYNC["args"], 8)
    f.store("i64", "%threads", "%sync", SYNC["threads"], 8)
    _announce(f, "%threads")
    f.do("call void %program(ptr %args, i64 0, i64 %threads)")
    return f


def _announce(f: Function, threads: Value) -> None:
    """Advances the epoch and posts the semaphore of every worker that sleeps."""
    f.let(f"atomicrmw add ptr {f.at('%sync', SYNC['epoch'])}, i32 1 seq_cst")

    def wake(tid: Value, _: list[Value]) -> list[Value]:
        flag = f.int_op("add", f.int_op("mul", tid, 64), SYNC["sleeping"])
        slept = f.let(f"atomicrmw xchg ptr {f.at('%sync', flag)}, i32 0 seq_cst")

        def post() -> None:
            semaphore = f.at("%sync", f.int_op("add", f.int_op("mul", tid, 64), SYNC["semaphore"]))
            f.let(f"call i32 {f.load('ptr', '%sync', SYNC['sem_post'], 8)}(ptr {semaphore})")

        f.when(f.let(f"icmp ne i32 {slept}, 0"), post)
        return []

    f.loop(1, threads, [], wake)


def _worker(arch: str) -> Function:
    """worker({sync, tid}): a thread's whole life, as pthread_create wants it."""
    f = Function("worker", [("ptr", "self")], returns="ptr")
    sync, tid = f.load("ptr", "%self", 0, 8), f.load("i64", "%self", 8, 8)
    flag = f.at(sync, f.int_op("add", f.int_op("mul", tid, 64), SYNC["sleeping"]))
    semaphore = f.at(sync, f.int_op("add", f.int_op("mul", tid, 64), SYNC["semaphore"]))
    start, head = f.label("start"), f.label("life")
    f.do(f"br label %{start}")
    f.block(start)
    f.do(f"br label %{head}")
    f.block(head)
    seen, now, last = f.label("%seen"), f.label("%now"), f.label("again")
    f.do(f"{seen} = phi i32 [ 0, %{start} ], [ {now}, %{last} ]")
    _spin_while_equal(f, (sync, SYNC["epoch"]), seen, arch, SPINS)
    _sleep(f, sync, seen, flag, semaphore)
    f.do(f"{now} = load atomic i32, ptr {f.at(sync, SYNC['epoch'])} seq_cst, align 4")
    leave, work = f.label("leave"), f.label("work")
    stopped = f.let(f"icmp ne i32 {_atomic_load(f, sync, SYNC['stop'])}, 0")
    f.do(f"br i1 {stopped}, label %{leave}, label %{work}")
    f.block(leave)
    f.do("ret ptr null")
    f.block(work)
    program, args = (f.load("ptr", sync, SYNC[key], 8) for key in ("program", "args"))
    threads = f.load("i64", sync, SYNC["threads"], 8)
    f.do(f"call void {program}(ptr {args}, i64 {tid}, i64 {threads})")
    f.do(f"br label %{last}")
    f.block(last)
    f.do(f"br label %{head}")
    return f


def _sleep(f: Function, sync: Value, seen: Value, flag: Value, semaphore: Value) -> None:
    """Sleeps until the epoch differs from `seen`, if it does not already.

    The flag is raised before the epoch is looked at again, and `_announce` advances the epoch
    before it looks at the flag, so one of the two always sees the other. Whoever takes the flag
    down decides: if it was the starter, a post is on its way and must be taken.
    """

    def doze() -> None:
        f.do(f"store atomic i32 1, ptr {flag} seq_cst, align 4")
        still = f.let(f"icmp eq i32 {_atomic_load(f, sync, SYNC['epoch'])}, {seen}")
        f.when(still, wait, retract)

    def retract() -> None:
        mine = f.let(f"icmp ne i32 {f.let(f'atomicrmw xchg ptr {flag}, i32 0 seq_cst')}, 0")
        f.when(mine, lambda: None, wait)

    def wait() -> None:
        head, done = f.label("wait"), f.label("woken")
        f.do(f"br label %{head}")
        f.block(head)
        failed = f.let(f"call i32 {f.load('ptr', sync, SYNC['sem_wait'], 8)}(ptr {semaphore})")
        # A signal handler may interrupt the wait: take the post in another turn.
        f.do(f"br i1 {f.let(f'icmp ne i32 {failed}, 0')}, label %{head}, label %{done}")
        f.block(done)

    f.when(f.let(f"icmp eq i32 {_atomic_load(f, sync, SYNC['epoch'])}, {seen}"), doze)


def _repeat() -> Function:
    """repeat(kernel, x, w, y, r, t0, t1, p0, p1, times, begin, step, end): the timing loop.

    Run i reads its weights at w + (begin + i * step) modulo end, so that, as in a network, they are
    not those of the run before. There is no foreign call between two runs.
    """
    names = [
        ("ptr", "kernel"),
        *(("ptr", p) for p in "xwyr"),
        *(("i64", p) for p in ("t0", "t1", "p0", "p1")),
    ]
    f = Function("repeat", [*names, *(("i64", p) for p in ("times", "begin", "step", "end"))])
    before, after = "ptr %x", f"ptr %y, ptr %r, {', '.join(f'i64 %{p}' for _, p in names[5:])}"

    def once(_: Value, carried: list[Value]) -> list[Value]:
        f.do(f"call void %kernel({before}, ptr {f.at('%w', carried[0])}, {after})")
        following = f.int_op("add", carried[0], "%step")
        over = f.let(f"icmp sge i64 {following}, %end")
        return [f.let(f"select i1 {over}, i64 0, i64 {following}")]

    f.loop(0, "%times", [("i64", "%begin")], once)
    return f
